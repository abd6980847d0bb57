"""`fused-route train`: the folder of a run, and what cannot be trained."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiments import refused, run, save_all, written
from safetensors.torch import load_file

from fused_route.training import cli
from fused_route.training.experiment.folder import alone_in, is_run, write_recipe
from fused_route.training.experiment.recipe_file import read_recipe

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """A trained run."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        for language in ("roberta",):
            assert cli.main(["train", str(written(folder, language))]) == 0
            found[language] = folder / "runs" / f"{language}-lora-recipe"
    return found


class TestTrain:
    def test_the_folder_of_a_run(self, runs: dict[str, Path]) -> None:
        out = runs["roberta"]
        for name in ("best", "last"):
            there = {path.name for path in (out / name).iterdir()}
            assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= there
            assert {"recipe.yaml", "answers.json"} <= there
            # the adapter, head and projector alone
            assert (
                sum(t.numel() for t in load_file(out / name / "adapter_model.safetensors").values())
                < 4000
            )
        assert len(list(out.glob("checkpoint-*"))) <= 2

    def test_dry_run_writes_nothing(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for language, shape in (("roberta", "(16, "), ("gpt2", "(16, "), ("bart", "(12, ")):
            file = written(folder, language, "lora", "dry")
            assert run("train", file, "--dry-run", "--route", "gram") == 0
            out = capsys.readouterr().out
            assert yaml.safe_load(out[: out.index("training rows")])["adapter"]["route"] == "gram"
            for told in ("trainable of", "memory, estimated", f"input_ids: {shape}", "→"):
                assert told in out, told
            assert f"next: fused-route train {file} --route gram" in out
            assert not (folder / "runs" / f"{language}-lora-dry").exists()

    def test_a_finished_run_is_kept(
        self, runs: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = {p: p.read_bytes() for p in (runs["roberta"] / "best").iterdir()}
        saved = runs["roberta"] / "best" / "adapter_model.safetensors"
        tensors = load_file(saved)
        assert run("train", written(folder, "roberta")) == 0
        for path, content in before.items():
            if path.suffix != ".safetensors":
                assert path.name == "training_args.bin" or path.read_bytes() == content
        assert all(torch.equal(t, tensors[k]) for k, t in load_file(saved).items())

    def test_a_finished_run_keeps_its_scores_and_says_so(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Also early stopped, moved, and started with another cache."""
        file = written(folder, "roberta", "lora", "finished")
        given = ["--patience", "1", "--epochs", "9", "--lr", "0"]
        assert run("train", file, *given) == 0
        out = folder / "runs" / "roberta-lora-finished"
        before = (out / "scores.json").read_text()
        moved = shutil.copytree(out, tmp_path / "moved")
        capsys.readouterr()
        for place in (out, moved):
            assert run("train", file, *given, "--out", place, "--cache", tmp_path / "c") == 0
            assert "is finished already" in capsys.readouterr().err
            assert (place / "scores.json").read_text() == before
            assert len(list(place.glob("checkpoint-*"))) == 2

    def test_a_stopped_run_is_moved_and_goes_on(self, folder: Path, tmp_path: Path) -> None:
        file = written(folder, "roberta", "lora", "moved")
        assert run("train", file, "--epochs", "2") == 0
        out = folder / "runs" / "roberta-lora-moved"
        moved = shutil.copytree(out, tmp_path / "moved")
        (moved / "scores.json").unlink()
        shutil.rmtree(moved / "best")
        shutil.rmtree(out)
        assert run("train", file, "--epochs", "2", "--out", moved) == 0
        assert (moved / "best" / "adapter_model.safetensors").is_file() and not out.exists()

    def test_one_run_at_a_time(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = written(folder, "roberta", "lora", "locked")
        with alone_in(folder / "runs" / "roberta-lora-locked"):
            pass
        shutil.rmtree(folder / "runs" / "roberta-lora-locked")
        code = (
            "import sys, time; from pathlib import Path; "
            "from fused_route.training.experiment.folder import alone_in\n"
            "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "runs" / "roberta-lora-locked")],
            stdout=subprocess.PIPE,
        )
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        (folder / "runs" / "roberta-lora-locked" / ".lock").stat()
        assert "is going on" in refused(capsys, "train", file)
        other.kill()
        other.communicate()
        assert run("train", file) == 0  # whoever is killed leaves nothing locked

    def test_what_failed_before_its_first_checkpoint_starts_anew(self, folder: Path) -> None:
        file = written(folder, "roberta", "lora", "anew")
        out = folder / "runs" / "roberta-lora-anew"
        write_recipe(read_recipe(file, ["--lr", "1"]), out)
        assert run("train", file) == 0

    @pytest.mark.parametrize("language", ["roberta", "bart"])
    def test_a_run_that_diverges_is_an_error(
        self, language: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = written(folder, language, "lora", "diverged")
        given = ["--lr", "1e20", "--epochs", "3", "--max_grad_norm", "0"]
        assert "training diverged" in refused(capsys, "train", file, *given)
        assert not is_run(folder / "runs" / f"{language}-lora-diverged")

    def test_no_evaluation_saves_the_last(self, folder: Path) -> None:
        file = written(folder, "roberta", "lora", "no")
        assert run("train", file, "--eval_strategy", "no", "--save_strategy", "no") == 0
        out = folder / "runs" / "roberta-lora-no"
        assert (out / "last").is_dir() and not (out / "best").exists()

    def test_evaluation_and_checkpoints_come_together(self, folder: Path) -> None:
        for kind in ("eval", "save"):
            file = written(folder, "roberta", "lora", kind)
            given = [f"--{kind}_strategy", "steps", f"--{kind}_steps", "2"]
            assert run("train", file, *given) == 0
            out = folder / "runs" / f"roberta-lora-{kind}"
            assert {path.name for path in out.glob("checkpoint-*")} <= {
                f"checkpoint-{step}" for step in range(2, 20, 2)
            } | {"checkpoint-5"}

    def test_another_recipe_needs_another_folder(
        self, runs: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(capsys, "train", written(folder, "roberta"), "--route", "gram")
        assert "adapter.route is 'mul' there, 'gram' here" in line and "--out" in line

    def test_a_folder_with_other_files_is_left_alone(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        file = written(folder, "roberta", "lora", "other")
        assert "holds other files" in refused(capsys, "train", file, "--out", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        line = refused(capsys, "train", file, "--out", tmp_path / "thesis.tex")
        assert "is a file" in line

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that root cannot write")
    def test_a_folder_that_cannot_be_made(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Found by trying, before images are encoded: permissions say that root may."""
        file = written(folder, "roberta", "lora", "nowhere")
        for given in ([], ["--dry-run"]):
            line = refused(capsys, "train", file, "--out", "/proc/run", *given)
            assert "training.output_dir='/proc/run': /proc cannot be written to" in line

    def test_early_stopping(self, folder: Path) -> None:
        file = written(folder, "roberta", "lora", "early")
        given = ["--patience", "1", "--epochs", "9", "--lr", "0"]
        assert run("train", file, *given) == 0
        state = json.loads(
            max((folder / "runs" / "roberta-lora-early").glob("checkpoint-*/trainer_state.json"),
                key=lambda p: int(p.parent.name.split("-")[1])).read_text()
        )  # fmt: skip
        assert state["epoch"] == 2

    def test_tensorboard_is_the_default(self, folder: Path) -> None:
        file = written(folder, "roberta", "lora", "curves")
        told = yaml.safe_load(file.read_text())
        del told["training"]["report_to"]
        file.write_text(yaml.safe_dump(told))
        assert run("train", file) == 0
        assert list((folder / "runs" / "roberta-lora-curves").rglob("events.out.tfevents.*"))


def no_root(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["root"] = str(folder / "nowhere")
    return "nowhere"


def wrong_root(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["root"] = str(folder / "data" / "coco")
    return "v2_OpenEnded_mscoco_train2014_questions.json does not exist"


def no_language(folder: Path, told: dict[str, Any]) -> str:
    told["model"]["language"] = str(folder / "nothing-here")
    return "model.language: "


def no_vision(folder: Path, told: dict[str, Any]) -> str:
    told["model"]["vision"] = str(folder / "models" / "roberta")
    return "vision"


def other_kind(folder: Path, told: dict[str, Any]) -> str:
    told["model"]["language"] = str(folder / "models" / "bart")
    told["model"]["kind"] = "decoder"
    return "is an encoder-decoder"


def no_target(folder: Path, told: dict[str, Any]) -> str:
    told["adapter"]["target_modules"] = ["q_proj"]
    return "target_modules"


def few_answers(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["least"] = 10_000
    return "least=10000"


def no_validation(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["validation"] = None
    told["patience"] = 2
    return "patience=2 needs a validation split"


def no_split(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["train"] = "training"
    return "karpathy-train"


def no_head(folder: Path, told: dict[str, Any]) -> str:
    told["model"] |= {"head": "two-layer", "language": str(folder / "models" / "bart")}
    told["adapter"]["target_modules"] = ["q_proj"]
    return "head"


def too_long(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["max_length"] = 500
    return "has 62 positions"


def withheld(folder: Path, told: dict[str, Any]) -> str:
    told["tasks"]["vqa"]["validation"] = "test-dev"
    return "'test-dev' has no answers"


def no_folder(folder: Path, told: dict[str, Any]) -> str:
    told["training"]["output_dir"] = str(folder / "file" / "run")
    (folder / "file").touch()
    return "file is a file"


def no_tracker(folder: Path, told: dict[str, Any]) -> str:
    told["training"]["report_to"] = ["nobody"]
    return "nobody"


@pytest.mark.parametrize(
    "broken",
    [no_root, wrong_root, no_language, no_vision, other_kind, no_target, few_answers,
     no_validation, no_split, no_head, too_long, withheld, no_folder, no_tracker],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "train --dry-run", "encode"])
def test_what_cannot_be_trained_is_one_line(
    command: str,
    broken: Callable[[Path, dict[str, Any]], str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"{broken.__name__}-{command.replace(' ', '')}"
    file = written(folder, "roberta", "lora", name)
    told = yaml.safe_load(file.read_text())
    message = broken(folder, told)
    file.write_text(yaml.safe_dump(told))
    untried = {"encode": (no_folder, no_tracker), "train --dry-run": (no_folder,)}
    if broken in untried.get(command, ()):
        pytest.skip("encode trains nothing")
    first, *rest = command.split()
    assert message in refused(capsys, first, file, *rest)
    assert not (folder / "runs" / f"roberta-lora-{name}").exists()
