"""Data sets that are not as their layouts have them: one line says what to do, or rows go."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from official_layouts import MAKERS
from PIL import Image

from fused_route.training.data import image_files
from fused_route.training.data.images import load_image
from fused_route.training.data.samples import BROKEN, Source, absent, open_samples

Damage = Callable[[Path], None]


def without(file: str, key: str, entry: str) -> Damage:
    """Takes a key away from the first entry of the list under `key`, or of the object."""

    def damage(root: Path) -> None:
        held = json.loads((root / file).read_bytes())
        del (held[key][0] if key else next(iter(held.values())))[entry]
        (root / file).write_text(json.dumps(held))

    return damage


def instead(file: str, old: str, new: str) -> Damage:
    """Replaces a text at its first place."""

    def damage(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return damage


def holding(file: str, content: bytes) -> Damage:
    return lambda root: void((root / file).write_bytes(content))


def cut(file: str) -> Damage:
    return lambda root: void((root / file).write_bytes((root / file).read_bytes()[:-200]))


def away(file: str) -> Damage:
    return lambda root: void((root / file).rename(root / "renamed"))


def void(_: object) -> None:
    """Nothing, whatever was done."""


Q, A = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"
K, C, G = "dataset_coco.json", "annotations/captions_val2017.json", "val_balanced_questions.json"
FIRST, SECOND = (f"train2014/COCO_train2014_{number:012d}.jpg" for number in (9, 16))
PART = "train_all_questions/train_all_questions_7.json"
NO_LIST = "must hold an object with a list 'questions', and does not"
# (layout, split, [(damage, message where it is done; {root} is the folder)])
DAMAGES: dict[tuple[str, str], list[tuple[Damage, str]]] = {
    ("vqav2", "train"): [
        (
            away(Q),
            f"{{root}}/{Q} does not exist: unpack v2_Questions_Train_mscoco.zip in {{root}}$",
        ),
        (away(A), "unpack v2_Annotations_Train_mscoco.zip in {root}$"),
        (cut(Q), f"{Q} is broken JSON after [0-9]+ .* premature EOF.* download it again"),
        (cut(A), f"{A} is broken JSON"),
        (holding(Q, b""), f"{Q} is broken JSON after 0 entries"),
        (holding(Q, b"<html>404</html>"), "invalid char in json text. near '<html>404</html>'"),
        (holding(Q, b'{"questions": [{"a": "\xff"}]}'), "invalid bytes in UTF8 string"),
        (holding(Q, b'[{"question_id": 1}]'), f"{{root}}/{Q} {NO_LIST}"),
        (holding(Q, b'{"annotations": []}'), NO_LIST),
        (holding(Q, b'{"questions": {"1": {}}}'), NO_LIST),
        (holding(Q, b'{"questions": [[]]}'), r"entry 0 of 'questions' must be an object, got \[\]"),
        (holding(Q, b'{"questions": []}'), "vqav2 train in {root} has no rows"),
        (without(Q, "questions", "image_id"), f"{Q}: entry 0 of 'questions' has no 'image_id'; it"),
        (
            instead(Q, '"image_id": 9', '"image_id": true'),
            "has 'image_id' = True; .* a whole number",
        ),
        (
            without(A, "annotations", "answers"),
            "entry 0 of 'annotations' has no 'answers'; .* a list",
        ),
        (
            instead(A, '"answer": "uniform"', '"answer": 3'),
            "0 of 'annotations', answers 0 has 'an.* = 3",
        ),
        (
            instead(Q, '"question_id": 9000', '"question_id": 9001'),
            "vqav2 train in {root} has the id '9001' twice",
        ),
        (
            instead(A, '"question_id": 9001', '"question_id": 5'),
            "{root} has no answer to 1 of 16 rows of train, the first is 9001: .* --skip-broken",
        ),
        (
            away(SECOND),
            f"{{root}}/{SECOND} does not exist, 1 image is missing: unpack train2014.zip in "
            "{root}, or leave out such rows, with --skip-broken",
        ),
        (
            away("train2014"),
            f"{{root}}/{FIRST} does not exist, 4 images are missing: unpack train2014.zip",
        ),
    ],
    ("vqav2", "karpathy-val"): [
        (away(K), "unpack caption_datasets.zip in {root}$"),
        (away("val2014"), "3 images are missing: unpack val2014.zip"),
        (instead(K, '"split": "val"', '"split": 1'), f"{K}: entry 5 of 'images' has 'split' = 1"),
        (holding(K, b'{"images": []}'), "vqav2 karpathy-val in {root} has no rows"),
    ],
    ("coco", "karpathy-val"): [
        (without(K, "images", "split"), f"{K}: entry 0 of 'images' has no 'split'"),
    ],
    ("coco", "val2017"): [
        (away(C), f"{{root}}/{C} does not exist: unpack annotations_trainval2017.zip in {{root}}$"),
        (without(C, "annotations", "caption"), "entry 0 of 'annotations' has no 'caption'"),
        (
            instead(C, '"image_id": 42,', '"image_id": 43,'),
            "0 of 'annotations' is about image 43, ",
        ),
        (away("val2017"), "8 images are missing: unpack val2017.zip in {root}"),
    ],
    ("gqa", "train-all"): [
        (away(PART), f"{PART} does not exist: unpack questions1.2.zip in {{root}}$")
    ],
    ("gqa", "val"): [
        (away(G), f"{G} does not exist: unpack questions1.2.zip in {{root}}$"),
        (cut(G), f"{G} is broken JSON"),
        (holding(G, b"[]"), f"{G} must hold an object of entries by key, and does not"),
        (holding(G, b"{}"), "gqa val in {root} has no rows"),
        (holding(G, b'{"1": "question"}'), "entry '1' must be an object, got 'question'"),
        (without(G, "", "imageId"), "entry '[0-9]+' has no 'imageId'"),
        (without(G, "", "answer"), "{root} has no answer to 1 of 16 rows of val"),
        (
            away("images"),
            "{root}/images/2300044.jpg does not exist, 4 images .*: unpack images.zip",
        ),
    ],
    ("nlvr2", "dev"): [
        (away("dev.json"), "dev.json does not exist: put nlvr2/data/dev.json of .* into {root}$"),
        (
            instead("dev.json", "}\n", "\n"),
            "dev.json is broken at line 1: .* one JSON object a line",
        ),
        (holding("dev.json", b"[]\n"), r"dev.json: entry in line 1 must be an object, got \[\]"),
        (holding("dev.json", b"\xff\n"), "dev.json is broken at line 1"),
        (holding("dev.json", b"\n \n"), "nlvr2 dev in {root} has no rows"),
        (
            instead("dev.json", '"True"', '"true"'),
            "line 1 has the label 'true'; .* one of True, False",
        ),
    ],
    ("nlvr2", "train"): [
        (instead("train.json", '"directory": 7', '"folder": 7'), "in line 1 has no 'directory'"),
        (
            away("images/train/8"),
            "100-1-img0.png does not exist, 2 images .*: unpack train_img.zip",
        ),
    ],
}
CASES = [(*where, *case) for where, cases in DAMAGES.items() for case in cases]
EASY = "easy_vqa"
# (arguments of open_samples, message)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"source": Source("vqa", Path("."))}, "layout must be one of easy_vqa, .*, nlvr2; got 'vqa'"),
    (
        {"split": "dev"},
        r"split of easy_vqa .* must be one of train, test, fit, validation; got 'dev'",
    ),
    ({"split": "train+"}, "must be one of train, test, fit, validation; got ''"),
    ({"split": "train+train"}, "split='train.train' has a split twice"),
    ({"role": "test"}, "role must be one of train, evaluate; got 'test'"),
    ({"broken": "repair"}, "broken must be one of refuse, skip; got 'repair'"),
    ({"limit": 0}, "limit must be a whole number of at least 1.*, got 0"),
    ({"source": Source(EASY, Path("data"))}, "easy_vqa is an installed package: .* root=data"),
    (
        {"source": Source("gqa")},
        "gqa needs root, the folder that has train_balanced_questions.json",
    ),
    (
        {"source": Source("gqa", Path("/nowhere"))},
        "/nowhere is no folder: give .* that has train_b",
    ),
    ({"source": Source("gqa", Path("/"))}, "/train_balanced_questions.json does not exist: unpack"),
]


class TestRefusals:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[3]}")
    def test_damaged_data(self, case: tuple[str, str, Damage, str], tmp_path: Path) -> None:
        layout, split, damage, message = case
        source = MAKERS[layout](tmp_path / layout, 4)
        root = str(source.root)
        damage(Path(root))
        with pytest.raises(ValueError, match=message.replace("{root}", re.escape(root))) as caught:
            open_samples(source, split, cache_dir=tmp_path / "c")
        said = str(caught.value)
        assert "\n" not in said and root in said
        assert caught.value.__context__ is None or caught.value.__suppress_context__

    @pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:40])
    def test_bad_arguments(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        given: dict[str, Any] = {"source": Source(EASY), "split": "train", "cache_dir": tmp_path}
        with pytest.raises(ValueError, match=message) as caught:
            open_samples(**given | arguments)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("layout", "split", "message"),
        [
            (
                "vqav2",
                "test+test-dev",
                "vqav2 test.test-dev in .*vqav2 has the id '262[0-9]+' twice: join",
            ),
            ("gqa", "train+train-all", "has the id '20000000' twice"),
            ("vqav2", "val+test", "joins splits with answers and without: open them apart"),
        ],
    )
    def test_unions_that_are_none(
        self, layout: str, split: str, message: str, tmp_path: Path
    ) -> None:
        source = MAKERS[layout](tmp_path / layout, 4)
        with pytest.raises(ValueError, match=message):
            open_samples(source, split, cache_dir=tmp_path / "c")

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"file cannot be used .*: use another cache_dir"):
            open_samples(Source(EASY), "test", cache_dir=tmp_path / "file")

    def test_a_damaged_cache_is_named(self, tmp_path: Path) -> None:
        source = MAKERS["gqa"](tmp_path / "gqa", 4)
        open_samples(source, "val", cache_dir=tmp_path / "c")
        (file,) = (tmp_path / "c").rglob("*.arrow")
        file.write_bytes(b"no table")
        message = f"{re.escape(str(file.parent.parent))} cannot be used .*: delete it$"
        with pytest.raises(ValueError, match=message) as caught:
            open_samples(source, "val", cache_dir=tmp_path / "c")
        assert "\n" not in str(caught.value)

    def test_what_is_absent(self, tmp_path: Path) -> None:
        source = MAKERS["vqav2"](tmp_path / "vqav2", 4)
        for name in (Q, K, "train2014"):
            (tmp_path / "vqav2" / name).rename(tmp_path / name)
        assert [line.partition(":")[0] for line in absent(source, "karpathy-val+train")] == [
            f"{source.root}/{name} does not exist" for name in (K, Q, "train2014")
        ]


class TestSkipping:
    def test_what_goes_is_counted_by_reason(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Of 16 questions about 4 images: one is gone, one broken, and two without an answer."""
        source = MAKERS["vqav2"](tmp_path / "vqav2", 4)
        root = tmp_path / "vqav2"
        (root / FIRST).unlink()
        (root / SECOND).write_bytes((root / SECOND).read_bytes()[:500])
        instead(A, '"question_id": 9001', '"question_id": 1')(root)
        instead(A, '"question_id": 23002', '"question_id": 2')(root)
        expected = {"no answer": 2, "missing image": 3, "unreadable image": 4}
        kept = ["23000", "23001", "23003", "30000", "30001", "30002", "30003"]
        reasons = "no answer 2, missing image 3, unreadable image 4"
        line = f"vqav2 train in {root}: left out 9 of 16 rows: {reasons}\n"
        for opening in ("first", "second"):
            found = open_samples(source, "train", cache_dir=tmp_path / "c", broken="skip")
            assert found.skipped == expected and found.rows["id"][:] == kept
            said = capfd.readouterr().err
            assert said == line if opening == "second" else said.endswith(f"\n{line}")
        others = open_samples(source, "val", cache_dir=tmp_path / "c", broken="skip")
        assert len(others.rows) == 32 and others.skipped == {}
        assert others.rows._fingerprint != found.rows._fingerprint

    def test_rows_are_found_in_every_part_of_the_table(self, tmp_path: Path) -> None:
        """Arrow keeps a thousand rows together."""
        source = MAKERS["nlvr2"](tmp_path / "nlvr2", 4)
        sentence = {"sentence": "Both are red.", "label": "True"}
        pairs = ["dev-101-0"] + ["dev-100-0"] * 2500 + ["dev-101-0"]
        lines = [{"identifier": f"{pair}-{i}", **sentence} for i, pair in enumerate(pairs)]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / "nlvr2" / "dev.json").write_text(text)
        (tmp_path / "nlvr2" / "dev" / "dev-101-0-img1.png").unlink()
        found = open_samples(source, "dev", cache_dir=tmp_path / "c", broken="skip")
        assert found.skipped == {"missing image": 2}
        assert found.rows.data.column("images").num_chunks > 1
        assert found.rows["id"][:] == [line["identifier"] for line in lines[1:-1]]

    def test_each_image_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []

        def counted(path: Path) -> Image.Image:
            read.append(path.name)
            return load_image(path)

        monkeypatch.setattr(image_files, "load_image", counted)
        source = MAKERS["nlvr2"](tmp_path / "nlvr2", 4)
        options: dict[str, Any] = {"cache_dir": tmp_path / "c"}
        open_samples(source, "dev", **options)
        assert read == []
        for _ in range(2):
            open_samples(source, "dev", broken="skip", **options)
            assert len(read) == len(set(read)) == 8

    @pytest.mark.parametrize("broken", ["refuse", "skip"])
    def test_a_changed_folder_is_looked_at_again(self, broken: str, tmp_path: Path) -> None:
        source = MAKERS["nlvr2"](tmp_path / "nlvr2", 4)
        image = tmp_path / "nlvr2" / "dev" / "dev-100-0-img1.png"

        def rows() -> int:
            return len(open_samples(source, "dev", cache_dir=tmp_path / "c", broken=broken).rows)

        assert rows() == 8
        image.rename(tmp_path / "away.png")
        if broken == "refuse":
            with pytest.raises(ValueError, match=r"dev-100-0-img1\.png does not exist, 1 image is"):
                rows()
        else:
            assert rows() == 6
        (tmp_path / "away.png").rename(image)
        assert rows() == 8

    def test_a_mended_image_comes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In its place, which leaves the folder as it was; sound ones are not read again."""
        source = MAKERS["nlvr2"](tmp_path / "nlvr2", 4)
        image = tmp_path / "nlvr2" / "dev" / "dev-100-0-img1.png"
        whole = image.read_bytes()
        image.write_bytes(whole[:60])
        read: list[str] = []

        def rows() -> int:
            read.clear()
            options: dict[str, Any] = {"cache_dir": tmp_path / "c", "broken": "skip"}
            return len(open_samples(source, "dev", **options).rows)

        def counted(path: Path) -> Image.Image:
            read.append(path.name)
            return load_image(path)

        monkeypatch.setattr(image_files, "load_image", counted)
        assert rows() == 6 and len(read) == 8
        assert rows() == 6 and read == []
        image.write_bytes(whole[:70])
        assert rows() == 6 and read == [image.name]
        image.write_bytes(whole)
        assert rows() == 8 and read == [image.name]
        assert rows() == 8 and read == []

    @pytest.mark.parametrize("broken", ["refuse", "skip"])
    def test_an_image_mended_while_others_are_looked_at_comes_back(
        self, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = MAKERS["nlvr2"](tmp_path / "nlvr2", 4)
        image = tmp_path / "nlvr2" / "dev" / "dev-100-0-img1.png"
        whole, check = image.read_bytes(), image_files.CHECKS[BROKEN[broken]]
        image.unlink()
        if broken == "skip":
            image.write_bytes(whole[:60])
        time = image.parent.stat().st_mtime_ns

        def mended(names: Sequence[str], folder: Path) -> image_files.Found:
            found = check(names, folder)
            image.write_bytes(whole)
            os.utime(image.parent, ns=(time, time))  # within a tick of its clock
            return found

        def rows() -> int:
            options: dict[str, Any] = {"cache_dir": tmp_path / "c", "broken": broken}
            return len(open_samples(source, "dev", **options).rows)

        monkeypatch.setitem(image_files.CHECKS, BROKEN[broken], mended)
        if broken == "skip":
            assert rows() == 6
        else:
            with pytest.raises(ValueError, match="1 image is missing"):
                rows()
        assert rows() == 8

    def test_the_limit_comes_first(self, tmp_path: Path) -> None:
        source = MAKERS["vqav2"](tmp_path / "vqav2", 4)
        (tmp_path / "vqav2" / SECOND).unlink()
        options: dict[str, Any] = {"cache_dir": tmp_path / "c", "limit": 4}
        assert len(open_samples(source, "train", **options).rows) == 4
        options["limit"] = 6
        assert open_samples(source, "train", broken="skip", **options).skipped == {
            "missing image": 2
        }
        with pytest.raises(ValueError, match="1 image is missing"):
            open_samples(source, "train", **options)

    def test_none_left(self, tmp_path: Path) -> None:
        source = MAKERS["coco"](tmp_path / "coco", 4)
        message = "coco val2014 in .*coco: left out 40 of 40 rows: missing image 40; none is left"
        (tmp_path / "coco" / "val2014").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=message):
            open_samples(source, "val2014", cache_dir=tmp_path / "c", broken="skip")

    def test_a_caption_without_a_word_is_found_before_it_is_scored(self, tmp_path: Path) -> None:
        source = MAKERS["coco"](tmp_path / "coco", 4)
        instead(K, '"raw": "one red triangle."', '"raw": " .!"')(tmp_path / "coco")
        options: dict[str, Any] = {"role": "evaluate", "cache_dir": tmp_path / "c"}
        message = "has a caption without a word, .* of 1 of [0-9]+ rows of .*--skip-broken"
        splits = [f"karpathy-{name}" for name in ("train", "val", "test")]
        (split,) = [s for s in splits if self._wordless(source, s, message, options)]
        found = open_samples(source, split, broken="skip", **options)
        assert found.skipped == {"caption without a word": 1}
        assert not any(" .!" in said for said in found.rows["references"])
        trained = open_samples(source, split, cache_dir=tmp_path / "c")
        assert " .!" in trained.rows["answer"][:]

    @pytest.mark.usefixtures("without_java")
    def test_a_caption_of_signs_that_is_scored_stays(self, tmp_path: Path) -> None:
        """As the tokenizer of the scores has it: "???" and "&" are words."""
        source = MAKERS["coco"](tmp_path / "coco", 4)
        (*parts, last, end) = re.split(r'(?<="raw": )"[^"]*"', (tmp_path / "coco" / K).read_text())
        said = ['"???"', '" & ! "', '"日本"', *['"a dog"'] * (len(parts) - 3), '"..."']
        text = "".join(part for pair in zip([*parts, last], said, strict=True) for part in pair)
        (tmp_path / "coco" / K).write_text(text + end)
        splits = "+".join(f"karpathy-{name}" for name in ("train", "val", "test"))
        options: dict[str, Any] = {"role": "evaluate", "cache_dir": tmp_path / "c"}
        found = open_samples(source, splits, broken="skip", **options)
        assert found.skipped == {"caption without a word": 1}
        kept = {caption for captions in found.rows["references"] for caption in captions}
        assert kept == {"???", " & ! ", "日本", "a dog"}

    @staticmethod
    def _wordless(source: Source, split: str, message: str, options: dict[str, Any]) -> bool:
        try:
            open_samples(source, split, **options)
        except ValueError as error:
            assert re.search(message, str(error))
            return True
        return False

    def test_an_image_without_captions(self, tmp_path: Path) -> None:
        source = MAKERS["coco"](tmp_path / "coco", 4)
        holding(C, json.dumps({"images": [{"id": 42, "file_name": "000000000042.jpg"}]}).encode())(
            tmp_path / "coco"
        )
        with pytest.raises(ValueError, match=rf"{C} must hold an object with a list 'annotations'"):
            open_samples(source, "val2017", role="evaluate", cache_dir=tmp_path / "c")
        source = MAKERS["coco"](tmp_path / "coco", 4)
        for _ in range(5):
            instead(C, '"image_id": 49,', '"image_id": 42,')(tmp_path / "coco")
        with pytest.raises(
            ValueError, match="no answer to 1 of 8 rows of val2017, the first is 49"
        ):
            open_samples(source, "val2017", role="evaluate", cache_dir=tmp_path / "c")
