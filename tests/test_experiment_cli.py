"""eval, predict, generate, encode and doctor: what they print, write and refuse."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiments import refused, run, save_all, written
from PIL import Image
from safetensors.torch import load_file, save_file

from fused_route.training import cli
from fused_route.training.experiment import doctor

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


class TestEval:
    def test_answers_are_in_the_form_of_the_official_evaluations(
        self, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("eval", runs["bart"], "--to", tmp_path) == 0
        vqa = json.loads((tmp_path / "answers-vqa-test-karpathy-test-first12.json").read_text())
        assert {type(x) for row in vqa for x in row.values()} == {int, str}
        assert set(vqa[0]) == {"question_id", "answer"}
        captions = json.loads(
            (tmp_path / "answers-caption-test-karpathy-test-first12.json").read_text()
        )
        assert set(captions[0]) == {"image_id", "caption"}
        rows = list(
            csv.reader((tmp_path / "answers-nlvr2-test-test1-first12.csv").read_text().splitlines())
        )
        assert {row[1] for row in rows} <= {"True", "False"} and rows[0][0].startswith("test1-")
        assert "scores-test-karpathy-test-test1-first12.json" in capsys.readouterr().out

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

    def test_tasks_with_answers_are_scored_beside_one_without(
        self, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["--to", tmp_path, "--tasks.vqa.test", "test-dev"]
        assert run("eval", runs["bart"], *given) == 0
        scores = json.loads(
            (tmp_path / "scores-test-test-dev-test1-karpathy-test-first12.json").read_text()
        )
        assert {name.partition("_")[0] for name in scores} == {"nlvr2", "caption", "score"}
        mains = scores["nlvr2_accuracy"], scores["caption_cider_regex"]
        assert scores["score"] == pytest.approx(sum(mains) / 2)
        assert "no answers to score vqa by: 'score' is of nlvr2, caption" in capsys.readouterr().err
        submitted = tmp_path / "answers-vqa-test-test-dev-first12.json"
        before = submitted.read_bytes()
        assert run("eval", runs["bart"], "--to", tmp_path, "--task", "vqa") == 0
        assert run("eval", runs["bart"], "--to", tmp_path) == 0
        assert submitted.read_bytes() == before

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
        assert json.loads((tmp_path / "scores-validation-karpathy-val.json").read_text()) == logged

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--split", "tests"], "split of"),
            (["--task", "captions"], "'captions' is not in the recipe"),
            (["--tasks.vqa.root", "nowhere"], "nowhere"),
            (["--model.language", "nowhere"], "model.language"),
            (["--rout", "gram"], "--rout is no setting"),
            (["--tasks.vqa.answers", "a.json"], "the classes that it was trained with"),
            (["--tasks.vqa.least", "2"], "the classes that it was trained with"),
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
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == f"next: fused-route eval {runs[language]}"
        lines = printed.out.splitlines()
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
            printed = capsys.readouterr()
            assert printed.err.count(f"next: fused-route eval {best}\n") == 3
            return tuple(printed.out.splitlines())

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
        given = ["--adapter", runs["gpt2"], "--image", picture, "--tokens", "5000"]
        assert "has 64 positions" in refused(capsys, "generate", *given)
        with pytest.raises(SystemExit):
            run("generate", "--adapter", runs["gpt2"], "--image", picture, "--beams", "0")
        assert "at least 1" in capsys.readouterr().err


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

    def test_every_missing_file_and_the_answers(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = written(folder, "roberta", "lora", "lacking")
        data = shutil.copytree(folder / "data" / "vqav2", tmp_path / "vqav2")
        gone = [data / "dataset_coco.json", data / "v2_mscoco_val2014_annotations.json"]
        for path in gone:
            path.unlink()
        given = ["doctor", file, "--tasks.vqa.root", data]
        assert run(*given, "--tasks.vqa.answers", tmp_path / "none.json") == 1
        out = capsys.readouterr().out
        for path in (*gone, tmp_path / "none.json"):
            assert sum(f"{path} " in line for line in out.splitlines()) == 1, path
        assert run(*given[:2], "--answers_from", "train+vall") == 1
        assert "got 'vall'" in capsys.readouterr().out
        assert run(*given[:2], "--answers_from", "test", "--tasks.vqa.test", "null") == 1
        assert "answers_from=test, but test is null" in capsys.readouterr().out

    def test_the_command_for_several_gpus_runs(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        cuda = {"is_available": True, "device_count": 2, "get_device_name": "a GPU"}
        cuda |= {"mem_get_info": (0, 2**36), "get_device_capability": (9, 0)}
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        (line,) = [str(found) for found in doctor._devices() if "torchrun" in str(found)]
        words = line.split()
        module = words[words.index("-m") : words.index("train") + 1]
        done = subprocess.run(
            [sys.executable, *module, "no/such"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and "recipe 'no/such' is no file" in done.stderr


def test_a_dry_run_says_what_training_would_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = written(folder, "bart", "lora", "dry"), tmp_path / "run"
    given = ["train", file, "--out", out, "--batch_size", "5", "--epochs", "1.5"]
    given += ["--gradient_accumulation_steps", "2", "--sampling", "balanced"]

    def lines(*more: str) -> list[str]:
        capsys.readouterr()
        assert run(*given, "--dry-run", *more) == 0
        return [x for x in capsys.readouterr().out.splitlines() if x.startswith(("run:", "steps:"))]

    run_line, steps = lines()
    assert run_line == f"run: new, in {out}" and not out.exists()
    assert run(*given) == 0
    done = json.loads((out / "history.json").read_text())["steps"]
    assert steps.startswith(f"steps: {done:,}, ")
    assert lines()[0] == f"run: {out} is finished already, nothing would be trained"
    (out / "scores.json").unlink()
    assert lines()[0] == f"run: goes on from {out / f'checkpoint-{done}'}"
    assert "is a run of another recipe" in refused(capsys, *given, "--dry-run", "--lr", "1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    given[3] = tmp_path / "other"
    assert "holds other files" in refused(capsys, *given, "--dry-run")


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
    images[2].write_bytes(b"no image")  # since they were looked at; its folder is as it was
    given[-1] = tmp_path / "again"
    assert run("train", file, *given, "--skip-broken") == 0
    err = capsys.readouterr().err
    assert "tasks.vqa: left out 4 of 72 rows: their images cannot be read any more" in err
    scored = ["eval", tmp_path / "again", "--skip-broken", "--to", tmp_path / "to"]
    assert run(*scored) == 0
    for image in (data / "val2014").iterdir():
        image.write_bytes(b"no image")
    line = refused(capsys, *scored)
    assert "whose images cannot be read; none is left" in line


def test_a_process_ends_its_group_and_a_call_leaves_its_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of one that is left to the interpreter's exit abort the process now and then."""
    distributed = torch.distributed
    at = f"file://{tmp_path / 'group'}"
    distributed.init_process_group("gloo", init_method=at, rank=0, world_size=1)
    try:
        assert run("doctor") == 0 and distributed.is_initialized()
        monkeypatch.setattr("sys.argv", ["fused-route", "doctor", "no/such"])
        assert cli.command() == 2 and distributed.is_initialized()
        monkeypatch.setattr("sys.argv", ["fused-route", "doctor"])
        assert cli.command() == 0 and not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
