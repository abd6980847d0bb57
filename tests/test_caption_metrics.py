"""Scores of captions, against the formulas by hand and against the official pipeline."""

import gc
import importlib
import importlib.util
import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fused_route.training.metrics.captions import (
    caption_scores,
    ptb_words,
    regex_words,
    wordless,
)

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java")
WITH_PTB = pytest.param("ptb", marks=needs_java)

WORDS = {
    "A man riding a horse.": "a man riding a horse",
    " A kitchen with cabinets, a stove ,  and a TV ": "a kitchen with cabinets a stove and a tv",
    "Is that a dog? No; it's: a cat!": "is that a dog no it 's a cat",
    "The boy's dogs' toys aren't here": "the boy 's dogs toys are n't here",
    "They can't, he'll, I'd and we've": "they ca n't he 'll i 'd and we 've",
    "You cannot go; I'm gonna": "you can not go i 'm gon na",
    "A black-and-white photo - of a t-shirt": "a black-and-white photo of a t-shirt",
    "A semi- automatic dog -- or cat": "a semi automatic dog or cat",
    "A 3-year-old at 5:30 p.m. with 1,000 men": "a 3-year-old at 5:30 p.m. with 1,000 men",
    "St. Mary's Ave. in the U.S.": "st. mary 's ave. in the u.s.",
    "A man and/or a dog, 24/7, 3.5 ft": "a man and/or a dog 24/7 3.5 ft",
    "A sign (red) says 'stop' or \"go\"": "a sign -lrb- red -rrb- says stop or go",
    "A ‘sign’ “reads” the dog’s name…": "a sign reads the dog 's name",
    "Black & white, 50% off for $5 #1 #dog": "black & white 50 % off for $ 5 # 1 #dog",
    "Two o'clock... wait!! what?!": "two o'clock wait !! what ?!",
    "J. Smith in the U.K. with plan b. too": "j. smith in the u.k. with plan b. too",
    "A café: 日本 man—woman 😀": "a café 日本 man woman",
    "red,white and `blue`": "red white and blue",
    "<unk> a*b": "<unk> a * b",
    "...": "",
    "": "",
    # ends of lines to the PTB tokenizer
    "a\r\ndog\x0bon\x0ca\u2028red\u2029mat\n": "a dog on a red mat",
}


@pytest.mark.parametrize("cut", [regex_words, pytest.param(ptb_words, marks=needs_java)])
@needs_package
def test_words(cut: Callable[[list[str]], list[str]]) -> None:
    """The regular expression and the PTB tokenizer cut plain text the same."""
    assert dict(zip(WORDS, cut(list(WORDS)), strict=True)) == WORDS


@pytest.mark.parametrize("tokenizer", ["regex", WITH_PTB])
@needs_package
def test_texts_without_words_are_those_that_no_score_is_of(tokenizer: str) -> None:
    texts = ["???", "!!", "$", "&", "(", "日本", "...", ".", " -- ", "“", "", " ", "𝐀𝐁"]
    nothing = {"...", ".", " -- ", "“", "", " "} | ({"𝐀𝐁"} if tokenizer == "ptb" else set())
    assert wordless(texts, tokenizer) == nothing
    assert wordless(["", " "], tokenizer) == {"", " "} and wordless([], tokenizer) == set()
    for text in texts:
        if text in nothing:
            with pytest.raises(ValueError, match="must have words"):
                caption_scores({"1": "a"}, {"1": [text]}, tokenizer)


Texts = Mapping[str, str]
Said = Mapping[str, Sequence[str]]


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def bleu_by_hand(predictions: Texts, references: Said) -> list[float]:
    """BLEU-1 to 4: min(1, exp(1 − r/c)) · (p_1 … p_n)^(1/n), of all images together.

    p_k is how many k-grams are in a reference, each as often as in one of them at most, of how
    many; c the words given, r those of the reference nearest in length, the shorter of two.
    """
    scores, product, c, r = [], 1.0, 1e-15, 1e-9  # so that nothing given is no division by 0
    for key, text in predictions.items():
        given = len(text.split())
        c += given
        r += min((abs(len(said.split()) - given), len(said.split())) for said in references[key])[1]
    for n in range(1, 5):
        matches, total = 1e-15, 1e-9
        for key, text in predictions.items():
            most: Counter[tuple[str, ...]] = Counter()
            for said in references[key]:
                most |= grams(said, n)
            matches += (grams(text, n) & most).total()
            total += grams(text, n).total()
        product *= matches / total
        scores.append(product ** (1 / n) * min(1.0, math.exp(1 - r / c)))
    return scores


def common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + common(one[1:], other[1:])
    return max(common(one[1:], other), common(one, other[1:]))


def rouge_by_hand(predictions: Texts, references: Said) -> float:
    """Mean of (1 + β²)PR / (R + β²P), with the best P and the best R of the references, β = 1.2."""
    scores = []
    for key, text in predictions.items():
        pairs = [(common(text.split(), s.split()), len(s.split())) for s in references[key]]
        P = max(length for length, _ in pairs) / max(1, len(text.split()))
        R = max(length / words for length, words in pairs)
        scores.append(2.44 * P * R / (R + 1.44 * P) if P else 0.0)
    return sum(scores) / len(scores)


def cider_by_hand(predictions: Texts, references: Said) -> float:
    """Mean of 10/4 Σ_n ⟨min(g, h), h⟩ / (‖g‖‖h‖) · exp(−δ²/(2·6²)), over images and references h.

    g and h are counts of n-grams times log(images / images with it in a reference), and δ is the
    difference of their numbers of bigrams.
    """

    def weighted(text: str, n: int) -> dict[tuple[str, ...], float]:
        seen = {
            gram: sum(any(grams(said, n)[gram] for said in each) for each in references.values())
            for gram in grams(text, n)
        }
        return {
            gram: count * math.log(len(references) / max(1, seen[gram]))
            for gram, count in grams(text, n).items()
        }

    scores = []
    for key, text in predictions.items():
        for said in references[key]:
            delta = grams(text, 2).total() - grams(said, 2).total()
            for n in range(1, 5):
                g, h = weighted(text, n), weighted(said, n)
                norms = math.hypot(*g.values()) * math.hypot(*h.values())
                inner = sum(min(g[gram], h[gram]) * h[gram] for gram in g.keys() & h.keys())
                cosine = inner / norms if norms else 0.0
                share = 10 / 4 / len(references[key]) / len(references)
                scores.append(share * cosine * math.exp(-(delta**2) / 72))
    return math.fsum(scores)


def drawn(seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions of a few words, so that many recur, some predictions empty."""
    rng = random.Random(seed)

    def caption(least: int) -> str:
        return " ".join(rng.choices("abcdef", k=rng.randint(least, 9)))

    references = {f"i{k}": [caption(1) for _ in range(rng.randint(1, 4))] for k in range(6)}
    return {key: caption(0) for key in references}, references


@needs_package
@pytest.mark.parametrize("seed", range(8))
def test_as_the_formulas(seed: int) -> None:
    predictions, references = drawn(seed)
    found = caption_scores(predictions, references, "regex").scores
    *bleu, rouge, cider = (
        *bleu_by_hand(predictions, references),
        rouge_by_hand(predictions, references),
        cider_by_hand(predictions, references),
    )
    expected = {f"bleu_{n}": score for n, score in enumerate(bleu, 1)}
    expected |= {"rouge_l": rouge, "cider": cider, "images": 6.0}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@needs_package
def test_by_hand() -> None:
    """Of two images one is right: idf("a") = log 2/2 = 0, and no n-gram is longer than two."""
    given = {"1": "A dog.", "2": "A cat"}
    found = caption_scores(given, {"2": ["a bird"], "1": ["a dog"]}, "regex")
    assert found.scores["bleu_1"] == pytest.approx(3 / 4)
    assert found.scores["bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 2))
    assert found.scores["rouge_l"] == pytest.approx((1 + 1 / 2) / 2)
    assert found.scores["cider"] == pytest.approx(10 * (1 + 1 + 0 + 0) / 4 / 2)
    assert found.each == pytest.approx({"1": 10 * (1 + 1 + 0 + 0) / 4, "2": 0.0})
    # two of three words, half as many as said: e^(1 − 6/3); their order is kept by two of six
    short = caption_scores({"1": "the the cat"}, {"1": ["the cat sat on a mat"]}, "regex").scores
    assert short["bleu_1"] == pytest.approx(2 / 3 * math.exp(-1))
    assert short["rouge_l"] == pytest.approx(2.44 * 2 / 9 / (1 / 3 + 1.44 * 2 / 3))
    assert short["cider"] == 0.0


@needs_package
def test_an_empty_caption_scores_nothing() -> None:
    found = caption_scores({"1": "", "2": " \n"}, {"1": ["a dog"], "2": ["a cat"]}, "regex")
    assert found.scores == {**dict.fromkeys(found.scores, 0.0), "images": 2.0}


@needs_package
@pytest.mark.parametrize("folder", ["empty", "a java that does not run"])
def test_without_java(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if folder != "empty":
        program(tmp_path / "java", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = caption_scores({"1": "a dog"}, {"1": ["a dog"]})
    assert found.tokenizer == "regex" and "meteor" not in found.scores
    assert found.note.startswith("1 images, the source of") and "not of the PTB" in found.note
    with pytest.raises(ValueError, match="tokenizer 'ptb' needs `java`, which does not run here"):
        caption_scores({"1": "a dog"}, {"1": ["a dog"]}, "ptb")


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


FAILURES = {
    r"*PTBTokenizer*) printf 'a\nb'; echo full >&2; exit 3": "gave 2 lines for 2 .* 3: full$",
    "*PTBTokenizer*) echo a; echo b": "the PTB tokenizer gave 3 lines for 2 .* 0: no message$",
    "*meteor*) echo full >&2; exit 1": "METEOR failed: full$",
    "*meteor*) exec <&-; echo; exec sleep 9": "METEOR failed: .*Broken pipe$",
    "*meteor*) while read x; do echo; done": "METEOR failed: could not convert string to float",
}


@needs_package
@needs_java
@pytest.mark.parametrize("case", FAILURES)
def test_a_java_that_fails(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = shutil.which("java")
    program(tmp_path / "java", f'case "$*" in {case} ;; *) exec {java} "$@" ;; esac')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match=FAILURES[case]) as refused:
        caption_scores({"1": "a dog"}, {"1": ["a dog", "b"]})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tokenizer", "module"),
    [("regex", "bleu.bleu"), pytest.param("ptb", "tokenizer.ptbtokenizer", marks=needs_java)],
)
def test_a_missing_package(tokenizer: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"pycocoevalcap.{module}", None)
    with pytest.raises(ValueError, match=r"run: pip install 'fused-route\[captions\]'$"):
        caption_scores({"1": "a dog"}, {"1": ["a dog"]}, tokenizer)


# A last "b." is two words before "A man" and one before "two dogs": the order counts.
PREDICTIONS = {
    "7": "A man's riding a brown horse on the beach!",
    "5": "the kitchen has a stove; a sink and a refrigerator by plan b.",
    "3": "two dogs (black-and-white) play with a red frisbee, don't they?",
    "9": "A woman is holding an umbrella\nin the rain",
    "2": "",
}
REFERENCES = {
    "3": ["Two dogs are playing with a frisbee.", "A pair of dogs fighting over a red frisbee"],
    "5": [
        "A kitchen with a stove, a sink and a refrigerator.",
        "Plan b: an empty kitchen at 5:30 p.m.",
    ],
    "7": ["A man rides a horse on a beach.", "A person riding his horse", "Horse & rider, beach"],
    "9": ["A woman with an umbrella walks in the rain."],
    "2": ["A cat"],
}

OFFICIAL = {
    "bleu_1": 0.6667, "bleu_2": 0.5258, "bleu_3": 0.3740, "bleu_4": 0.2822,
    "meteor": 0.3767, "rouge_l": 0.5398, "cider": 1.7388,
}  # fmt: skip


def official(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What COCOEvalCap computes, without SPICE, which would be downloaded."""
    pipeline: Any = importlib.import_module("pycocoevalcap.eval")
    started = []

    class Meteor(pipeline.Meteor):
        def __init__(self) -> None:
            super().__init__()
            started.append(self.meteor_p)

    spice = SimpleNamespace(method=lambda: "SPICE", compute_score=lambda *_: (0.0, [0.0] * 5))
    monkeypatch.setattr(pipeline, "Spice", lambda: spice)
    monkeypatch.setattr(pipeline, "Meteor", Meteor)
    images = {k: [{"caption": text} for text in texts] for k, texts in REFERENCES.items()}
    given = {k: [{"caption": text}] for k, text in PREDICTIONS.items()}
    coco = SimpleNamespace(getImgIds=lambda: list(REFERENCES), imgToAnns=images)
    evaluation = pipeline.COCOEvalCap(coco, SimpleNamespace(imgToAnns=given))
    evaluation.evaluate()
    for process in started:
        process.kill()
        with process:  # closes its pipes
            pass
    del evaluation.eval["SPICE"]
    return {name.lower(): float(score) for name, score in evaluation.eval.items()}


@needs_package
@pytest.mark.parametrize("tokenizer", ["regex", WITH_PTB])
def test_scored_quietly_and_as_the_official_pipeline(
    tokenizer: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is printed or left open; of plain captions both tokenizers give the same scores."""
    left: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr(sys, "unraisablehook", lambda given: left.append(given.exc_value))
        found = caption_scores(PREDICTIONS, REFERENCES, tokenizer)
        gc.collect()
    assert capfd.readouterr() == ("", "") and left == []
    assert found.tokenizer == tokenizer and found.note.startswith("5 images, the source of")
    scores = {name: score for name, score in found.scores.items() if name != "images"}
    if tokenizer == "regex":
        assert found.note.endswith("without METEOR")
        scores["meteor"] = OFFICIAL["meteor"]
    else:
        assert found.note.endswith("as in published scores")
        assert scores == official(monkeypatch)
    assert scores == pytest.approx(OFFICIAL, abs=5e-5)
