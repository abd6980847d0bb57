"""Data sets in their official layouts, as rows of one form."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.table import MemoryMappedTable
from official_layouts import MAKERS

from fused_route.training.data import json_files, row_cache, vqav2
from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.data.samples import Source, absent, open_samples

TRAIN = "train2014/COCO_train2014_000000000{:03d}.jpg"
VAL = "val2014/COCO_val2014_000000000{:03d}.jpg"
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
COLUMNS = ["id", "images", "text", "answer", "references", "kind"]
Make = Callable[[str], Source]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("layouts")
    made = {name: make(folder / name, 12) for name, make in MAKERS.items()}
    return {"easy_vqa": Source("easy_vqa")} | made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a data set of a few images, which a test may damage."""
    return lambda name: MAKERS[name](tmp_path / name, 4)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file of VQAv2 is read from its beginning."""
    counts: Counter[str] = Counter()

    def counted(path: Path, key: str) -> Iterator[Any]:
        counts[path.name] += 1
        return json_files.items(path, key)

    monkeypatch.setattr(vqav2, "items", counted)
    return counts


def captions(shows: str) -> list[str]:
    return [
        f"a {shows}",
        f"there is a {shows}",
        f"a {shows} on white ground",
        f"the picture shows a {shows}",
        f"one {shows}.",
    ]


def pair(folder: str, name: str) -> list[str]:
    return [f"{folder}/{name}-img0.png", f"{folder}/{name}-img1.png"]


RED, WOMAN = "red triangle", "woman in a navy uniform"
NINE = ["1"] * 8 + ["one", "1"]
# (layout, split, role, number of rows, place of one of them, that row)
ROWS: list[tuple[str, str, str, int, int, tuple[Any, ...]]] = [
    ("easy_vqa", "train", "train", 38_575, 1, (
        "train-1", ["data/train/images/0.png"], "what color is the shape?", "blue", ["blue"],
        "colour")),
    ("easy_vqa", "test", "evaluate", 9_673, 0, (
        "test-0", ["data/test/images/0.png"], "what is the red shape?", "triangle", ["triangle"],
        "shape")),
    ("easy_vqa", "fit", "train", 36_151, 36_150, (
        "train-36150", ["data/train/images/3749.png"], "is a yellow shape present?", "no", ["no"],
        "yes/no")),
    ("easy_vqa", "validation", "evaluate", 2_424, 0, (
        "train-36151", ["data/train/images/3750.png"], "what is the color of the shape?", "teal",
        ["teal"], "colour")),
    ("vqav2", "train", "train", 48, 1, (
        "9001", [TRAIN.format(9)], "how many people are there?", "1", NINE, "number")),
    ("vqav2", "val", "evaluate", 96, 0, (
        "42000", [VAL.format(42)], "what is the person wearing?", "uniform", ["uniform"] * 10,
        "other")),
    ("vqav2", "test", "evaluate", 48, 0, (
        "262312000", ["test2015/COCO_test2015_000000262312.jpg"],
        "does the image contain a rectangle?", "", [], "")),
    ("vqav2", "test-dev", "train", 24, 23, (
        "262347003", ["test2015/COCO_test2015_000000262347.jpg"], "is there not a gray shape?", "",
        [], "")),
    ("vqav2", "karpathy-train", "train", 80, 48, (
        "42000", [VAL.format(42)], "what is the person wearing?", "uniform", ["uniform"] * 10,
        "other")),
    ("vqav2", "karpathy-val", "train", 32, 1, (
        "49001", [VAL.format(49)], "what is the color of the triangle?", "red",
        [*["red"] * 6, "not sure", "red", "red", "unknown"], "other")),
    ("vqav2", "karpathy-test", "evaluate", 32, 0, (
        "56000", [VAL.format(56)], "is there a rectangle?", "no", ["yes", *["no"] * 9], "yes/no")),
    ("coco", "karpathy-train", "train", 100, 61, (
        "421", [VAL.format(42)], "", f"there is a {WOMAN}", [f"there is a {WOMAN}"], "")),
    ("coco", "karpathy-train", "evaluate", 20, 12, (
        "42", [VAL.format(42)], "", "", captions(WOMAN), "")),
    ("coco", "karpathy-val", "evaluate", 8, 0, (
        "49", [VAL.format(49)], "", "", captions(RED), "")),
    ("coco", "karpathy-test", "train", 40, 0, (
        "560", [VAL.format(56)], "", "a blue triangle", ["a blue triangle"], "")),
    ("coco", "train2014", "train", 60, 13, (
        "161", [TRAIN.format(16)], "", "there is a blue rectangle", ["there is a blue rectangle"],
        "")),
    ("coco", "val2014", "evaluate", 24, 1, ("49", [VAL.format(49)], "", "", captions(RED), "")),
    ("coco", "train2017", "train", 60, 59, (
        "864", ["train2017/000000000086.jpg"], "", "one blue circle.", ["one blue circle."], "")),
    ("coco", "val2017", "evaluate", 24, 0, (
        "42", ["val2017/000000000042.jpg"], "", "", captions(WOMAN), "")),
    ("gqa", "train", "train", 48, 0, (
        "20000000", ["2300000.jpg"], "Does the image contain a rectangle?", "yes", ["yes"],
        "verify")),
    ("gqa", "val", "evaluate", 48, 3, (
        "20000663", ["2300132.jpg"], "What is the gray shape?", "triangle", ["triangle"],
        "query")),
    ("gqa", "testdev", "evaluate", 48, 47, (
        "20002483", ["2300385.jpg"], "Is there not a gray shape in the image?", "no", ["no"],
        "verify")),
    ("gqa", "test", "evaluate", 48, 2, (
        "20002522", ["2300396.jpg"], "What shape does the image contain?", "", [], "")),
    ("gqa", "train-all", "train", 48, 5, (
        "20000013", ["2300000.jpg"], "What color is the shape?", "blue", ["blue"], "query")),
    ("gqa", "val-all", "train", 96, 95, (
        "20001859", ["2300253.jpg"], "Is there not a red shape in the image?", "yes", ["yes"],
        "verify (unbalanced)")),
    ("nlvr2", "train", "train", 24, 2, (
        "train-100-1-0", pair("images/train/8", "train-100-1"),
        "The left image shows a red circle.", "false", ["false"], "")),
    ("nlvr2", "dev", "evaluate", 24, 23, (
        "dev-105-1-1", pair("dev", "dev-105-1"), "Both images show the same shape.", "false",
        ["false"], "")),
    ("nlvr2", "test1", "evaluate", 24, 0, (
        "test1-100-0-0", pair("test1", "test1-100-0"), "The left image shows a teal circle.",
        "true", ["true"], "")),
]  # fmt: skip
TASKS = {"easy_vqa": "vqa", "vqav2": "vqa", "coco": "caption", "gqa": "gqa", "nlvr2": "nlvr2"}


class TestRows:
    def test_the_table_has_every_split(self) -> None:
        every = {(name, split) for name, layout in LAYOUTS.items() for split in layout.splits}
        assert {(layout, split) for layout, split, *_ in ROWS} == every

    @pytest.mark.parametrize("case", ROWS, ids=lambda case: "-".join(case[:3]))
    def test_by_value(self, case: tuple[Any, ...], sources: dict[str, Source], cache: Path) -> None:
        layout, split, role, number, place, row = case
        source = sources[layout]
        found = open_samples(source, split, role=role, cache_dir=cache)
        assert found.task == TASKS[layout] and found.skipped == {}
        assert found.rows.column_names == COLUMNS and len(found.rows) == number
        assert found.rows[place] == dict(zip(COLUMNS, row, strict=True))
        assert found.rows.unique("id") == found.rows["id"][:]
        assert all(found.path(image).is_file() for image in found.rows[0]["images"])
        assert absent(source, split) == []

    @pytest.mark.parametrize(
        ("layout", "split"),
        [("vqav2", "train+val"), ("coco", "val2014+train2014"), ("nlvr2", "dev+test1")],
    )
    def test_union(self, layout: str, split: str, sources: dict[str, Source], cache: Path) -> None:
        parts = [open_samples(sources[layout], p, cache_dir=cache) for p in split.split("+")]
        joined = open_samples(sources[layout], split, cache_dir=cache)
        assert joined.rows.to_list() == [row for part in parts for row in part.rows]

    @pytest.mark.parametrize("layout", ["vqav2", "coco"])
    def test_karpathy_splits_are_of_the_images(
        self, layout: str, sources: dict[str, Source], cache: Path
    ) -> None:
        source = sources[layout]
        assert source.root is not None
        images = json.loads((source.root / "dataset_coco.json").read_bytes())["images"]
        of_image = {f"{image['filepath']}/{image['filename']}": image["split"] for image in images}
        total = 0
        for split, parts in [
            ("karpathy-train", {"train", "restval"}),
            ("karpathy-val", {"val"}),
            ("karpathy-test", {"test"}),
        ]:
            rows = open_samples(source, split, cache_dir=cache).rows
            assert {of_image[row["images"][0]] for row in rows} == parts
            total += len(rows)
        both = "train+val" if layout == "vqav2" else "train2014+val2014"
        assert total == len(open_samples(source, both, cache_dir=cache).rows)

    def test_the_forms_of_captions_agree(self, sources: dict[str, Source], cache: Path) -> None:
        def opened(split: str) -> dict[str, list[str]]:
            rows = open_samples(sources["coco"], split, role="evaluate", cache_dir=cache).rows
            return {row["images"][0]: row["references"] for row in rows}

        official = opened("train2014+val2014")
        assert official == opened("karpathy-train+karpathy-val+karpathy-test")

    def test_annotations_in_another_order(self, make: Make, tmp_path: Path) -> None:
        source = make("vqav2")
        assert source.root is not None
        before = open_samples(source, "train", cache_dir=tmp_path / "c").rows.to_list()
        file = source.root / ANNOTATIONS.format("train2014")
        held = json.loads(file.read_bytes())
        held["annotations"].reverse()
        file.write_text(json.dumps(held))
        assert open_samples(source, "train", cache_dir=tmp_path / "c").rows.to_list() == before

    def test_annotations_wait_no_longer_than_they_must(self, make: Make) -> None:
        source = make("vqav2")
        assert source.root is not None
        answers = vqav2.Answers(source.root / ANNOTATIONS.format("train2014"))
        for question in (9000, 9001, 9002):
            answers.of(question)
            assert not answers.waiting
        answers.of(16_001)
        assert set(answers.waiting) == {9003, 16_000}

    def test_other_places(self, make: Make, tmp_path: Path) -> None:
        """Sentences of NLVR2 in data/, as in its repository; images apart from the questions."""
        nlvr2, gqa = make("nlvr2"), make("gqa")
        assert nlvr2.root is not None and gqa.root is not None
        (nlvr2.root / "data").mkdir()
        (nlvr2.root / "dev.json").rename(nlvr2.root / "data" / "dev.json")
        assert len(open_samples(nlvr2, "dev", cache_dir=tmp_path / "c").rows) == 8
        (gqa.root / "images").rename(tmp_path / "elsewhere")
        apart = Source("gqa", gqa.root, tmp_path / "elsewhere")
        found = open_samples(apart, "train", cache_dir=tmp_path / "c")
        assert found.path(found.rows[0]["images"][0]) == tmp_path / "elsewhere" / "2300000.jpg"
        with pytest.raises(ValueError, match=r"gqa/images/2300000\.jpg does not exist, 4 images"):
            open_samples(gqa, "train", cache_dir=tmp_path / "c")

    def test_the_data_sets_are_the_same_each_time(self, tmp_path: Path) -> None:
        for make in MAKERS.values():
            for folder in ("a", "b"):
                make(tmp_path / folder, 4)
        files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
        assert len(files) == 97
        for file in files:
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert file.read_bytes() == other.read_bytes()


class TestCache:
    def test_read_once_and_memory_mapped(
        self, make: Make, tmp_path: Path, read: Counter[str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        source = make("vqav2")
        first = open_samples(source, "train", cache_dir=tmp_path / "c")
        assert "Generating train split" in capfd.readouterr().err and read.total() == 2
        for _ in range(2):
            again = open_samples(source, "train", cache_dir=tmp_path / "c")
            assert again.rows.to_list() == first.rows.to_list()
            assert again.rows._fingerprint == first.rows._fingerprint
        assert capfd.readouterr().err == "" and read.total() == 2
        assert isinstance(again.rows.data, MemoryMappedTable)
        (file,) = again.rows.cache_files
        assert Path(file["filename"]).is_relative_to(tmp_path / "c" / "vqav2")

    def test_what_it_is_kept_under(self, make: Make, tmp_path: Path, read: Counter[str]) -> None:
        source = make("vqav2")
        assert source.root is not None

        def files_read(split: str = "train", **options: Any) -> int:
            before = read.total()
            open_samples(source, split, cache_dir=tmp_path / "c", **options)
            return read.total() - before

        assert files_read() == 2 and files_read() == 0
        assert files_read(limit=3) == 2 and files_read(limit=3) == 0
        assert files_read("val") == 2 and files_read("train+val") == 4
        assert files_read(role="evaluate") == 2
        assert files_read(broken="skip") == 0
        os.utime(source.root / QUESTIONS.format("train2014"))
        assert files_read() == 2 and files_read("val") == 0
        file = source.root / ANNOTATIONS.format("train2014")
        status = file.stat()
        file.write_text(file.read_text() + " ")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert files_read() == 2 and files_read() == 0

    def test_a_changed_answer_is_read(self, make: Make, tmp_path: Path) -> None:
        source = make("gqa")
        assert source.root is not None
        assert open_samples(source, "val", cache_dir=tmp_path / "c").rows[0]["answer"] == "no"
        file = source.root / "val_balanced_questions.json"
        held = json.loads(file.read_bytes())
        next(iter(held.values()))["answer"] = "maybe"
        file.write_text(json.dumps(held))
        assert open_samples(source, "val", cache_dir=tmp_path / "c").rows[0]["answer"] == "maybe"

    def test_nothing_is_kept_of_a_failure(self, make: Make, tmp_path: Path) -> None:
        source = make("gqa")
        assert source.root is not None
        file = source.root / "val_balanced_questions.json"
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        for _ in range(2):
            with pytest.raises(ValueError, match="broken JSON"):
                open_samples(source, "val", cache_dir=tmp_path / "c")
        assert list((tmp_path / "c").rglob("*.arrow")) == []
        file.write_bytes(whole)
        assert len(open_samples(source, "val", cache_dir=tmp_path / "c").rows) == 16

    def test_only_the_first_process_shows_bars(
        self,
        make: Make,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        open_samples(make("vqav2"), "train", cache_dir=tmp_path / "c", broken="skip")
        assert capfd.readouterr().err == "" and not datasets.are_progress_bars_disabled()

    def test_two_processes_at_once(self, tmp_path: Path) -> None:
        """Both wait for each other, then open what neither has; one reads it."""
        script = (
            "import sys, time\n"
            "from pathlib import Path\n"
            "from fused_route.training.data import layouts\n"
            "from fused_route.training.data.samples import Source, open_samples\n"
            "me, folder = sys.argv[1], Path(sys.argv[2])\n"
            "load = layouts.easy_vqa.load\n"
            "def counted(split):\n"
            "    (folder / f'read-{me}').touch()\n"
            "    return load(split)\n"
            "layouts.easy_vqa.load = counted\n"
            "(folder / f'ready-{me}').touch()\n"
            "while len(list(folder.glob('ready-*'))) < 2: time.sleep(0.01)\n"
            "found = open_samples(Source('easy_vqa'), 'train', cache_dir=folder / 'c')\n"
            "rows = found.rows\n"
            "print(len(rows), rows[0]['answer'], rows[38574]['id'], len(set(rows['id'])))\n"
        )
        both = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(me), str(tmp_path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for me in range(2)
        ]
        said = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert {out for out, _ in said} == {"38575 rectangle train-38574 38575\n"}
        assert len(list(tmp_path.glob("read-*"))) == 1
        assert len(list((tmp_path / "c").rglob("*.arrow"))) == 1

    def test_a_damaged_cache_is_named(self, make: Make, tmp_path: Path) -> None:
        source = make("gqa")
        open_samples(source, "val", cache_dir=tmp_path / "c")
        (file,) = (tmp_path / "c").rglob("*.arrow")
        file.write_bytes(b"no table")
        message = rf"{re.escape(str(file.parent.parent))} cannot be used .*: delete it$"
        with pytest.raises(ValueError, match=message) as caught:
            open_samples(source, "val", cache_dir=tmp_path / "c")
        assert "\n" not in str(caught.value)

    def test_ids_of_one_hash_are_no_repetition(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(row_cache, "hash", len, raising=False)
        rows = [{"id": "12"}, {"id": "13"}, {"id": "5"}]
        assert list(row_cache.distinct(lambda: iter(rows), "x")) == rows  # type: ignore[arg-type]
