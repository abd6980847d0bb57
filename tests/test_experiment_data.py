"""What an experiment makes of its data: classes, texts that are cut, images that cannot be read."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments import refused, run, save_all, written

from fused_route.training.experiment import cutting
from fused_route.training.experiment.batches import Batches
from fused_route.training.experiment.build import Built, build
from fused_route.training.experiment.cutting import cut_texts
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.recipe_file import read_recipe
from fused_route.training.experiment.run import open_data
from fused_route.training.experiment.tasks import TASKS, Rows, open_rows

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("data"))


def gqa_file(folder: Path, name: str, **task: Any) -> Path:
    """A recipe of a classifier on GQA."""
    path = written(folder, "roberta", "lora", name)
    told = yaml.safe_load(path.read_text())
    root = str(folder / "data" / "gqa")
    told["tasks"] = {
        "gqa": {"layout": "gqa", "root": root, "validation": "val", "test": "testdev", **task}
    }
    path.write_text(yaml.safe_dump(told))
    return path


def opened(path: Path, *overrides: str) -> tuple[Recipe, Any]:
    told = read_recipe(path, overrides)
    return told, open_data(told)


class TestClasses:
    def test_those_of_gqa_are_answers_that_can_be_right(self, folder: Path) -> None:
        file = folder / "data" / "gqa" / "train_balanced_questions.json"
        held = json.loads(file.read_bytes())
        for question, answer in zip(held.values(), ("t-shirt", "two", "the sky"), strict=False):
            question["answer"] = answer
        other = folder / "classes"
        other.mkdir()
        (other / file.name).write_text(json.dumps(held))
        images = {"images": str(folder / "data" / "gqa" / "images")}
        path = gqa_file(folder, "classes", root=str(other), validation=None, **images)
        _, data = opened(path)
        assert {"t-shirt", "two", "the sky"} <= set(data.answers)
        assert set(data.train.samples["gqa"].rows["answer"]) == set(data.answers)


class TestCut:
    def test_texts_are_counted_once_and_said(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file, out = written(folder, "roberta", "lora", "cut"), folder / "runs" / "cut"
        short = ("--tasks.vqa.max_length", "9")
        told, data = opened(file, *short)
        made = build(told, data.answers).batches()
        texts = data.train.samples["vqa"].rows["text"][:]
        expected = sum(made.cut("vqa", texts))
        assert 0 < expected < len(texts) and cut_texts(made, data.train) == {"vqa": expected}
        line = f"tasks.vqa: {expected} of {len(texts)} texts are longer than the 9 tokens"
        for command in (["--dry-run"], []):
            assert run("train", file, *short, "--out", out, *command) == 0
            assert capsys.readouterr().err.count(line) == 1
        asked = ["predict", "--adapter", out, "--image", next(iter(data.images())), "--question"]
        assert run(*asked, "what is this? " * 20) == 0
        assert "the run reads 9 tokens (tasks.vqa.max_length)" in capsys.readouterr().err
        assert run(*asked, "what?") == 0 and "left out" not in capsys.readouterr().err

    def test_few_are_tokenised_at_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of rows that were chosen out of others too."""
        told, data = opened(written(folder, "roberta", "lora", "parts"))
        tasks = {"vqa": replace(told.tasks["vqa"], max_length=9)}
        made = replace(build(told, data.answers).batches(), tasks=tasks)
        samples = data.train.samples["vqa"]
        rows = samples.rows.select([i for i in range(len(samples.rows)) if i % 4])
        expected, lengths = sum(made.cut("vqa", rows["text"][:])), []

        def counted(batches: Batches, name: str, texts: Sequence[str]) -> list[bool]:
            lengths.append(len(texts))
            return cut(batches, name, texts)

        cut = Batches.cut
        monkeypatch.setattr(Batches, "cut", counted)
        monkeypatch.setattr(cutting, "AT_ONCE", 2)
        chosen = Rows({"vqa": replace(samples, rows=rows)})
        assert 0 < expected < len(rows) and cut_texts(made, chosen) == {"vqa": expected}
        assert len(lengths) > 1 and max(lengths) <= 2

    def test_a_decoder_without_room_is_refused(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = written(folder, "gpt2", "lora", "room")
        given = ("--tasks.caption.prompt", "a picture of", "--max_length", "7")
        assert "tasks.caption: max_length=7" in refused(capsys, "train", file, *given)


class TestPositions:
    @pytest.mark.parametrize(
        ("language", "length", "features", "visual"),
        [
            ("roberta", 62, ("--visual_tokens", "none"), 0),
            ("roberta", 61, ("--features", "pooled"), 1),
            ("roberta", 57, ("--features", "tokens"), 5),
            ("gpt2", 59, ("--features", "tokens"), 5),
            ("bart", 54, ("--features", "tokens"), 10),  # the two images of NLVR2
        ],
    )
    def test_visual_tokens_take_some(
        self, language: str, length: int, features: tuple[str, str], visual: int, folder: Path
    ) -> None:
        name = {"roberta": "vqa", "gpt2": "caption", "bart": "nlvr2"}[language]
        file = written(folder, language, "lora", "positions")

        def made(length: int) -> Built:
            told = read_recipe(file, [*features, f"--tasks.{name}.max_length={length}"])
            return build(told, ("a", "b") if language == "roberta" else ())

        made(length)
        beside = f" beside {visual} visual tokens" if visual else ""
        says = f"tasks.{name}: max_length={length + 1} and max_new_tokens=[0-9]+{beside}, but"
        with pytest.raises(ValueError, match=says):
            made(length + 1)


class TestScores:
    def test_unbalanced_questions_of_gqa_are_answered_and_not_counted(self, folder: Path) -> None:
        told, _ = opened(gqa_file(folder, "balanced"))
        rows = open_rows(told, "val-all", "evaluate").samples["gqa"]
        table = rows.rows.to_dict()
        balanced = set(open_rows(told, "val", "evaluate").samples["gqa"].rows["id"])
        pairs = list(zip(table["id"], table["answer"], strict=True))
        assert 0 < len(balanced) < len(pairs)
        right = {key: answer if key in balanced else "wrong" for key, answer in pairs}
        found = TASKS["gqa"].score(right, rows, told.tasks["gqa"])
        assert found.main == 1.0 and set(found.each) == balanced
        assert set(found.scores) == {"accuracy", "accuracy/query", "accuracy/verify"}
