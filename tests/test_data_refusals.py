"""Data sets that are not as their layouts have them: one line says what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
from damaged_data import CASES, Damage, K, Q
from official_layouts import MAKERS

from fused_route.training.data.samples import Source, absent, open_samples

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
