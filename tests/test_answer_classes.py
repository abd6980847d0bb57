"""Vocabularies and soft targets, against values worked out by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fused_route.training.data.answers import (
    as_given,
    read_vocabulary,
    soft_score,
    soft_targets,
    vocabulary,
    write_vocabulary,
)

# Normalised: "2" eight times, "yes" five, "cat" four, "dog" four, "" once; "" was no answer twice.
ANSWERS = [
    *["two"] * 5, *["2"] * 3, *["yes"] * 3, "Yes", "yes.", *["dog"] * 4, *["a cat"] * 2, "the cat",
    "cat", "a", "", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"answer": ANSWERS, "id": [str(i) for i in range(len(ANSWERS))]}
    )


class TestVocabulary:
    @pytest.mark.parametrize(
        ("least", "expected"),
        [
            (1, ["2", "yes", "cat", "dog", ""]),
            (2, ["2", "yes", "cat", "dog"]),
            (4, ["2", "yes", "cat", "dog"]),
            (5, ["2", "yes"]),
            (8, ["2"]),
        ],
    )
    def test_by_hand(self, least: int, expected: list[str], rows: datasets.Dataset) -> None:
        assert vocabulary(rows, least) == expected

    def test_as_they_are(self) -> None:
        """For tasks that compare answers as they are."""
        rows = datasets.Dataset.from_dict({"answer": ["t-shirt", "two", "the sky", "two", ""]})
        assert vocabulary(rows, 1, as_given) == ["two", "t-shirt", "the sky"]
        assert soft_targets(["t-shirt"], {"t shirt": 0, "t-shirt": 1}, as_given) == {1: 1.0}

    def test_of_selected_rows(self, rows: datasets.Dataset) -> None:
        """Those that are left, not those that lie in the file."""
        assert vocabulary(rows.select([0, 5, 13, 14]), 2) == ["2", "dog"]

    def test_too_rare(self, rows: datasets.Dataset) -> None:
        message = "no answer is that of least=9 of 24 questions, the most frequent of 8: lower it"
        with pytest.raises(ValueError, match=message):
            vocabulary(rows)
        with pytest.raises(ValueError, match="least must be a whole number of at least 1"):
            vocabulary(rows, 0)

    def test_file(self, tmp_path: Path) -> None:
        answers = ["yes", "", "café", 'a "b"']
        write_vocabulary(tmp_path / "new" / "answers.json", answers)
        assert read_vocabulary(tmp_path / "new" / "answers.json") == answers
        assert json.loads((tmp_path / "new" / "answers.json").read_bytes()) == answers
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["answers.json"]

    def test_the_published_form(self, tmp_path: Path) -> None:
        (tmp_path / "trainval_ans2label.json").write_text('{"net": 1, "yes": 2, "": 0}')
        assert read_vocabulary(tmp_path / "trainval_ans2label.json") == ["", "net", "yes"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                '{"a": 0, "b": 2}',
                r"must give 2 answers the classes 0 to 1, each once; got \[0, 2\]",
            ),
            ('{"a": 0, "b": 0}', "each once"),
            ('{"a": 1, "b": 2}', "each once"),
            ('{"a": 0, "b": "1"}', "each once"),
            ('{"a": 0, "b": true}', "each once"),
            ('{"a": 0, "b": 1.0}', "each once"),
            ("{}", "distinct answers, one at least"),
            ("[]", "distinct answers, one at least"),
            ('["a", "b", "a"]', r"distinct answers, one at least; twice: \['a'\]"),
            ('["a", 1]', r"must hold a list of answers or their classes, got \['a', 1\]"),
            ('"a"', "must hold a list of answers or their classes, got 'a'"),
            ('["a",', "is broken JSON: "),
            (b"\xff[]", "is broken JSON: "),
        ],
    )
    def test_files_that_are_none(self, content: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "answers.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=f"{path} .*{message}") as caught:
            read_vocabulary(path)
        assert "\n" not in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"absent\.json cannot be read: No such file"):
            read_vocabulary(tmp_path / "absent.json")


class TestSoftTargets:
    def test_of_ten(self) -> None:
        scores = [soft_score(count, 10) for count in range(11)]
        assert scores == [0, 0.3, 0.6, 0.9, *[1.0] * 7]

    def test_of_one(self) -> None:
        assert soft_score(0, 1) == 0 and soft_score(1, 1) == 1

    def test_of_others(self) -> None:
        """Two of five agree: each sees one other, three see two: (2 · 1/3 + 3 · 2/3) / 5."""
        assert soft_score(2, 5) == pytest.approx(8 / 15, rel=1e-15)

    @pytest.mark.parametrize(("count", "of"), [(11, 10), (-1, 10), (0, 0), (1.5, 10)])
    def test_no_counts(self, count: Any, of: int) -> None:
        with pytest.raises(ValueError, match="must be"):
            soft_score(count, of)

    def test_by_hand(self) -> None:
        references = [
            "Red",
            "red",
            "the red",
            "red.",
            "dark red",
            "maroon",
            "maroon",
            *["2"] * 2,
            "two",
        ]
        index = {"red": 0, "2": 1, "maroon": 2, "blue": 3}
        assert soft_targets(references, index) == {0: 1.0, 1: 0.9, 2: 0.6}
        assert soft_targets(["a circle"], {"circle": 5}) == {5: 1.0}
        assert soft_targets(["square"], {"circle": 5}) == soft_targets([], {"circle": 5}) == {}
