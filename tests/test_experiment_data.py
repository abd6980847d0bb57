"""What an experiment makes of its data: classes, texts that are cut, images that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments import save_all, written

from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.recipe_file import read_recipe
from fused_route.training.experiment.run import open_data

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
