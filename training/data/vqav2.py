"""VQAv2: questions about COCO's images, each with the answers of ten people."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fused_route.training.data.coco import KARPATHY, KARPATHY_SPLITS, image_folder, karpathy_images
from fused_route.training.data.json_files import Entry, items
from fused_route.training.data.splits import Needed, Row, Split


@dataclass(frozen=True)
class Subset:
    """Files of one subset: questions, annotations where they are public, folder of images."""

    questions: Needed
    annotations: Needed | None
    images: str


def _subset(name: str, archive: str, images: str, answers: str) -> Subset:
    questions = Needed(
        f"v2_OpenEnded_mscoco_{name}_questions.json",
        f"unpack v2_Questions_{archive}_mscoco.zip in {{folder}}",
    )
    annotations = Needed(
        f"v2_mscoco_{name}_annotations.json",
        f"unpack v2_Annotations_{archive}_mscoco.zip in {{folder}}",
    )
    return Subset(questions, annotations if answers == "given" else None, images)


SUBSETS = {
    "train": _subset("train2014", "Train", "train2014", "given"),
    "val": _subset("val2014", "Val", "val2014", "given"),
    "test": _subset("test2015", "Test", "test2015", "withheld"),
    "test-dev": _subset("test-dev2015", "Test", "test2015", "withheld"),
}


def _rows(root: Path, role: str, subset: str) -> Iterator[Row]:
    files = SUBSETS[subset]
    answers = Answers(files.annotations.under(root)) if files.annotations else None
    for question in items(files.questions.under(root), "questions"):
        number, image = question.get("question_id", int), question.get("image_id", int)
        answer, references, kind = answers.of(number) if answers else NO_ANSWER
        yield {
            "id": str(number),
            "images": [f"{files.images}/COCO_{files.images}_{image:012d}.jpg"],
            "text": question.get("question", str),
            "answer": answer,
            "references": references,
            "kind": kind,
        }


def _karpathy(root: Path, role: str, split: str) -> Iterator[Row]:
    """The questions of train and val about the images of one of Karpathy's splits."""
    selected = {
        f"{image.get('filepath', str)}/{image.get('filename', str)}"
        for image in karpathy_images(root, split)
    }
    for subset in ("train", "val"):
        yield from (row for row in _rows(root, role, subset) if row["images"][0] in selected)


Answer = tuple[str, list[str], str]  # answer, references, kind
NO_ANSWER: Answer = ("", [], "")


class Answers:
    """The annotations of a file, by question.

    The file is read as far as the last question that was asked for. The official files have
    questions and annotations in the same order, so that nothing waits; in another order, what
    was read before its turn waits in memory.
    """

    def __init__(self, file: Path) -> None:
        self.unread = items(file, "annotations")
        self.waiting: dict[int, Answer] = {}

    def of(self, question: int) -> Answer:
        """Those to a question, `NO_ANSWER` where the file has none."""
        if question in self.waiting:
            return self.waiting.pop(question)
        for annotation in self.unread:
            answer = _answer(annotation)
            if annotation.get("question_id", int) == question:
                return answer
            self.waiting[annotation.get("question_id", int)] = answer
        return NO_ANSWER


def _answer(annotation: Entry) -> Answer:
    return (
        annotation.get("multiple_choice_answer", str),
        [said.get("answer", str) for said in annotation.inner("answers")],
        annotation.get("answer_type", str),
    )


def _split(name: str) -> Split:
    files = SUBSETS[name]
    return Split(
        rows=partial(_rows, subset=name),
        files=(files.questions,) + ((files.annotations,) if files.annotations else ()),
        folders=(image_folder(files.images),),
        answers="given" if files.annotations else "withheld",
    )


def _karpathy_split(name: str) -> Split:
    both = [_split("train"), _split("val")]
    return Split(
        rows=partial(_karpathy, split=name),
        files=(KARPATHY, *(file for split in both for file in split.files)),
        folders=tuple(folder for split in both for folder in split.folders),
    )


SPLITS = {name: _split(name) for name in SUBSETS} | {
    name: _karpathy_split(name) for name in KARPATHY_SPLITS
}
