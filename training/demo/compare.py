"""The main job: a frozen text model learns to answer questions about images it sees by routing.

Arms of equal trainable size on easy-VQA, with frozen MiniLM and frozen EfficientNet-Lite0
features. Without a visual prefix, routing is the only way from the image to the answer.
"""

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_route import Attached, RoutedConfig, __version__, attach, checkpoint
from fused_route.checks import finite, whole
from fused_route.training.data import easy_vqa
from fused_route.training.data.easy_vqa import Questions
from fused_route.training.demo.features import CACHE_DIR, encode_images
from fused_route.training.demo.figures import Example
from fused_route.training.demo.models import HEAD, VqaClassifier, load_encoder
from fused_route.training.demo.report import ArmResult, aggregate, print_table, write_report
from fused_route.training.demo.task import ENCODER, TASK, Task, encoder_directory
from fused_route.training.demo.vision import VisionTower
from fused_route.training.devices import one_gpu
from fused_route.training.packages import missing
from fused_route.training.plots import PREFIX
from fused_route.training.projector import fit_projector

WATCHED = 500  # test questions behind each point of the learning curves, drawn once


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
            warm-up over a tenth of the steps, then cosine to zero; gradients clipped to norm 1).
        rank: r; alpha = r.
        layers: how many layers of the text model are kept, from the first.
        seeds: number of runs of each arm.
        out: folder of the results.
        cache: folder of the image features.
        bundle: what `fused_route.training.demo.bundle` packed; None: what the packages ship.

    Raises:
        ValueError: a number that is not accepted, or `out` is a file or a folder with files that
            are not results of this command.
    """

    steps: int = 300
    batch: int = 64
    lr: float = 3e-3
    rank: int = 8
    layers: int = 3
    seeds: int = 1
    out: Path = Path("runs", "demo")
    cache: Path = CACHE_DIR
    bundle: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "layers", "seeds"):
            whole(name, getattr(self, name))
        if finite("lr", self.lr) <= 0.0:
            raise ValueError(f"lr must be greater than 0, got {self.lr}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out={str(self.out)!r} is a file")
        if self.out.is_dir() and any(self.out.iterdir()) and not are_results(self.out):
            raise ValueError(
                f"out={str(self.out)!r} holds other files: name a new or an empty folder"
            )


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


def load_splits(tower: VisionTower, tokenizer: Any, cache: Path) -> tuple[Split, Split]:
    """Train and test questions with their image features; images are encoded once."""

    def split(name: easy_vqa.Split) -> Split:
        images = encode_images(tower, easy_vqa.image_paths(name), cache)
        return split_of(easy_vqa.load(name), tokenizer, torch.from_numpy(images))

    return split("train"), split("test")


def split_of(questions: Questions, tokenizer: Any, features: Tensor) -> Split:
    """Questions as the model takes them, with the features (images, width) they refer to."""
    labels = {answer: i for i, answer in enumerate(easy_vqa.answer_labels())}
    tokens = tokenizer(questions.texts, padding=True, return_tensors="pt")
    return Split(
        questions,
        tokens["input_ids"],
        tokens["attention_mask"],
        torch.tensor(questions.image_ids),
        torch.tensor([labels[answer] for answer in questions.answers]),
        features,
    )


def build(
    arm: Arm, settings: Settings, train: Split, directory: Path | None = None
) -> tuple[VqaClassifier, Attached]:
    """A fresh model with this arm's routed layers on query and value of each layer."""
    encoder, _ = load_encoder(directory or encoder_directory(), settings.layers)
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
    attached = attach(model, config)
    assert attached.projector is not None
    fit_projector(attached.projector, [train.features])
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


def watched(test: Split) -> Tensor:
    """The test questions behind the learning curves: WATCHED of them, drawn with a fixed seed."""
    return torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:WATCHED]


def fit(
    model: VqaClassifier, train: Split, test: Split, settings: Settings, seed: int
) -> list[tuple[int, float]]:
    """Trains in place; returns (step, accuracy on WATCHED test questions) along the way."""
    from tqdm import tqdm
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    some = watched(test)
    every = max(settings.steps // 12, 1)
    curve: list[tuple[int, float]] = []
    bar = tqdm(total=settings.steps, unit="step", leave=False)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.update()
            if state.global_step % every == 0 or state.global_step == settings.steps:
                right = predict(model, test, some) == test.labels[some]
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
        logging_nan_inf_filter=False,  # it would hide that training diverged
        report_to=[],
        disable_tqdm=True,  # the bar of this function shows the test accuracy too
        remove_unused_columns=False,  # the collator makes the columns
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        one_gpu(arguments),
        train_dataset=range(len(train)),
        data_collator=lambda items: train.batch(torch.tensor(items)),
        callbacks=[Watch()],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        loss = trainer.train().training_loss
    finally:
        bar.close()
    trained = (p for p in model.parameters() if p.requires_grad)
    if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in trained):
        raise ValueError(f"lr={settings.lr:g}: training diverged; try a lower one")
    return curve


def run_arm(
    arm: Arm, seed: int, settings: Settings, train: Split, test: Split, encoder: Path | None = None
) -> tuple[ArmResult, Attached]:
    """Trains one arm and tests it on every question."""
    torch.manual_seed(seed)
    model, attached = build(arm, settings, train, encoder)
    trainable = sum(p.numel() for p in attached.trainable_parameters())
    started = time.perf_counter()
    curve = fit(model, train, test, settings, seed)
    seconds = time.perf_counter() - started
    labels = easy_vqa.answer_labels()
    predicted = [labels[i] for i in predict(model, test, torch.arange(len(test))).tolist()]
    accuracy = easy_vqa.accuracy_by_type(predicted, test.questions.answers)
    result = ArmResult(
        arm.name, arm.route, arm.normalize, arm.prefix, seed, trainable, seconds, accuracy, curve,
        predicted,
    )  # fmt: skip
    return result, attached


def save_arm(arm: Arm, seed: int, settings: Settings, attached: Attached, vision: str) -> None:
    """Saves an arm's adapter, with what it was trained to do, in a folder under settings.out."""
    folder = settings.out / (arm.folder if settings.seeds == 1 else f"{arm.folder}-seed{seed}")
    attached.save(folder)
    digest = checkpoint.digest_of_file(folder / checkpoint.TENSORS)
    labels = easy_vqa.answer_labels()
    Task(digest, labels, ENCODER, settings.layers, arm.prefix, vision).write(folder)


def examples(
    results: Sequence[ArmResult], test: Split, paths: Sequence[Path], count: int = 12
) -> list[Example]:
    """Test questions with image and every arm's answer, as many of each answer type.

    Drawn with a fixed seed; half of them among questions on which the arms differ, where there are.
    """
    first_seed = {r.name: r.predictions for r in reversed(results)}
    names = list(dict.fromkeys(r.name for r in results))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(1)).tolist()
    kinds = [easy_vqa.answer_type(answer) for answer in test.questions.answers]
    chosen: list[int] = []
    for kind in easy_vqa.ANSWER_TYPES:
        share = count // len(easy_vqa.ANSWER_TYPES)
        of_kind = [i for i in order if kinds[i] == kind]
        differ = [i for i in of_kind if len({first_seed[name][i] for name in names}) > 1]
        some = differ[: share // 2]
        chosen += some + [i for i in of_kind if i not in some][: share - len(some)]
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
    shown = {n: str(v) for n, v in asdict(settings).items() if n not in ("bundle", "cache", "out")}
    return {
        **shown,
        "learning curves": f"on {WATCHED} test questions, drawn once; the table is on all",
        "text model": f"{ENCODER}, first {settings.layers} layers, frozen",
        "image features": "EfficientNet-Lite0 (ImageNet), pooled, frozen",
        **({} if settings.bundle is None else {"data": "a bundle: features, text model in fp16"}),
        "versions": ", ".join(
            [f"fused_route {__version__}"] + [f"{p} {version(p)}" for p in packages]
        ),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{'GPU' if torch.cuda.is_available() else 'CPU'}",
    }


def are_results(out: Path) -> bool:
    """Whether a folder holds what this command writes."""
    return (out / "results.json").is_file() or any(out.glob(f"*/{TASK}"))


def keep_earlier(out: Path) -> Path | None:
    """Moves earlier results out of the way: their folder gets the time they were written."""
    if not out.exists() or not any(out.iterdir()):
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

    The report is written anew after each arm, so that an interruption loses one arm at the most.
    Earlier results are kept beside it, and stay in place until the first arm is trained.

    Raises:
        ValueError: a package or a file is missing, or training diverged.
    """
    from fused_route.training.demo import bundle

    for package in ("accelerate", "matplotlib", "rich"):  # before minutes of training, not after
        if find_spec(package) is None:
            raise missing(package)
    data = bundle.read(settings.bundle, settings.layers, settings.cache)
    train, test = data.train, data.test
    question_only = easy_vqa.question_only_baseline(train.questions, test.questions)
    majority = easy_vqa.majority_baseline(train.questions, test.questions)
    baselines = {"question only": question_only, "majority answer": majority}
    on_all = {n: easy_vqa.accuracy_by_type(p, test.questions.answers) for n, p in baselines.items()}
    some = watched(test).tolist()
    truth = [test.questions.answers[i] for i in some]
    on_watched = {
        n: easy_vqa.accuracy_by_type([p[i] for i in some], truth)["all"]
        for n, p in baselines.items()
    }
    results: list[ArmResult] = []
    for seed, (number, arm) in product(range(settings.seeds), enumerate(arms, 1)):
        print(f"arm {number} of {len(arms)}: {arm.name}, seed {seed}", flush=True)
        result, attached = run_arm(arm, seed, settings, train, test, data.encoder)
        print(f"  test accuracy {result.accuracy['all']:.1%}", flush=True)
        earlier = None if results else keep_earlier(settings.out)
        if earlier is not None:
            print(f"earlier results moved to {earlier}")
        save_arm(arm, seed, settings, attached, data.vision)
        results.append(result)
        rows = aggregate(results)
        report = write_report(
            settings.out, rows, on_all, header(settings),
            examples(results, test, data.test_images), curve_baselines=on_watched,
        )  # fmt: skip
    print_table(rows, on_all)
    return report
