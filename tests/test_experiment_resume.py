"""Runs that are killed and go on, and runs of two processes: equal to one that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from experiments import refused, save_all, written
from model_folders import save_language
from safetensors import SafetensorError
from safetensors.torch import load_file

from fused_route.training import cli
from fused_route.training.experiment import run, trainer
from fused_route.training.experiment.build import Built
from fused_route.training.experiment.folder import last_checkpoint, save
from fused_route.training.experiment.trainer import ExperimentTrainer

pytestmark = pytest.mark.usefixtures("without_java")

COMMAND = [sys.executable, "-m", "fused_route.training", "train"]
QUIET = {**os.environ, "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout in the language models, so that random numbers count."""
    made = save_all(tmp_path_factory.mktemp("runs"))
    for kind in ("roberta", "bart"):
        save_language(made / "models" / kind, kind, dropout=0.2)
    return made


def file(folder: Path, language: str, name: str, **training: object) -> tuple[Path, Path]:
    """(a recipe of several checkpoints, with dropout everywhere, the folder of its run)."""
    path = written(folder, language, "lora", name)
    told = yaml.safe_load(path.read_text())
    told["adapter"]["dropout"] = 0.2
    told["training"] |= {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "save_strategy": "steps",
        "save_steps": 5, "eval_steps": 5, "max_grad_norm": 0.5, "warmup_steps": 3, **training,
    }  # fmt: skip
    for task in told["tasks"].values():
        task["limit"] = 14  # the last batch is smaller
    path.write_text(yaml.safe_dump(told))
    return path, Path(told["training"]["output_dir"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{name}": t for name, t in load_file(path).items()}
    return found


def assert_equal(first: Path, second: Path) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize(
    ("language", "given"),
    [
        ("roberta", ["--features_from", "tower", "--augmentation", "crop"]),
        ("roberta", ["--gradient_accumulation_steps", "2", "--bf16", "true"]),
        ("bart", []),
        pytest.param(
            "bart",
            ["--modules", "per-task", "--dataloader_num_workers", "1"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["augmented", "accumulated bf16", "multi-task", "per-task with workers"],
)
def test_a_killed_run_goes_on_bit_for_bit(language: str, given: list[str], folder: Path) -> None:
    """Killed with SIGKILL somewhere behind its first checkpoint, it ends as one left alone does."""
    name = "-".join(given).replace("-", "") or "plain"
    whole, left_alone = file(folder, language, f"{name}-whole")
    assert cli.main(["train", str(whole), *given]) == 0
    stopped, killed = file(folder, language, f"{name}-killed")
    process = subprocess.Popen([*COMMAND, str(stopped), *given], env=QUIET, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while last_checkpoint(killed) is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "last").exists()
    assert cli.main(["train", str(stopped), *given]) == 0
    assert_equal(left_alone / "last", killed / "last")
    assert_equal(left_alone / "best", killed / "best")


def test_a_half_written_checkpoint_is_passed_by(folder: Path) -> None:
    path, out = file(folder, "roberta", "half")
    assert cli.main(["train", str(path)]) == 0
    finished, checkpoint = tensors(out / "last"), last_checkpoint(out)
    assert checkpoint is not None
    (out / "scores.json").unlink()
    half = out / "checkpoint-999"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert last_checkpoint(out) == checkpoint
    assert cli.main(["train", str(path)]) == 0
    for name, tensor in tensors(out / "last").items():
        assert torch.equal(tensor, finished[name])


def test_a_damaged_checkpoint_is_passed_by_too(folder: Path) -> None:
    """What a full disk leaves behind: the one before it counts, and the end is the same."""
    path, out = file(folder, "roberta", "damaged")
    assert cli.main(["train", str(path)]) == 0
    finished, checkpoint = tensors(out / "last"), last_checkpoint(out)
    assert checkpoint is not None
    (out / "scores.json").unlink()
    for name, content in (("optimizer.pt", b""), ("trainer_state.json", b'{"epoch": 1')):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        before = last_checkpoint(out)
        assert before is not None and before != checkpoint
        (checkpoint / name).write_bytes(kept)
    (checkpoint / "optimizer.pt").write_bytes(b"")
    assert cli.main(["train", str(path)]) == 0
    for name, tensor in tensors(out / "last").items():
        assert torch.equal(tensor, finished[name])


def test_early_stopping_goes_on_counting(folder: Path) -> None:
    """A run that is stopped after its second evaluation ends where one left alone does."""
    given = ["--patience", "2", "--epochs", "9", "--lr", "0"]
    whole, left_alone = file(folder, "roberta", "patient")
    assert cli.main(["train", str(whole), *given]) == 0
    stopped, again = file(folder, "roberta", "patient-again")
    with pytest.MonkeyPatch.context() as patch:
        save = ExperimentTrainer._save_checkpoint

        def save_and_stop(self: ExperimentTrainer, *args: Any) -> None:
            save(self, *args)
            if self.state.global_step == 10:
                raise KeyboardInterrupt

        patch.setattr(ExperimentTrainer, "_save_checkpoint", save_and_stop)
        assert cli.main(["train", str(stopped), *given]) == 130
    assert cli.main(["train", str(stopped), *given]) == 0
    steps = [last_checkpoint(run) for run in (left_alone, again)]
    assert steps[0] is not None and steps[1] is not None and steps[0].name == steps[1].name


@pytest.mark.parametrize("given", [["--patience", "2", "--epochs", "9"], ["--steps", "10"]])
def test_a_run_killed_behind_its_last_step_takes_no_more(given: list[str], folder: Path) -> None:
    """Between its last checkpoint and its scores; 10 steps end within an epoch."""
    name, found = given[0].strip("-"), []
    for end in ("alone", "killed"):
        path, out = file(folder, "roberta", f"{name}-{end}")
        if end == "killed":
            with pytest.MonkeyPatch.context() as patch:

                def die(self: ExperimentTrainer) -> None:
                    raise KeyboardInterrupt

                patch.setattr(ExperimentTrainer, "_load_best_model", die)
                assert cli.main(["train", str(path), *given, "--lr", "0"]) == 130
        assert cli.main(["train", str(path), *given, "--lr", "0"]) == 0
        history = json.loads((out / "history.json").read_text())
        found.append((history["steps"], last_checkpoint(out)))
        assert history["resumed_at"] == (history["steps"] if end == "killed" else 0)
    (one, _), (other, last) = found
    assert one == other and last is not None and last.name == f"checkpoint-{one}"
    alone, killed = (folder / "runs" / f"roberta-lora-{name}-{end}" for end in ("alone", "killed"))
    assert_equal(alone / "last", killed / "last")


@pytest.mark.parametrize("length", [["--steps", "7"], ["--epochs", "2"]], ids=" ".join)
def test_a_run_killed_before_its_last_evaluation_makes_it(length: list[str], folder: Path) -> None:
    """Saved behind a step, evaluated at the epoch's end."""
    more = ["--eval_strategy", "epoch", "--load_best_model_at_end", "false"]
    steps = 7 if length[0] == "--steps" else 8
    found = []
    for end in ("alone", "ended"):
        name = f"evaluated-{length[0].strip('-')}-{end}"
        path, out = file(folder, "roberta", name, save_steps=steps, eval_steps=None)
        given = [*length, *more]
        if end == "ended":
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, steps)
                assert cli.main(["train", str(path), *given]) == 130
        assert cli.main(["train", str(path), *given]) == 0
        assert json.loads((out / "history.json").read_text())["steps"] == steps
        scores = json.loads((out / "scores.json").read_text())["validation"]
        found.append({**scores, "steps_per_second": 0, "samples_per_second": 0})
    assert found[0] == found[1] and "score" in found[0]


def test_runs_of_before_go_on_with_the_groups_of_their_optimiser(folder: Path) -> None:
    path = written(folder, "roberta", "adapter", "groups")
    told = ["--steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval_steps", "2"]
    out = folder / "runs" / "roberta-adapter-groups"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "UNDECAYED", ())
        patch.setattr(run, "UNDECAYED", ())
        stop_at(patch, 2)
        assert cli.main(["train", str(path), *told]) == 130
    begun = json.loads((out / "begun.json").read_text())
    assert begun.pop("undecayed") == []
    (out / "begun.json").write_text(json.dumps(begun))
    assert cli.main(["train", str(path), *told]) == 0


def test_a_cache_may_lie_in_the_run(folder: Path) -> None:
    path, out = file(folder, "roberta", "own-cache")
    told = ["--steps", "2", "--cache", str(out / "made" / "cache")]
    with pytest.MonkeyPatch.context() as patch:

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(run, "_check_again", die)
        assert cli.main(["train", str(path), *told]) == 130  # images are encoded, nothing else is
    assert cli.main(["train", str(path), *told]) == 0
    assert (out / "made" / "cache").is_dir()


def test_a_checkpoint_counts_when_all_processes_have_written_theirs(folder: Path) -> None:
    path, out = file(folder, "roberta", "barrier")
    here, seen = out / "checkpoint-5", []
    with pytest.MonkeyPatch.context() as patch:
        wait = Accelerator.wait_for_everyone

        def look(self: Accelerator) -> None:
            seen.append([(here / name).exists() for name in ("rng_state.pth", "complete")])
            wait(self)

        patch.setattr(Accelerator, "wait_for_everyone", look)
        assert cli.main(["train", str(path), "--steps", "5"]) == 0
    assert [True, False] in seen


def test_features_of_another_precision_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = file(folder, "roberta", "precision")
    cache = folder / "another-cache"
    told = ["--cache", str(cache)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        assert cli.main(["train", str(path), *told]) == 130
    assert json.loads((out / "begun.json").read_text())["features"] == ["float32"]
    shutil.rmtree(cache)
    assert cli.main(["encode", str(path), *told, "--dtype", "float16"]) == 0
    line = refused(capsys, "train", path, *told)
    assert f"{out} was begun with features in float32, the cache has them in float16" in line
    shutil.rmtree(cache)
    assert cli.main(["train", str(path), *told]) == 0  # encoded again, as then


@pytest.mark.parametrize(
    ("rate", "says"),
    [("0.5", "is a run of another recipe (training.learning_rate"), ("0.001", "was finished by")],
)
def test_a_folder_that_another_run_took_meanwhile(
    rate: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While this one encoded images: the other's run stays."""
    path, out = file(folder, "roberta", f"meanwhile-{rate}")
    began, command = run._began, ["train", str(path), "--steps", "5", "--lr"]
    with pytest.MonkeyPatch.context() as patch:

        def slow(*given: Any) -> Any:
            patch.setattr(run, "_began", began)
            found = began(*given)
            assert cli.main([*command, "0.001"]) == 0
            return found

        patch.setattr(run, "_began", slow)
        line = refused(capsys, *command, rate)
    assert says in line
    assert yaml.safe_load((out / "recipe.yaml").read_text())["training"]["learning_rate"] == 0.001
    assert json.loads((out / "history.json").read_text())["resumed_at"] == 0


def test_the_same_seed_trains_the_same(folder: Path) -> None:
    given = ["--full_determinism", "true"]
    runs = []
    for name in ("first", "second"):
        path, out = file(folder, "roberta", name)
        code = f"from fused_route.training import cli; cli.main(['train', {str(path)!r}, *{given}])"
        subprocess.run([sys.executable, "-c", code], env=QUIET, check=True, capture_output=True)
        runs.append(out)
    assert_equal(runs[0] / "last", runs[1] / "last")


@pytest.mark.parametrize(
    ("language", "given"),
    [
        ("roberta", []),
        pytest.param("bart", [], marks=pytest.mark.slow),
        ("bart", ["--modules", "per-task"]),
    ],
)
def test_two_processes_equal_one(language: str, given: list[str], folder: Path) -> None:
    """Two gloo processes with batches of 4, and one that accumulates two of them."""
    for kind in ("roberta", "bart"):
        save_language(folder / "models" / kind, kind)  # masks of dropout differ with the process
    label = "-".join(given).replace("-", "")
    one, alone = file(folder, language, f"one{label}", gradient_accumulation_steps=2)
    two, together = file(folder, language, f"two{label}")
    for path in (one, two):
        told = yaml.safe_load(path.read_text())
        told["adapter"]["dropout"] = 0.0
        path.write_text(yaml.safe_dump(told))
    assert cli.main(["train", str(one), *given]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = [sys.executable, *launcher, *COMMAND[1:]]
    done = subprocess.run(
        [*launch, str(two), *given], env=QUIET, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = tensors(together / "last"), tensors(alone / "last")
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    scores = [yaml.safe_load((run / "scores.json").read_text()) for run in (alone, together)]
    assert scores[0]["validation"] == scores[1]["validation"]
    assert done.stdout.count("next: fused-route eval") == 1  # rank 0 alone prints


def test_the_training_loss_is_of_every_step(folder: Path) -> None:
    """Between lines of the log, behind the last one, and in front of a resume."""
    found = []
    for name, steps in (("each", 1), ("few", 4), ("resumed", 4), ("older", 1)):
        path, out = file(folder, "roberta", f"loss-{name}", logging_steps=steps, save_steps=3)
        given = ["--steps", "7", "--eval_steps", "3"]
        if name in ("resumed", "older"):
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, 3)
                assert cli.main(["train", str(path), *given]) == 130
        if name == "older":
            (out / "checkpoint-3" / "losses.json").unlink()
        assert cli.main(["train", str(path), *given]) == 0
        found.append(json.loads((out / "scores.json").read_text())["training"]["train_loss"])
        log = json.loads((out / "history.json").read_text())["log"]
        if name == "each":
            losses = [line["loss"] for line in log if "loss" in line]
            assert len(losses) == 7 and len(set(losses)) > 1
            expected = sum(losses) / 7
    assert found == pytest.approx([expected] * 4, rel=1e-5)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupts a run behind the checkpoint of a step."""
    save = ExperimentTrainer._save_checkpoint

    def save_and_stop(self: ExperimentTrainer, *args: Any) -> None:
        save(self, *args)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(ExperimentTrainer, "_save_checkpoint", save_and_stop)


FULL = {
    "torch": RuntimeError(
        "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file "
        "data/0: file write failed\nException raised from write (a.cpp:1):\nframe #0: x"
    ),
    "system": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_one_line(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the same command goes on from the last whole checkpoint, to the same end."""
    whole, left_alone = file(folder, "roberta", f"room-{kind}")
    assert cli.main(["train", str(whole)]) == 0
    path, out = file(folder, "roberta", f"full-{kind}")
    with pytest.MonkeyPatch.context() as patch:
        save = torch.save

        def full(value: Any, to: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-10" in str(to):
                Path(to).write_bytes(b"half")
                raise FULL[kind]
            save(value, to, *args, **kwargs)

        patch.setattr(torch, "save", full)
        line = refused(capsys, "train", path)
    assert "checkpoint-10 could not be written, the disk may be full" in line
    assert "frame #0" not in line
    before = last_checkpoint(out)
    assert before is not None and before.name == "checkpoint-5"
    assert cli.main(["train", str(path)]) == 0
    assert_equal(left_alone / "last", out / "last")


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_full_disk_at_the_end_is_one_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = file(folder, "roberta", f"end-{name}")
    with pytest.MonkeyPatch.context() as patch:

        def full(built: Built, to: Path) -> None:
            if to.name == name:
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            save(built, to)

        patch.setattr(trainer, "save", full)
        line = refused(capsys, "train", path)
    assert f"{name} could not be written, the disk may be full" in line
    assert cli.main(["train", str(path)]) == 0 and (out / name).is_dir()


def test_other_errors_of_a_checkpoint_are_not_called_a_full_disk(folder: Path) -> None:
    path, _ = file(folder, "roberta", "error")
    with pytest.MonkeyPatch.context() as patch:

        def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError("something else")

        patch.setattr(torch, "save", fails)
        with pytest.raises(RuntimeError, match="something else"):
            cli.main(["train", str(path)])
