"""Each setting from raw files to scores through the command line, with small models at random."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from experiments import recipe, save_all, written
from safetensors.torch import load_file

from fused_route import ROUTES
from fused_route.training import cli
from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.build import Built, build
from fused_route.training.experiment.decoding import Asking, answers
from fused_route.training.experiment.folder import open_run
from fused_route.training.experiment.head import AnswerHead
from fused_route.training.experiment.recipe import Recipe, TaskRecipe
from fused_route.training.experiment.run import encode, open_data
from fused_route.training.experiment.tasks import Rows, open_rows
from fused_route.training.experiment.trainer import ExperimentTrainer, row_losses
from fused_route.training.towers import wrap_timm

MAIN = {"roberta": "vqa_accuracy", "gqa": "gqa_accuracy", "gpt2": "caption_cider"}


@pytest.fixture(autouse=True)
def java_for_one_run_alone(request: pytest.FixtureRequest) -> None:
    if "gpt2 lora]" not in request.node.name:
        request.getfixturevalue("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("experiments"))


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(run.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{name}": t for name, t in load_file(path).items()}
    return found


SETTINGS: list[tuple[str, str, list[str]]] = [
    ("roberta", "lora", []),
    ("roberta", "adapter", ["--visual_tokens", "none", "--features", "tokens"]),
    ("roberta", "lora", ["--compat", "eccv24", "--head", "two-layer", "--route", "gram"]),
    ("gpt2", "lora", ["--visual_tokens", "none", "--select", "loss"]),
    ("gpt2", "adapter", ["--features", "tokens", "--route", "gram", "--adapter.normalize", "unit"]),
    ("gpt2", "lora", ["--compat", "eccv24"]),
    ("gpt2", "lora", []),
    ("bart", "lora", ["--route", "gram", "--adapter.normalize", "unit"]),
    ("bart", "lora", ["--method", "cross-attention", "--heads", "1", "--rank", "8"]),
    ("bart", "adapter", ["--modules", "per-task", "--sampling", "balanced"]),
    ("t5", "lora", ["--modules", "per-task"]),
]


@pytest.mark.parametrize(
    ("language", "host", "given"),
    SETTINGS,
    ids=[" ".join([*setting[:2], *setting[2]]) for setting in SETTINGS],
)
def test_from_raw_files_to_scores(
    language: str, host: str, given: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train, then eval on the test split, each by its command."""
    name = "-".join(given).replace("--", "") or "default"
    file, out = written(folder, language, host, name), folder / "runs" / f"{language}-{host}-{name}"
    assert run("train", file, *given) == 0
    printed = capsys.readouterr().out
    assert f"adapter: {out / 'best'}" in printed and "next: fused-route eval" in printed
    assert run("eval", out) == 0
    printed = capsys.readouterr().out
    told = yaml.safe_load(file.read_text())["tasks"]
    tested = [task for task, of in told.items() if "test" in of]
    (found,) = (out / "best").glob("scores-test*.json")
    scores = json.loads(found.read_text())
    for task in tested:
        main = next(key for key in scores if key.startswith(f"{task}_"))
        assert main in printed
    assert all(0 <= value <= 10 for key, value in scores.items() if not key.endswith("images"))
    logged = json.loads((out / "scores.json").read_text())["validation"]
    label = "" if shutil.which("java") else "_regex"  # never taken for the published scores
    expected = {f"{n}_cider{label}" if n == "caption" else f"{n}_accuracy" for n in told}
    assert set(logged) >= ({"loss"} if "loss" in given else expected)
    moved = tensors(out / "best")
    assert moved and all(tensor.isfinite().all() for tensor in moved.values())
    # an up-projection starts at zero
    up = [t for n, t in moved.items() if n.endswith(("lora_B.weight", "adapter_B.weight", ".B"))]
    assert up and all(tensor.any() for tensor in up)


class Trained:
    """A recipe's model and rows, without the Trainer."""

    def __init__(self, told: Recipe) -> None:
        data = open_data(told)
        torch.manual_seed(0)
        self.rows: Rows = data.train
        self.built: Built = build(told, data.answers)
        encode(self.built, data.images())
        self.batches = self.built.batches()

    def batch(self, name: str, size: int = 6) -> dict[str, Any]:
        rows = [self.rows[place] for place in self.rows.of(name)[:size]]
        batch = self.batches.training(rows)
        batch.pop("name")
        return batch


@pytest.mark.parametrize("route", [name for name in ROUTES if name != "self_gram"])
@pytest.mark.parametrize("language", ["roberta", "gpt2", "bart"])
def test_every_route_trains_in_every_setting(language: str, route: str, folder: Path) -> None:
    """One step: a finite loss, and gradients that are finite and not zero."""
    trained = Trained(recipe(folder, language, "lora", "--route", route))
    name = next(iter(trained.rows.samples))
    batch = trained.batch(name)
    batch.pop("weights", None)
    model = trained.built.model.train()
    with torch.no_grad():  # B = 0 has no gradient for A
        for key, parameter in model.named_parameters():
            if key.endswith(".B"):
                parameter.normal_(std=0.1)
    model(**batch).loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    routed = [g for k, g in gradients.items() if k.endswith((".A", ".B"))]
    assert routed and all(g.isfinite().all() and g.any() for g in routed)


@pytest.mark.parametrize("language", ["roberta", "gpt2", "bart", "t5"])
def test_loss_falls_on_one_batch(language: str, folder: Path) -> None:
    """What is trained learns six rows by heart, as far as a frozen output layer at random lets it:
    16 numbers tell 330 tokens apart; RoBERTa's head is trained."""
    trained = Trained(recipe(folder, language, "lora", "--rank", "16"))
    name = "nlvr2" if language in ("bart", "t5") else next(iter(trained.rows.samples))
    batch, model = trained.batch(name), trained.built.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    losses = []
    for _ in range(150):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    least = 0.2 if language == "roberta" else 0.6
    assert losses[-1] < least * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize(
    ("language", "name"), [("gpt2", "caption"), ("bart", "vqa"), ("bart", "caption"), ("t5", "gqa")]
)
def test_decoding_equals_the_step_by_step_forward(language: str, name: str, folder: Path) -> None:
    """Greedy answers are those of the likeliest token, one forward after another."""
    trained = Trained(recipe(folder, language, "lora", f"--tasks.{name}.num_beams", "1"))
    model, tokenizer = trained.built.model.eval(), trained.built.tokenizer
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    rows = [trained.rows[place] for place in trained.rows.of(name)[:3]]
    questions = Asking(trained.batches)(rows)
    given = answers(model, trained.batches, questions)
    count = trained.batches.tasks[name].max_new_tokens
    for row, answer in zip(rows, given, strict=True):
        inputs = trained.batches.prompts([row])
        ids: list[int] = []
        start = getattr(model.language.config, "decoder_start_token_id", None)
        for _ in range(count):
            if language == "gpt2":
                seen = torch.cat([inputs["input_ids"], torch.tensor([ids]).long()], 1)
                call = {**inputs, "input_ids": seen, "attention_mask": torch.ones_like(seen)}
            else:
                call = {**inputs, "decoder_input_ids": torch.tensor([[start, *ids]])}
            with torch.no_grad():
                ids.append(int(model(**call).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        forced = language == "bart" and len(ids) == count  # BART ends what is cut off
        ids = [*ids[:-1], tokenizer.eos_token_id] if forced else ids
        assert trained.batches.text(torch.tensor([ids])) == [answer]


def test_a_candidate_is_chosen_by_its_likelihood(folder: Path) -> None:
    trained = Trained(recipe(folder, "bart"))
    rows = [trained.rows[place] for place in trained.rows.of("nlvr2")[:5]]
    model = trained.built.model.eval()
    given = answers(model, trained.batches, Asking(trained.batches)(rows))
    for row, answer in zip(rows, given, strict=True):
        losses = {}
        for text in ("true", "false"):
            batch = trained.batches.candidates([row], text)
            batch.pop("name", None)
            losses[text] = float(model(**batch).loss.detach()) * int(
                (batch["labels"] != -100).sum()
            )
        assert answer == min(losses, key=lambda text: losses[text])


@pytest.mark.parametrize("language", ["roberta", "bart"])
def test_cached_features_train_as_the_tower_does(language: str, folder: Path) -> None:
    """The same adapter, to fp32's rounding, and no tower in the model."""
    found = {}
    for source in ("cache", "tower"):
        file = written(folder, language, "lora", source)
        assert run("train", file, "--features_from", source, "--epochs", "1") == 0
        found[source] = tensors(folder / "runs" / f"{language}-lora-{source}" / "last")
    assert found["cache"].keys() == found["tower"].keys()
    for name, tensor in found["cache"].items():
        torch.testing.assert_close(tensor, found["tower"][name], rtol=1e-4, atol=1e-6)
    run_folder = folder / "runs" / f"{language}-lora-cache"
    assert open_run(run_folder).model.vision is None
    assert open_run(run_folder, features_from="tower").model.vision is not None


def test_every_task_has_its_own_modules(folder: Path) -> None:
    """A batch of one task gives gradients to its own adapter alone, and the others answer alike."""
    told = recipe(folder, "bart", "lora", "--modules", "per-task")
    trained = Trained(told)
    model = trained.built.model.train()
    trained.built.tuned.use("gqa")
    batch = trained.batch("gqa")
    model(**batch).loss.backward()
    names = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert names and all(".gqa" in name for name in names)
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    for task in told.tasks:
        assert sum(f".{task}" in name for name in trainable) == len(trainable) / 4


def test_published_settings_reach_the_model(folder: Path) -> None:
    given = ["--compat", "eccv24", "--head", "two-layer"]
    built = Trained(recipe(folder, "roberta", "lora", *given)).built
    names = {k for k, p in built.model.named_parameters() if p.requires_grad}
    adapted = Trained(recipe(folder, "roberta", "adapter", "--compat", "eccv24")).built.model
    drawn = [p for k, p in adapted.named_parameters() if k.endswith((".A", ".B"))]
    assert all(float(p.detach().std()) == pytest.approx(0.02, rel=0.5) for p in drawn) and drawn
    assert any("LayerNorm" in name for name in names)
    assert any(name.endswith("query.base.bias") for name in names)
    assert not any("pooler" in name for name in names)
    batch = Trained(recipe(folder, "roberta")).batch("vqa")
    other = Trained(recipe(folder, "roberta", "lora", *given, "--visual_tokens", "none")).built
    for model, times in ((built.model, 2), (other.model, 1)):  # twice beside an image
        calls: list[int] = []
        embeddings: Any = model.language.roberta.embeddings
        embeddings.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(**batch)
        assert len(calls) == times


def test_rows_of_several_tasks(folder: Path) -> None:
    told = recipe(folder, "bart")
    rows = open_rows(told, "train", "train")
    assert [len(rows.of(name)) for name in told.tasks] == [12] * 4 and len(rows) == 48
    for place in (0, 11, 12, 47):
        row = rows[place]
        assert row["row"] == place and place in rows.of(row["name"])
        assert all(path.is_file() for path in row["paths"])
    assert len(rows[rows.of("nlvr2")[0]]["paths"]) == 2
    assert len(rows.images()) == len(set(rows.images()))


@pytest.mark.parametrize("language", ["roberta", "bart"])
def test_modules_that_no_file_has_are_trained_and_saved(language: str, folder: Path) -> None:
    """The head and the projection of images, whether the recipe names them or not."""
    built = Trained(recipe(folder, language, "lora", "--modules_to_save", "[]")).built
    names = {key for key, p in built.model.named_parameters() if p.requires_grad}
    assert any(("classifier" if language == "roberta" else "image_projection") in n for n in names)


@pytest.mark.parametrize("language", ["gpt2", "bart"])
def test_the_loss_on_rows_does_not_depend_on_the_batches(language: str, folder: Path) -> None:
    told = recipe(folder, language, "lora", "--select", "loss")
    data = open_data(told)
    torch.manual_seed(0)
    built = build(told, data.answers)
    encode(built, data.images())
    found = []
    for size in (3, 8, 50):
        training = told.training | {"per_device_eval_batch_size": size, "eval_strategy": "no"}
        arguments = arguments_of(replace(told, training=training), validated=False)
        trainer = ExperimentTrainer(built, arguments)
        assert data.validation is not None
        found.append(trainer.loss_on(data.validation))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_decoder_learns_answers_by_their_weights(folder: Path) -> None:
    """The weighted loss is that of each row by itself, and is divided for accumulation."""
    trained = Trained(recipe(folder, "gpt2"))
    task = TaskRecipe("vqav2", max_length=40)
    batches = replace(trained.batches, tasks={"caption": task})
    rows = [
        {
            **trained.rows[0],
            "row": n,
            "text": "what?",
            "references": ["red"] * k + ["blue"] * (10 - k),
        }
        for n, k in enumerate((1, 3, 10))
    ]
    batch = batches.training(rows)
    assert len(set(batch["weights"].tolist())) > 1
    model = trained.built.model.eval()
    expected = 0.0
    for row, weight in zip(rows, batch["weights"].tolist(), strict=True):
        alone = batches.training([row])
        calls = {k: v for k, v in alone.items() if k not in ("name", "weights")}
        expected += weight * float(model(**calls).loss.detach()) / 3
    losses, counts = row_losses(model, {k: v for k, v in batch.items() if k != "name"}, "decoder")
    assert float((losses.sum() / counts.sum()).detach()) == pytest.approx(expected, rel=1e-5)


def test_scores_of_several_tasks_are_averaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = recipe(folder, "bart")
    rows = open_rows(told, "validation", "evaluate")
    given = {name: {row["id"]: row["answer"] for row in map(dict, samples.rows)}
             for name, samples in rows.samples.items()}  # fmt: skip
    given["caption"] = {row["id"]: row["references"][0] for row in rows.samples["caption"].rows}
    monkeypatch.setattr(ExperimentTrainer, "answered", lambda *_: given)
    built = Trained(told).built
    trainer = ExperimentTrainer(built, arguments_of(told, validated=False))
    _, scores = trainer.scored(rows)
    assert scores["gqa_accuracy"] == scores["nlvr2_accuracy"] == 1.0
    main = [scores[f"{n}_accuracy"] for n in ("vqa", "gqa", "nlvr2")]
    assert scores["score"] == pytest.approx((sum(main) + scores["caption_cider_regex"]) / 4)


def test_batches_are_of_the_tasks_own_sizes(folder: Path) -> None:
    given = ["--tasks.nlvr2.batch_size", "2", "--batch_size", "5", "--data_seed", "3"]
    told = recipe(folder, "bart", "lora", *given)
    trained = Trained(told)
    trainer = ExperimentTrainer(
        trained.built, arguments_of(told, validated=False), trained.rows, None
    )
    loader: Any = trainer.get_train_dataloader()
    sizes = {batch["name"]: len(batch["input_ids"]) for batch in loader}
    assert sizes["nlvr2"] == 2 and max(sizes.values()) == 5
    other = ExperimentTrainer(
        trained.built,
        arguments_of(recipe(folder, "bart", "lora", *given[:-1], "4"), validated=False),
        trained.rows,
    )
    loaders: list[Any] = [t.get_train_dataloader() for t in (trainer, other)]
    order = [list(loader.batch_sampler) for loader in loaders]
    assert order[0] != order[1]


def test_the_published_head_reads_the_first_place() -> None:
    head = AnswerHead(4, 3)
    states = torch.randn(2, 5, 4)
    norm = head.layers[1]
    pooled = torch.tanh(states[:, 0] @ head.pooler_weight.T + head.pooler_bias)
    wide = head.layers[0](pooled)
    mean, var = wide.mean(-1, keepdim=True), wide.var(-1, unbiased=False, keepdim=True)
    assert isinstance(norm, torch.nn.LayerNorm)
    expected = head.layers[3](torch.nn.functional.gelu((wide - mean) / (var + norm.eps).sqrt()))
    torch.testing.assert_close(head(states), expected)
    trained = {name for name, _ in head.named_parameters()}
    frozen = {name for name, _ in AnswerHead(4, 3, "frozen").named_parameters()}
    assert trained - frozen == {"pooler_weight", "pooler_bias"}


@pytest.mark.parametrize("language", ["roberta"])
def test_towers_of_timm_and_of_packages(language: str, folder: Path, tmp_path: Path) -> None:
    """timm's from a folder, with its own transform; EfficientNet-Lite0 with its weights."""
    name = "test_vit.r160_in1k"
    wrap_timm(timm.create_model(name, pretrained=False)).save_pretrained(tmp_path / "timm")
    for vision in (tmp_path / "timm", "packaged/efficientnet-lite0"):
        given = ["--vision", str(vision), "--limit", "4", "--cache", str(tmp_path / "cache")]
        trained = Trained(recipe(folder, language, "lora", *given))
        assert torch.isfinite(trained.built.model(**trained.batch("vqa", 4)).loss)
