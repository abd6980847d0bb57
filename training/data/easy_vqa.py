"""easy-VQA: 5,000 images of one coloured shape, with questions; data set of the demo.

38,575 questions about 4,000 training images, 9,673 about 1,000 test images; 13 answers, one of
which is right. The answer alone gives the type of a question: "yes/no", "shape" or "colour".
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from fused_route.training.packages import missing

ANSWER_TYPES = ("yes/no", "shape", "colour")
SHAPES = frozenset(("circle", "rectangle", "triangle"))
COLOURS = frozenset(("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"))

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Questions:
    """Questions of one split, in the order of the files: three lists of equal length.

    `image_ids` are indices into `image_paths` of the same split.
    """

    texts: list[str]
    answers: list[str]
    image_ids: list[int]


def answer_type(answer: str) -> str:
    """The one of `ANSWER_TYPES` that an answer belongs to; ValueError if it is none of the 13."""
    if answer in ("yes", "no"):
        return "yes/no"
    if answer in SHAPES:
        return "shape"
    if answer in COLOURS:
        return "colour"
    raise ValueError(f"{answer!r} is no answer of easy-VQA")


def answer_labels() -> list[str]:
    """The 13 answers in alphabetical order; the class id of an answer is its index here."""
    return sorted({"yes", "no"} | SHAPES | COLOURS)


def load(split: Split) -> Questions:
    """The questions of a split; ValueError where the data set is not installed."""
    package = _package()
    _check_split(split)
    read = package.get_train_questions if split == "train" else package.get_test_questions
    texts, answers, image_ids = read()
    return Questions(texts, answers, image_ids)


def image_paths(split: Split) -> list[Path]:
    """PNG files of a split, 64 × 64 RGB; the index is the image id.

    Raises:
        ValueError: the data set is not installed, or an image id below the largest has no file.
    """
    package = _package()
    _check_split(split)
    read = package.get_train_image_paths if split == "train" else package.get_test_image_paths
    by_id: dict[int, str] = read()
    missing = sorted(set(range(max(by_id, default=0) + 1)) - by_id.keys())
    if missing:
        raise ValueError(f"easy-vqa's {split} split lacks image {missing[0]}; reinstall easy-vqa")
    return [Path(by_id[i]) for i in range(len(by_id))]


def majority_baseline(train: Questions, test: Questions) -> list[str]:
    """For each test question, the most frequent answer of the training split."""
    return [Counter(train.answers).most_common(1)[0][0]] * len(test.texts)


def question_only_baseline(train: Questions, test: Questions) -> list[str]:
    """For each test question, the most frequent training answer to that very text.

    What can be known without the image. A text that training lacks gets the majority answer; of
    equally frequent answers the one that training meets first is taken.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in zip(train.texts, train.answers, strict=True):
        counts[text][answer] += 1
    best = {text: of_text.most_common(1)[0][0] for text, of_text in counts.items()}
    majority = Counter(train.answers).most_common(1)[0][0]
    return [best.get(text, majority) for text in test.texts]


def accuracy_by_type(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Fraction of right answers in [0, 1]: "all" and each of `ANSWER_TYPES`.

    The type of a question is the type of its true answer. A type without questions gets nan.

    Raises:
        ValueError: the two differ in length, are empty, or a true answer is none of easy-VQA's.
    """
    if len(predicted) != len(truth) or not truth:
        raise ValueError(f"got {len(predicted)} predictions for {len(truth)} true answers")
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for guess, answer in zip(predicted, truth, strict=True):
        for key in ("all", answer_type(answer)):
            total[key] += 1
            right[key] += guess == answer
    keys = ("all", *ANSWER_TYPES)
    return {key: right[key] / total[key] if total[key] else float("nan") for key in keys}


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise missing("easy_vqa") from error
    package: ModuleType = easy_vqa
    return package
