"""Rows that cannot be used go where that is asked for, and come back once mended."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from damaged_data import FIRST, SECOND, A, C, K, holding, instead
from official_layouts import MAKERS
from PIL import Image

from fused_route.training.data import image_files
from fused_route.training.data.images import load_image
from fused_route.training.data.samples import BROKEN, Source, open_samples


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
