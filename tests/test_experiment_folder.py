"""What a run remembers of how it began, so that no command goes on with something else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from experiments import refused, run, save_all, written
from safetensors.torch import load_file, save_file

from fused_route.training.data import row_cache
from fused_route.training.data.samples import Samples
from fused_route.training.encoders import encoder_of
from fused_route.training.experiment.begun import begun, rows_digest
from fused_route.training.experiment.folder import open_run
from fused_route.training.experiment.pretrained import load_tower
from fused_route.training.experiment.tasks import Rows
from fused_route.training.experiment.trainer import ExperimentTrainer

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("remembered"))


def without_pooler(folder: Path, name: str = "vit-no-pooler") -> Path:
    """The tower of the tests' recipes, as many on the hub are: without weights for pooling."""
    tower = shutil.copytree(folder / "models" / "vit", folder / "models" / name)
    weights = load_file(tower / "model.safetensors")
    kept = {key: t for key, t in weights.items() if "pooler" not in key}
    assert len(kept) < len(weights)
    save_file(kept, tower / "model.safetensors", {"format": "pt"})
    return tower


class TestTowerWithoutPooling:
    def test_every_process_has_the_same_layer(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Whatever was drawn before; and what is drawn after is what it would have been."""
        tower = str(without_pooler(folder))
        keys = set()
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            made, processor = load_tower(tower)
            assert torch.equal(torch.get_rng_state(), before)
            keys.add(encoder_of(made, processor, "pooled").key)
        assert len(keys) == 1
        assert "a random layer, drawn from seed 0 whatever the run's" in capsys.readouterr().err

    def test_a_run_is_asked_with_the_layer_it_was_trained_with(self, folder: Path) -> None:
        tower = str(without_pooler(folder, "vit-asked"))
        file = written(folder, "roberta", "lora", "pooler")
        cache = folder / "cache-pooler"
        assert run("train", file, "--vision", tower, "--cache", cache) == 0
        torch.manual_seed(5)
        built = open_run(folder / "runs" / "roberta-lora-pooler")
        assert built.cache is not None and len(built.cache) > 0
        assert len(list((cache / "features").iterdir())) == 1


def stopped(folder: Path, name: str, *given: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a run that was interrupted behind its first checkpoint."""
    file = written(folder, "roberta", "lora", name)
    save = ExperimentTrainer._save_checkpoint

    def save_and_stop(self: ExperimentTrainer, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExperimentTrainer, "_save_checkpoint", save_and_stop)
        assert run("train", file, "--epochs", "2", *given) == 130
    return file


def other_weights(model: Path, to: Path) -> Path:
    """A copy of a model's folder with other weights of the same names and shapes."""
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    changed = {k: t + 0.1 if t.is_floating_point() else t for k, t in weights.items()}
    save_file(changed, to / "model.safetensors", {"format": "pt"})
    return to


class TestModels:
    @pytest.mark.parametrize(("part", "kind"), [("vision", "vit"), ("language", "roberta")])
    def test_other_weights_are_refused(
        self,
        part: str,
        kind: str,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Of a run that goes on and of one that is asked; the same weights elsewhere are not."""
        model = folder / "models" / kind
        file = stopped(folder, f"models-{part}", monkeypatch=monkeypatch)
        other = other_weights(model, tmp_path / "other")
        line = refused(capsys, "train", file, "--epochs", "2", f"--{part}", other)
        assert f"model.{part}: " in line and "other weights" in line
        moved = shutil.copytree(model, tmp_path / "moved")
        assert run("train", file, "--epochs", "2", f"--{part}", moved) == 0
        out = folder / "runs" / f"roberta-lora-models-{part}"
        line = refused(capsys, "eval", out, f"--{part}", other)
        assert f"model.{part}: " in line and "best was trained with" in line
        assert run("eval", out, f"--{part}", model) == 0

    def test_another_image_processor(
        self,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Also a library's version may change it: it is said."""
        file = stopped(folder, "processor", monkeypatch=monkeypatch)
        tower = shutil.copytree(folder / "models" / "vit", tmp_path / "tower")
        told = json.loads((tower / "preprocessor_config.json").read_text())
        (tower / "preprocessor_config.json").write_text(json.dumps({**told, "do_rescale": False}))
        assert run("train", file, "--dry-run", "--epochs", "2", "--vision", tower) == 0
        assert "image processor is another than in training" in capsys.readouterr().err
        assert run("train", file, "--epochs", "2", "--vision", tower) == 0
        assert "image processor is another than in training" in capsys.readouterr().err
        for kept in (folder / "runs" / "roberta-lora-processor").glob("*/models.json"):
            told = json.loads(kept.read_text())
            kept.write_text(json.dumps({**told, "preprocessing": "that of before"}))
        assert run("eval", folder / "runs" / "roberta-lora-processor", "--vision", tower) == 0
        assert "image processor is another than in training" in capsys.readouterr().err

    def test_runs_without_the_record_go_on(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those of versions that kept none."""
        file = stopped(folder, "old", monkeypatch=monkeypatch)
        out = folder / "runs" / "roberta-lora-old"
        (out / "begun.json").unlink()
        for kept in out.rglob("models.json"):
            kept.unlink()
        other = other_weights(folder / "models" / "roberta", tmp_path / "other")
        assert run("train", file, "--epochs", "2", "--language", other) == 0
        for kept in out.rglob("models.json"):
            kept.unlink()
        assert run("eval", out) == 0


def with_annotations(root: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """VQAv2's training annotations with something changed."""
    for path in root.glob("v2_mscoco_*_annotations.json"):
        told = json.loads(path.read_text())
        change(told["annotations"])
        path.write_text(json.dumps(told))


class TestRows:
    def test_moved_data_are_the_same_and_changed_ones_not(
        self,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = stopped(folder, "rows", monkeypatch=monkeypatch)
        data = folder / "data" / "vqav2"
        moved, other = shutil.copytree(data, tmp_path / "m"), shutil.copytree(data, tmp_path / "o")

        def another_answer(annotations: list[dict[str, Any]]) -> None:
            for answer in annotations[0]["answers"]:
                answer["answer"] = "something else"

        with_annotations(other, another_answer)
        for command in (["train"], ["train", "--dry-run"]):
            line = refused(capsys, *command, file, "--epochs", "2", "--root", other)
            assert "the train split of tasks.vqa has 80 rows, but not the same ones" in line
        assert run("train", file, "--epochs", "2", "--root", moved) == 0

    def test_another_number_of_rows(
        self,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        given = ["--broken", "skip"]
        file = stopped(folder, "fewer", *given, monkeypatch=monkeypatch)
        other = shutil.copytree(folder / "data" / "vqav2", tmp_path / "other")

        def unanswered(annotations: list[dict[str, Any]]) -> None:
            annotations[0]["answers"] = []

        with_annotations(other, unanswered)
        line = refused(capsys, "train", file, "--epochs", "2", *given, "--root", other)
        assert "tasks.vqa has 80 rows there, 78 here" in line

    def test_images_that_broke_in_between(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = shutil.copytree(folder / "data" / "vqav2", folder / "data" / "broke")
        given = ["--broken", "skip", "--root", root, "--cache", folder / "cache-broke"]
        file = stopped(folder, "broke", *given, monkeypatch=monkeypatch)
        image = next(root.rglob("*train2014*.jpg"))
        image.write_bytes(b"no image")
        line = refused(capsys, "train", file, "--epochs", "2", *given)
        assert "tasks.vqa has 80 rows there, 76 here" in line

    @pytest.mark.parametrize("old", [False, True])
    def test_classes_keep_their_meaning(
        self,
        old: bool,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A file of answers in another order; also for runs that are older than the record."""
        answers = ["red", "blue", "yes", "no"]
        kept, turned = tmp_path / "kept.json", tmp_path / "turned.json"
        kept.write_text(json.dumps(answers))
        turned.write_text(json.dumps([*answers[:2], *reversed(answers[2:])]))
        name = f"classes-{old}"
        file = stopped(folder, name, "--tasks.vqa.answers", kept, monkeypatch=monkeypatch)
        if old:
            (folder / "runs" / f"roberta-lora-{name}" / "begun.json").unlink()
        line = refused(capsys, "train", file, "--epochs", "2", "--tasks.vqa.answers", turned)
        assert "class 2 is 'yes' there, 'no' here" in line
        assert run("train", file, "--epochs", "2", "--tasks.vqa.answers", kept) == 0

    def test_rows_are_known_by_their_values(self) -> None:
        """However they are stored: cut into other parts, chosen by an index, or in another file."""
        columns: dict[str, Any] = {
            "id": ["1", "2", "3"],
            "text": ["é", "", "xyz"],
            "references": [["a", "bc"], [], ["ab", "c"]],
        }
        rows = datasets.Dataset.from_dict(columns)
        again = datasets.concatenate_datasets([rows.select([0]), rows.select([1, 2])])
        chosen = rows.select([2, 1, 0]).select([2, 1, 0])
        assert len({rows_digest(of) for of in (rows, again, chosen)}) == 1
        assert rows_digest(rows.select([1, 0, 2])) != rows_digest(rows)
        other = {**columns, "references": [["ab", "c"], [], ["ab", "c"]]}
        assert rows_digest(datasets.Dataset.from_dict(other)) != rows_digest(rows)

    def test_the_kind_counts_only_where_rows_are_scored(self, tmp_path: Path) -> None:
        row = {"id": ["1"], "text": ["is it?"], "answer": ["no"]}

        def known(kind: str, **other: Any) -> Any:
            rows = datasets.Dataset.from_dict({**row, "kind": [kind], **other})
            samples = Rows({"gqa": Samples("gqa", rows, tmp_path, {})})
            return begun({}, samples, samples, 1)["rows"]

        first, other = known("verify"), known("query")
        assert first["train"] == other["train"] and first["validation"] != other["validation"]
        assert first["train"] != known("verify", answer=["yes"])["train"]

    @pytest.mark.parametrize("near", [True, False])
    def test_chosen_rows_are_gathered_at_once(
        self, near: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that lie near each other, over the parts of a file, without a table of each."""
        parts = [
            {"text": [f"{part}-{i}" * (i % 3) for i in range(40)], "references": [["a"], []] * 20}
            for part in range(3)
        ]
        whole = datasets.concatenate_datasets([datasets.Dataset.from_dict(p) for p in parts])
        chosen = [i for i in range(len(whole)) if i % 7] if near else [119, 3, 64, 64, 0, 118]
        expected = datasets.Dataset.from_dict(whole[chosen])
        rows, gathered = whole.select(chosen), datasets.table.Table.fast_gather
        calls: list[Any] = []

        def counted(self: Any, indices: Any) -> Any:
            calls.append(indices)
            return gathered(self, indices)

        monkeypatch.setattr(datasets.table.Table, "fast_gather", counted)
        monkeypatch.setattr(row_cache, "NEAR", 4)
        assert rows_digest(rows) == rows_digest(expected) and not calls
        made = list(row_cache.tables(rows, 5))
        assert bool(calls) != near and {len(table) for table in made[:-1]} == {5}
        assert pa.concat_tables(made).to_pydict() == expected.to_dict()


def test_as_many_processes_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stopped(folder, "processes", monkeypatch=monkeypatch)
    path = folder / "runs" / "roberta-lora-processes" / "begun.json"
    told = json.loads(path.read_text())
    assert told["processes"] == 1
    path.write_text(json.dumps({**told, "processes": 2}))
    line = refused(capsys, "train", file, "--epochs", "2")
    assert "was begun by 2 processes, and this is one of 1" in line
    path.write_text("[]")
    assert "begun.json holds no mapping" in refused(capsys, "train", file, "--epochs", "2")


@pytest.mark.parametrize("name", ["recipe.yaml", "begun.json"])
def test_a_full_disk_at_the_first_files_leaves_a_folder_to_go_on_in(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(folder, "roberta", "lora", f"first-{name}")
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left on device" in refused(capsys, "train", file)
    out = folder / "runs" / f"roberta-lora-first-{name}"
    (out / ".recipe.yaml-0123.partial").touch()  # as a kill leaves it
    assert run("train", file) == 0


def test_classes_may_be_named_again_by_their_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept.json").write_text(json.dumps(["red", "blue", "yes", "no"]))
    file = written(folder, "roberta", "lora", "relative")
    assert run("train", file, "--tasks.vqa.answers", "kept.json") == 0
    out = folder / "runs" / "roberta-lora-relative"
    assert run("eval", out, "--tasks.vqa.answers", "kept.json") == 0
