"""Scores of answers, by question, as the official evaluations of VQA, GQA and NLVR2 count them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from fused_route.checks import one_of, shown
from fused_route.training.metrics.vqa_accuracy import NORMALIZE, vqa_accuracy

EXACT: dict[str, Callable[[str], str]] = {
    "official": lambda answer: answer,
    "always": lambda answer: answer.strip().lower(),
}
# People who must have said an answer for it to count as 1, its own giver left out: min(1, 3 / 3).
AGREED = 4


def same_ids(
    name: str, given: Mapping[str, object], as_name: str, expected: Mapping[str, object]
) -> None:
    """ValueError unless `given` and `expected` are mappings with the same ids, one at least."""
    for argument, mapping in ((name, given), (as_name, expected)):
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{argument} must be a mapping from ids, got {shown(mapping)}")
    if not expected:
        raise ValueError(f"{as_name} are empty: there is nothing to score")
    for missing, where in (
        ([key for key in expected if key not in given], f"{name} lack ids of {as_name}"),
        ([key for key in given if key not in expected], f"{as_name} lack ids of {name}"),
    ):
        if missing:
            raise ValueError(f"{where}: {len(missing)} of them, {missing[0]!r} for one")


def text_of_each(name: str, given: Mapping[str, object]) -> None:
    """ValueError unless every value is text."""
    for key, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}[{key!r}] must be text, got {shown(value)}")


def _mean(scores: Iterable[float]) -> float:
    found = list(scores)
    return math.fsum(found) / len(found)


def means(scores: Mapping[str, float], kinds: Mapping[str, str] | None) -> dict[str, float]:
    """{"accuracy": mean of all} and, where kinds are given, "accuracy/<kind>" of each, sorted."""
    means = {"accuracy": _mean(scores.values())}
    if kinds is None:
        return means
    same_ids("kinds", kinds, "predictions", scores)
    text_of_each("kinds", kinds)
    for kind in sorted(set(kinds.values())):
        means[f"accuracy/{kind}"] = _mean(scores[key] for key in scores if kinds[key] == kind)
    return means


def exact_match(
    predictions: Mapping[str, str],
    answers: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
    normalize: str = "official",
) -> dict[str, float]:
    """Share of questions whose prediction equals the answer, in [0, 1], as GQA counts it.

    Args:
        predictions: question id → answer given.
        answers: question id → the right answer.
        kinds: question id → its kind (GQA's structural or semantic type), for a share of each.
        normalize: "official", compared as they are ("Yes" is not "yes"), as GQA's evaluation does;
            "always", stripped and in lower case.

    Returns:
        "accuracy" and, with kinds, "accuracy/<kind>" over the questions of that kind.

    Raises:
        ValueError: other ids in one mapping than in another, no questions, something that is no
            text, or an unknown way to normalize.
    """
    return means(each_exact(predictions, answers, normalize), kinds)


def each_exact(
    predictions: Mapping[str, str], answers: Mapping[str, str], normalize: str = "official"
) -> dict[str, float]:
    """Question id → 1.0 or 0.0, of which `exact_match` is the mean."""
    one_of("normalize", normalize, EXACT)
    same_ids("predictions", predictions, "answers", answers)
    text_of_each("predictions", predictions)
    text_of_each("answers", answers)
    form = EXACT[normalize]
    return {key: float(form(predictions[key]) == form(answers[key])) for key in answers}


def _vqa_score(key: str, prediction: str, said: Sequence[str], normalize: str) -> float:
    alone = isinstance(said, Sequence) and not isinstance(said, str) and len(said) == 1
    try:
        return vqa_accuracy(prediction, list(said) * AGREED if alone else said, normalize)
    except ValueError as error:
        raise ValueError(f"question {key!r}: {error}") from None


def vqa_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    kinds: Mapping[str, str] | None = None,
    normalize: str = "official",
) -> dict[str, float]:
    """Mean, over the questions, of the VQA accuracy, in [0, 1].

    A question with several references scores their `vqa_accuracy`, under which it takes four
    people for an answer to count 1. The reference of a question that has just one (easy-VQA) would
    count 0 beside its own giver; it is not one person's word but the right answer, so it counts as
    if four people had given it: 1 where the prediction equals it, else 0.

    Args:
        predictions: question id → answer given.
        references: question id → what people have said, ten as a rule, or the one right answer.
        kinds: question id → its answer type ("yes/no", "number", "other"), for a mean of each.
        normalize: as of `vqa_accuracy`; a single reference is compared as it is but for space
            around it under "official", and normalized like the prediction under "always".

    Returns:
        "accuracy" and, with kinds, "accuracy/<kind>" over the questions of that kind.

    Raises:
        ValueError: other ids in one mapping than in another, no questions, a question without
            references, something that is no text, or an unknown way to normalize.
    """
    return means(each_vqa(predictions, references, normalize), kinds)


def each_vqa(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    normalize: str = "official",
) -> dict[str, float]:
    """Question id → VQA accuracy, of which `vqa_scores` is the mean."""
    one_of("normalize", normalize, NORMALIZE)
    same_ids("predictions", predictions, "references", references)
    return {
        key: _vqa_score(key, predictions[key], said, normalize) for key, said in references.items()
    }


def _sentence(identifier: str) -> tuple[str, ...]:
    parts = identifier.split("-") if isinstance(identifier, str) else ()
    if len(parts) != 4:
        raise ValueError(
            f"an identifier of NLVR2 must be split-set-pair-sentence such as 'dev-850-0-1', "
            f"got {identifier!r}"
        )
    split, number, _, sentence = parts
    return split, number, sentence


def nlvr2_scores(predictions: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, float]:
    """Accuracy and consistency, both in [0, 1], as the evaluation of NLVR2 counts them.

    Labels ("True", "False") are compared without regard to case. An identifier is
    split-set-pair-sentence ("dev-850-0-1"); those that differ in the third part alone are of one
    sentence, shown with several pairs of images.

    Args:
        predictions: identifier → label given.
        answers: identifier → the right label.

    Returns:
        "accuracy", the share of right labels; "consistency", the share of sentences whose labels
        are right for all of their pairs of images.

    Raises:
        ValueError: other identifiers in one mapping than in the other, none, one that has not four
            parts, or a label that is no text.
    """
    right = each_nlvr2(predictions, answers)
    sentences: dict[tuple[str, ...], bool] = {}
    for key, is_right in right.items():
        sentence = _sentence(key)
        sentences[sentence] = sentences.get(sentence, True) and bool(is_right)
    return {"accuracy": _mean(right.values()), "consistency": _mean(sentences.values())}


def each_nlvr2(predictions: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, float]:
    """Identifier → 1.0 or 0.0, of which the accuracy of `nlvr2_scores` is the mean."""
    same_ids("predictions", predictions, "answers", answers)
    text_of_each("predictions", predictions)
    text_of_each("answers", answers)
    return {key: float(predictions[key].lower() == answers[key].lower()) for key in answers}
