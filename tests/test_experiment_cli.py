"""The subcommands of experiments through the command line: what they print, write and refuse."""

import csv
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
from experiments import save_all, written
from PIL import Image
from safetensors.torch import load_file, save_file

from fused_route.training import cli
from fused_route.training.experiment.folder import alone_in, is_run, write_recipe
from fused_route.training.experiment.recipe_file import read_recipe

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """A trained run of each setting."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        for language in ("roberta", "gpt2", "bart"):
            assert cli.main(["train", str(written(folder, language))]) == 0
            found[language] = folder / "runs" / f"{language}-lora-recipe"
    return found


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends with status 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fused-route: error")]
    assert len(lines) == 1
    return lines[0]


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


class TestEval:
    def test_answers_are_in_the_form_of_the_official_evaluations(
        self, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("eval", runs["bart"], "--to", tmp_path) == 0
        vqa = json.loads((tmp_path / "answers-vqa-test-first12.json").read_text())
        assert {type(x) for row in vqa for x in row.values()} == {int, str}
        assert set(vqa[0]) == {"question_id", "answer"}
        captions = json.loads((tmp_path / "answers-caption-test-first12.json").read_text())
        assert set(captions[0]) == {"image_id", "caption"}
        rows = list(
            csv.reader((tmp_path / "answers-nlvr2-test-first12.csv").read_text().splitlines())
        )
        assert {row[1] for row in rows} <= {"True", "False"} and rows[0][0].startswith("test1-")
        assert "scores-test-first12.json" in capsys.readouterr().out

    def test_one_task_and_split(self, runs: dict[str, Path], tmp_path: Path) -> None:
        given = ["--split", "testdev", "--task", "gqa", "--to", tmp_path]
        assert run("eval", runs["bart"], *given) == 0
        rows = json.loads((tmp_path / "answers-gqa-testdev-gqa-first12.json").read_text())
        assert set(rows[0]) == {"questionId", "prediction"}
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "answers-gqa-testdev-gqa-first12.json", "scores-testdev-gqa-first12.json",
        ]  # fmt: skip

    def test_a_split_without_answers_is_answered(
        self, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("eval", runs["roberta"], "--split", "test-dev", "--to", tmp_path) == 0
        assert "evaluation server" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["answers-vqa-test-dev.json"]

    def test_how_training_was_watched_does_not_matter(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Evaluated by steps, from another folder, which stays as it is."""
        file = written(folder, "roberta", "lora", "steps")
        steps = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps"]
        assert run("train", file, *steps, "--save_steps", "2", "--report_to", "tensorboard") == 0
        out = folder / "runs" / "roberta-lora-steps"
        files = sorted(out.rglob("*"))
        monkeypatch.chdir(tmp_path)
        assert run("eval", out, "--to", tmp_path / "found") == 0
        assert sorted(out.rglob("*")) == files
        assert [path.name for path in tmp_path.iterdir()] == ["found"]

    def test_scores_are_those_of_training(self, runs: dict[str, Path], tmp_path: Path) -> None:
        assert run("eval", runs["roberta"], "--split", "validation", "--to", tmp_path) == 0
        logged = json.loads((runs["roberta"] / "scores.json").read_text())["validation"]
        assert json.loads((tmp_path / "scores-validation.json").read_text()) == logged

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--split", "tests"], "split of"),
            (["--task", "captions"], "'captions' is not in the recipe"),
            (["--tasks.vqa.root", "nowhere"], "nowhere"),
            (["--model.language", "nowhere"], "model.language"),
            (["--rout", "gram"], "--rout is no setting"),
            (["--rank", "5"], "--adapter.r=5: the run was trained with 4"),
            (["--alpha", "9"], "another function"),
            (["--visual_tokens", "none"], "another function"),
        ],
    )
    def test_refused(
        self,
        given: list[str],
        message: str,
        runs: dict[str, Path],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert message in refused(capsys, "eval", runs["roberta"], *given)

    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "holds no adapter" in refused(capsys, "eval", tmp_path)
        assert "is no folder" in refused(capsys, "eval", tmp_path / "nothing")

    @pytest.mark.parametrize(
        "damaged", ["recipe.yaml", "answers.json", "adapter_model.safetensors"]
    )
    def test_damaged(
        self,
        damaged: str,
        runs: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        copy = shutil.copytree(runs["roberta"] / "best", tmp_path / "copy")
        (copy / damaged).write_bytes((copy / damaged).read_bytes()[:40])
        assert str(copy) in refused(capsys, "eval", copy, "--split", "validation")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


class TestPredict:
    @pytest.mark.parametrize("language", ["roberta", "bart"])
    def test_answers(
        self,
        language: str,
        runs: dict[str, Path],
        picture: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        given = ["--image", picture, "--question", "what color is it?"]
        assert run("predict", "--adapter", runs[language], *given) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (5 if language == "roberta" else 1)
        if language == "roberta":
            shares = [float(line.rpartition("(")[2].rstrip("%)")) for line in lines]
            assert shares == sorted(shares, reverse=True)

    def test_each_task_answers_with_its_own_modules(
        self, folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The adapter of one task is another's, and the answers to that alone change."""
        file = written(folder, "bart", "lora", "own")
        given = ["--modules", "per-task", "--lr", "0.1", "--epochs", "3"]
        assert run("train", file, *given) == 0
        best = folder / "runs" / "bart-lora-own" / "best"

        def said() -> tuple[str, ...]:
            capsys.readouterr()
            image = ["--adapter", best, "--image", picture]
            assert run("predict", *image, "--question", "what?", "--task", "vqa") == 0
            assert run("predict", *image, "--question", "what?", "--task", "gqa") == 0
            assert run("generate", *image) == 0
            return tuple(capsys.readouterr().out.splitlines())

        before = said()
        name = "adapter_model.safetensors"
        other = load_file(best / "gqa" / name)
        generator = torch.Generator().manual_seed(0)
        for key, tensor in other.items():
            other[key] = torch.randn(tensor.shape, generator=generator)
        save_file(other, best / "caption" / name, metadata={"format": "pt"})
        after = said()
        assert after[:2] == before[:2] and after[2] != before[2]

    def test_two_images(
        self, runs: dict[str, Path], picture: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["--task", "nlvr2", "--image", picture, picture, "--question", "both are red"]
        assert run("predict", "--adapter", runs["bart"], *given) == 0
        assert capsys.readouterr().out.strip() in ("true", "false")
        line = refused(capsys, "predict", "--adapter", runs["bart"], *given[:3], *given[4:])
        assert "task nlvr2 is about 2, got 1" in line

    def test_refused(
        self, runs: dict[str, Path], picture: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = ["--image", picture, "--question", "what?"]
        line = refused(capsys, "predict", "--adapter", runs["bart"], *asked, "--task", "caption")
        assert "vqa, gqa, nlvr2 of questions" in line
        assert "none of questions" in refused(capsys, "predict", "--adapter", runs["gpt2"], *asked)
        asked[1] = picture.with_name("none.png")
        assert "none.png does not exist" in refused(
            capsys, "predict", "--adapter", runs["roberta"], *asked
        )
        line = refused(
            capsys, "predict", "--adapter", runs["roberta"], "--image", picture, "--question", " "
        )
        assert "question is empty" in line


class TestGenerate:
    @pytest.mark.parametrize("language", ["gpt2", "bart"])
    def test_a_caption_for_each_image(
        self,
        language: str,
        runs: dict[str, Path],
        picture: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        given = ["--image", picture, picture, "--beams", "3", "--tokens", "4"]
        assert run("generate", "--adapter", runs[language], *given) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith(f"{picture}\t")

    def test_refused(
        self, runs: dict[str, Path], picture: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(capsys, "generate", "--adapter", runs["roberta"], "--image", picture)
        assert "none of captions" in line
        with pytest.raises(SystemExit):
            run("generate", "--adapter", runs["gpt2"], "--image", picture, "--beams", "0")
        assert "at least 1" in capsys.readouterr().err


class TestEncode:
    def test_encodes_what_training_then_reads(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = written(folder, "roberta", "lora", "encoded")
        cache = ["--cache", tmp_path / "cache"]
        assert run("encode", file, *cache, "--dtype", "float16", "--workers", "0", "--verify") == 0
        first = capsys.readouterr().out
        assert "0 images encoded" not in first and f"next: fused-route train {file}" in first
        assert run("encode", file, *cache) == 0
        assert capsys.readouterr().out.startswith("0 images encoded")
        assert run("train", file, *cache) == 0
        assert "encoding" not in capsys.readouterr().err

    def test_nothing_to_encode(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = written(folder, "roberta", "lora", "tower")
        line = refused(capsys, "encode", file, "--features_from", "tower")
        assert "keeps no features" in line


class TestDoctor:
    def test_the_machine(self, capsys: pytest.CaptureFixture[str]) -> None:
        status = run("doctor")
        out = capsys.readouterr().out
        assert status == 0 and "Python 3." in out and "next: fused-route doctor" in out
        assert "java is not found" in out  # PATH is empty here

    def test_a_recipe(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("doctor", written(folder, "bart", "lora", "doctor")) == 0
        out = capsys.readouterr().out
        for told in ("vqav2 karpathy-train", "gqa testdev", "nlvr2 test1", "model.language"):
            assert f"ok       {told}" in out or f": {told}" in out, told

    def test_problems(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = written(folder, "roberta", "lora", "ill")
        given = ["--tasks.vqa.root", folder / "data" / "gqa", "--language", folder]
        assert run("doctor", file, *given) == 1
        captured = capsys.readouterr()
        assert "does not exist" in captured.out and "without config.json" in captured.out
        assert "to do before training" in captured.err


def test_broken_images_are_refused_or_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder / "data" / "vqav2", tmp_path / "vqav2")
    images = sorted((data / "train2014").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"no image")
    file = written(folder, "roberta", "lora", "broken")
    given = ["--tasks.vqa.root", data, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    assert images[0].name in refused(capsys, "train", file, *given)
    assert run("train", file, *given, "--skip-broken") == 0
    err = capsys.readouterr().err
    assert "missing image" in err and "unreadable image" in err
