"""Scores of predictions, against values by hand and against the official pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fused_route.training.metrics.answers import (
    each_exact,
    each_nlvr2,
    each_vqa,
    exact_match,
    nlvr2_scores,
    vqa_scores,
)
from fused_route.training.metrics.captions import caption_scores

ANSWERS = {"q1": "yes", "q2": "red", "q3": "no", "q4": "cup"}
GIVEN = {"q4": "cup", "q3": "yes", "q2": " Red", "q1": "yes"}
KINDS = {"q1": "verify", "q2": "query", "q3": "verify", "q4": "query"}


def test_scores_of_each() -> None:
    assert each_exact(GIVEN, ANSWERS) == {"q1": 1.0, "q2": 0.0, "q3": 0.0, "q4": 1.0}
    said = {key: [answer] for key, answer in ANSWERS.items()}
    assert each_vqa(GIVEN, said, "always") == {"q1": 1.0, "q2": 1.0, "q3": 0.0, "q4": 1.0}
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False"}
    assert each_nlvr2(labels, dict.fromkeys(labels, "true")) == {"dev-1-0-0": 1.0, "dev-1-1-0": 0.0}


@pytest.mark.parametrize(
    ("normalize", "overall", "query"), [("official", 0.5, 0.5), ("always", 0.75, 1.0)]
)
@pytest.mark.parametrize("kinds", [None, KINDS], ids=["overall", "kinds"])
def test_exact_match(
    normalize: str, overall: float, query: float, kinds: dict[str, str] | None
) -> None:
    by_kind = {"accuracy/query": query, "accuracy/verify": 0.5} if kinds else {}
    found = exact_match(GIVEN, ANSWERS, kinds, normalize)
    assert found == {"accuracy": overall, **by_kind}


TEN = ["cat"] * 2 + ["dog"] * 8


@pytest.mark.parametrize(
    ("prediction", "said", "normalize", "score"),
    [
        ("cat", TEN, "official", 0.6),
        ("The dog!", TEN, "official", 1.0),
        ("Dog", ["dog"] * 10, "official", 0.0),
        ("Dog", ["dog"] * 10, "always", 1.0),
        ("blue", ["blue"], "official", 1.0),
        ("blue\n", ["blue"], "official", 1.0),
        ("Blue", ["blue"], "official", 0.0),
        ("Blue", ["blue"], "always", 1.0),
        ("two", ("2",), "always", 1.0),
        ("red", ["blue"], "always", 0.0),
        # leaving out who gave it, one of two others agrees with each of the three
        ("cat", ["cat", "cat", "ox"], "official", (1 / 3 + 1 / 3 + 2 / 3) / 3),
    ],
)
def test_vqa_score(prediction: str, said: Sequence[str], normalize: str, score: float) -> None:
    found = vqa_scores({"q": prediction}, {"q": said}, normalize=normalize)
    assert found == {"accuracy": pytest.approx(score, abs=1e-12)}


def test_vqa_means() -> None:
    found = vqa_scores(
        {"a": "cat", "b": "3", "c": "no"},
        {"a": TEN, "b": ["3"] * 10, "c": ["yes"]},
        {"a": "other", "b": "number", "c": "yes/no"},
    )
    each = {"accuracy/number": 1.0, "accuracy/other": 0.6, "accuracy/yes/no": 0.0}
    assert found == pytest.approx({"accuracy": 1.6 / 3, **each}, abs=1e-12)
    assert list(found) == ["accuracy", *each]


def test_nlvr2() -> None:
    """Two sentences of a set and the same number in another split: three, of which one is right."""
    answers = {
        "dev-850-0-0": "True",
        "dev-850-1-0": "False",
        "dev-850-0-1": "True",
        "dev-850-1-1": "True",
        "test1-850-0-0": "False",
    }
    given = {**answers, "dev-850-1-1": "False", "dev-850-0-0": "true", "test1-850-0-0": "yes"}
    assert nlvr2_scores(given, answers) == {"accuracy": 3 / 5, "consistency": 1 / 3}


ONE = {"q": "yes"}
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    *(
        case
        for score, right in (
            (exact_match, "yes"),
            (vqa_scores, ["yes"]),
            (caption_scores, ["yes"]),
        )
        for case in (
            (score, ({"r": "a"}, {"q": right, "p": right}), "predictions lack ids of .*: 2 of "),
            (score, ({"q": "a", "r": "b"}, {"q": right}), "lack ids of predictions: 1 .* 'r' for"),
            (score, ({}, {}), "are empty: there is nothing to score"),
            (score, (["a"], {"q": right}), r"predictions must be a mapping from ids, got \['a'\]"),
            (score, ({"q": None}, {"q": right}), "must be text, got None"),
            (score, (ONE, {"q": [3]}), r"(answers|references).* must be text, got"),
        )
    ),
    (exact_match, (ONE, ONE, {}), "kinds lack ids of predictions: 1 of them, 'q' for one"),
    (exact_match, (ONE, ONE, {"q": 3}), r"kinds\['q'\] must be text, got 3"),
    (exact_match, (ONE, ONE, None, "lower"), "normalize must be one of official, always; got"),
    (vqa_scores, (ONE, {"q": ["yes"]}, None, "lower"), "normalize must be one of official, always"),
    (vqa_scores, (ONE, {"q": []}), "question 'q': answers must be those of several people"),
    (vqa_scores, (ONE, {"q": "yes"}), "question 'q': answers must be those of several people"),
    (vqa_scores, (ONE, {"q": None}), "question 'q': answers must be those of several people"),
    (nlvr2_scores, (ONE, ONE), "must be split-set-pair-sentence such as 'dev-850-0-1', got 'q'"),
    (nlvr2_scores, ({"d-1-0-0-0": "a"}, {"d-1-0-0-0": "a"}), "must be split-set-pair-sentence"),
    (nlvr2_scores, ({3: "a"}, {3: "a"}), "must be split-set-pair-sentence .* got 3"),
    (nlvr2_scores, ({"dev-1-0-0": "True"}, {"dev-1-1-0": "True"}), "'dev-1-1-0' for one"),
    (nlvr2_scores, ({"dev-1-0-0": True}, {"dev-1-0-0": "True"}), "must be text, got True"),
    (caption_scores, (ONE, {"q": []}), r"references\['q'\] must be captions, one at least, got"),
    (caption_scores, (ONE, {"q": "yes"}), r"references\['q'\] must be captions, one at least"),
    (caption_scores, (ONE, {"q": ["yes", ""]}), r"references\['q'\] must have words, got ''"),
    (caption_scores, (ONE, {"q": ["..."]}), r"references\['q'\] must have words, got '\.\.\.'"),
    (caption_scores, (ONE, {"q": ["a"]}, "nltk"), "tokenizer must be one of auto, ptb, regex; got"),
]


@pytest.mark.parametrize(("score", "arguments", "message"), BAD)
def test_bad_input_is_refused(
    score: Callable[..., Any],
    arguments: tuple[Any, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=message) as refused:
        score(*arguments)
    assert "\n" not in str(refused.value)
