"""Answers as classes: the vocabulary of VQAv2's usual rule, and soft scores as targets."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets

from fused_route.checks import shown, whole
from fused_route.training.files import atomic_file
from fused_route.training.metrics.vqa_accuracy import normalized

BATCH = 10_000  # rows read at a time
Form = Callable[[str], str]


def as_given(answer: str) -> str:
    """The form of answers that are scored as they are, GQA's for one."""
    return answer


def vocabulary(rows: datasets.Dataset, least: int = 9, form: Form = normalized) -> list[str]:
    """The answers to at least `least` questions, in their form; the most frequent first.

    Counted is `answer`, one a question; among equally frequent ones the order is alphabetical. By
    this rule VQAv2's train and val together are said to have 3,129.

    Raises:
        ValueError: `least` is no whole number of at least 1, or no answer is frequent enough.
    """
    whole("least", least)
    raw: Counter[str] = Counter()
    for batch in rows.select_columns(["answer"]).with_format("arrow").iter(BATCH):
        raw.update(batch.column("answer").to_pylist())
    raw.pop("", None)  # of a question without an answer
    counts: Counter[str] = Counter()
    for answer, number in raw.items():
        counts[form(answer)] += number
    kept = [answer for answer, number in counts.items() if number >= least]
    if not kept:
        raise ValueError(
            f"no answer is that of least={least} of {len(rows)} questions, "
            f"the most frequent of {max(counts.values(), default=0)}: lower it"
        )
    return sorted(kept, key=lambda answer: (-counts[answer], answer))


def soft_score(count: int, of: int) -> float:
    """What an answer is worth that `count` of `of` people gave, in [0, 1].

    As `vqa_accuracy` counts it: of ten people 0, 1, 2, 3 and 4 or more give 0, 0.3, 0.6, 0.9 and
    1. One alone has no others to agree with, and is right.

    Raises:
        ValueError: `count` is not from 0 to `of`, or `of` below 1.
    """
    if whole("count", count, least=0) > whole("of", of):
        raise ValueError(f"count must be at most of={of}, got {count}")
    if of == 1:
        return float(count)
    # each of the people against the others: who said the same has count − 1 that agree
    return (count * min(3, max(count - 1, 0)) + (of - count) * min(3, count)) / (3 * of)


def soft_targets(
    references: Sequence[str], index: Mapping[str, int], form: Form = normalized
) -> dict[int, float]:
    """The soft score of each reference that has a class, by class.

    Args:
        references: what people answered, as they wrote it.
        index: class of each answer of a vocabulary.
        form: of the vocabulary's answers.
    """
    counts = Counter(map(form, references))
    return {
        index[answer]: soft_score(count, len(references))
        for answer, count in counts.items()
        if answer in index
    }


def write_vocabulary(path: Path, answers: Sequence[str]) -> None:
    """Writes a JSON list of the answers by class, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(list(answers), indent=0, ensure_ascii=False) + "\n").encode())


def read_vocabulary(path: Path) -> list[str]:
    """The answers by class, of a JSON list, or of {answer: class} as trainval_ans2label.json is.

    Raises:
        ValueError: no such file, or one that is no list of distinct texts and no object with each
            of the classes 0 to n − 1 once.
    """
    try:
        held = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken JSON: {error}") from None
    classes = held if isinstance(held, dict) else None
    if classes is not None:
        numbers = list(classes.values())
        if any(type(n) is not int for n in numbers) or sorted(numbers) != list(range(len(numbers))):
            raise ValueError(
                f"{path} must give {len(numbers)} answers the classes 0 to {len(numbers) - 1}, "
                f"each once; got {shown(numbers)}"
            )
        held = sorted(classes, key=lambda answer: classes[answer])
    if not isinstance(held, list) or not all(isinstance(answer, str) for answer in held):
        raise ValueError(f"{path} must hold a list of answers or their classes, got {shown(held)}")
    if not held or len(set(held)) < len(held):
        again = [answer for answer, number in Counter(held).items() if number > 1]
        raise ValueError(f"{path} must hold distinct answers, one at least; twice: {shown(again)}")
    return held
