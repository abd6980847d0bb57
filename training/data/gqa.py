"""GQA: questions about scenes, each with one answer; an object of questions by id a file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fused_route.training.data.json_files import Entry, entries
from fused_route.training.data.splits import Needed, Row, Split

IMAGES = "images"
# Behind the kind of a question that is in the files of all and not in the balanced ones: it is
# answered, and the official accuracy does not count it.
UNBALANCED = " (unbalanced)"
TRAIN_ALL = tuple(f"train_all_questions/train_all_questions_{part}.json" for part in range(10))
# name of a split: its files, and whether answers are public
FILES = {
    "train": (("train_balanced_questions.json",), "given"),
    "val": (("val_balanced_questions.json",), "given"),
    "testdev": (("testdev_balanced_questions.json",), "given"),
    "test": (("test_balanced_questions.json",), "withheld"),
    "train-all": (TRAIN_ALL, "given"),
    "val-all": (("val_all_questions.json",), "given"),
}


def _rows(root: Path, role: str, files: tuple[str, ...], answers: str) -> Iterator[Row]:
    for file in files:
        for key, question in entries(root / file):
            given = answers == "given" and "answer" in question.values
            answer = question.get("answer", str) if given else ""
            yield {
                "id": key,
                "images": [f"{question.get('imageId', str)}.jpg"],
                "text": question.get("question", str),
                "answer": answer,
                "references": [answer] if given else [],
                "kind": _kind(question),
            }


def _kind(question: Entry) -> str:
    types = question.get("types", dict) if question.values.get("types") else {}
    balanced = question.values.get("isBalanced", True)
    return str(types.get("structural") or "") + ("" if balanced else UNBALANCED)


SPLITS = {
    name: Split(
        rows=partial(_rows, files=files, answers=answers),
        files=tuple(Needed(file, "unpack questions1.2.zip in {folder}") for file in files),
        folders=(Needed("", "unpack images.zip so that {folder} has its files"),),
        answers=answers,
    )
    for name, (files, answers) in FILES.items()
}
