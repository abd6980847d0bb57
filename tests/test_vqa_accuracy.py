"""VQA accuracy, against what the official evaluation computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from fused_route.training.metrics.vqa_accuracy import normalized, vqa_accuracy

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "vqa_accuracy.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", GOLDEN["normalize"], ids=lambda case: case["in"])
def test_normalized_as_the_official(case: dict[str, str]) -> None:
    assert normalized(case["in"]) == case["out"]


@pytest.mark.parametrize("case", GOLDEN["accuracy"], ids=lambda case: case["prediction"])
def test_counted_as_the_official(case: dict[str, Any]) -> None:
    found = vqa_accuracy(case["prediction"], case["answers"])
    assert round(100 * found, 2) == case["percent"]


def test_by_the_definition() -> None:
    """Against the loop over people that the definition is."""
    for matches in range(11):
        answers = ["cat"] * matches + ["dog", "ox"] * 5
        answers = answers[:10]
        counts = []
        for place in range(len(answers)):
            others = answers[:place] + answers[place + 1 :]
            counts.append(min(1.0, others.count("cat") / 3))
        assert vqa_accuracy("cat", answers) == pytest.approx(sum(counts) / len(counts))


def test_always_normalized() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10, "always") == 1.0
    assert vqa_accuracy("two\n", ["2"] * 10, "always") == 1.0


def test_many_points() -> None:
    """The official evaluation takes 32 of them away."""
    assert normalized("a" + "." * 40) == "a" + "." * 8


BAD: list[tuple[tuple[Any, ...], str]] = [
    (("yes", []), "answers must be those of several people, got"),
    (("yes", "yes"), "answers must be those of several people, got 'yes'"),
    ((3, ["3"]), "prediction must be text, got 3"),
    (("3", [3]), "answers must be text, got 3"),
    (("3", ["3"], "never"), "normalize must be one of official, always; got 'never'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vqa_accuracy(*arguments)
