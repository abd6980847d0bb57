"""What `training` says is done, or refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
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
