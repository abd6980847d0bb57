"""What `training` says is done, or refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiments import recipe, refused, run, save_all, written
from safetensors.torch import load_file

from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.build import build
from fused_route.training.experiment.run import encode, open_data
from fused_route.training.experiment.trainer import ExperimentTrainer

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("arguments"))


def test_a_process_takes_one_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several that it sees: the Trainer would take nn.DataParallel, which layers refuse."""
    told = recipe(folder, "roberta", "lora", "--use_cpu", "false")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = arguments_of(told, validated=True)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 16
    assert arguments.eval_batch_size == arguments.per_device_eval_batch_size


def test_norms_and_biases_of_adapters_do_not_decay(folder: Path) -> None:
    norm = ["--adapter.norm", "before", "--weight_decay", "0.1"]
    told = recipe(folder, "roberta", "adapter", *norm)
    trainer = ExperimentTrainer(build(told, ("yes", "no")), arguments_of(told, validated=False))
    trained = {name for name, x in trainer.model.named_parameters() if x.requires_grad}
    decayed = trained & set(trainer.get_decay_parameter_names(trainer.model))
    last = {name.rpartition(".")[2] for name in trained - decayed}
    assert {"b_A", "b_B", "norm_weight", "norm_bias"} <= last
    assert {name.rpartition(".")[2] for name in decayed} >= {"A", "B", "weight"}
    assert not any(name.endswith(("bias", "b_A", "b_B", "norm_weight")) for name in decayed)


def vqa_of_a_decoder(folder: Path) -> tuple[str, ...]:
    root = folder / "data" / "vqav2"
    told = {"layout": "vqav2", "root": root, "train": "karpathy-train", "validation": "null"}
    told |= {"test": "null", "max_length": 40}
    return tuple(f"--tasks.caption.{name}={value}" for name, value in told.items())


def test_label_smoothing_of_weighted_answers_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken and not done; of captions it is."""
    file, given = written(folder, "gpt2"), ["--label_smoothing_factor", "0.1"]
    line = refused(capsys, "train", file, *given, *vqa_of_a_decoder(folder))
    assert "label_smoothing_factor=0.1 has no meaning for tasks.caption" in line
    told = recipe(folder, "gpt2", "lora", *given)
    assert arguments_of(told, validated=True).label_smoothing_factor == 0.1


NOT_DONE = {
    "save_only_model": "could not go on from such checkpoints",
    "dataloader_drop_last": "every row is trained on",
    "auto_find_batch_size": "set per_device_train_batch_size",
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_what_is_not_done_is_refused(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["train"], ["train", "--dry-run"]):
        file = written(folder, "roberta", "lora", "not-done")
        line = refused(capsys, command[0], file, *command[1:], f"--{name}", "true")
        assert f"training.{name}=True: " in line and NOT_DONE[name] in line


def test_runs_that_were_told_what_is_not_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are evaluated, and found to be the same run, since it did nothing."""
    file = written(folder, "roberta", "lora", "told")
    assert run("train", file) == 0
    out = folder / "runs" / "roberta-lora-told"
    for path in (out / "recipe.yaml", out / "best" / "recipe.yaml"):
        told = yaml.safe_load(path.read_text())
        told["training"]["dataloader_drop_last"] = True
        path.write_text(yaml.safe_dump(told))
    assert run("eval", out) == 0
    capsys.readouterr()
    assert run("train", file) == 0
    assert "is finished already" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_not_averaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 steps over it; the average is of the others."""
    compute = ExperimentTrainer.compute_loss

    def overflows(self: ExperimentTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss + (loss.detach() * float("inf") if self.state.global_step == 1 else 0.0)

    monkeypatch.setattr(ExperimentTrainer, "compute_loss", overflows)
    file = written(folder, "roberta", "lora", "overflow")
    assert run("train", file, "--steps", "3", "--logging_steps", "1") == 0
    out = folder / "runs" / "roberta-lora-overflow"
    found = json.loads((out / "scores.json").read_text())["training"]["train_loss"]
    log = json.loads((out / "history.json").read_text())["log"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert found == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-3)


def test_no_evaluation_keeps_checkpoints(folder: Path) -> None:
    file = written(folder, "roberta", "lora", "unevaluated")
    assert run("train", file, "--eval_strategy", "no") == 0
    out = folder / "runs" / "roberta-lora-unevaluated"
    assert list(out.glob("checkpoint-*/complete")) and (out / "last").is_dir()
    assert not (out / "best").exists()


@pytest.mark.parametrize("off", ["eval_strategy", "save_strategy"])
def test_patience_needs_evaluations_and_checkpoints(
    off: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["train"], ["train", "--dry-run"]):
        file = written(folder, "roberta", "lora", "patience")
        given = ["--patience", "2", f"--{off}", "no"]
        line = refused(capsys, command[0], file, *command[1:], *given)
        assert "patience=2 counts evaluations of what is saved" in line
        assert f"training.{off}='no'" in line


def test_prefetching_is_done(folder: Path) -> None:
    given = ["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "3"]
    told = recipe(folder, "roberta", "lora", *given)
    data = open_data(told)
    built = build(told, data.answers)
    encode(built, data.images())
    trainer = ExperimentTrainer(built, arguments_of(told, validated=False), data.train)
    assert trainer.get_train_dataloader().prefetch_factor == 3


def scored(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    """Evaluations give these scores, by step."""

    def evaluate(self: ExperimentTrainer, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_score": scores[self.state.global_step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    monkeypatch.setattr(ExperimentTrainer, "evaluate", evaluate)


BETWEEN = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "2", "--steps", "5"]


def test_the_best_is_the_best_that_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scores.json is of the adapter in best/, whatever was better between checkpoints."""
    file = written(folder, "roberta", "lora", "between")
    scored(monkeypatch, {1: 0.8, 2: 0.5, 3: 0.9, 4: 0.6, 5: 0.1})
    assert run("train", file, *BETWEEN) == 0
    out = folder / "runs" / "roberta-lora-between"
    assert json.loads((out / "scores.json").read_text())["validation"]["score"] == 0.6
    name = "adapter_model.safetensors"
    best, checkpoint = load_file(out / "best" / name), load_file(out / "checkpoint-4" / name)
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in best.items())


def test_the_last_is_not_called_the_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(folder, "roberta", "lora", "unchosen")
    scored(monkeypatch, {1: 0.2, 2: 0.9, 3: 0.3, 4: 0.6, 5: 0.1})
    assert run("train", file, *BETWEEN, "--load_best_model_at_end", "false") == 0
    out = folder / "runs" / "roberta-lora-unchosen"
    assert (out / "last").is_dir() and not (out / "best").exists()
    assert json.loads((out / "scores.json").read_text())["validation"]["score"] == 0.1
