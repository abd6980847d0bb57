"""The data sets that training reads, in the layouts that they are published in."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fused_route.checks import one_of
from fused_route.training.data import coco, easy_vqa, gqa, nlvr2, vqav2
from fused_route.training.data.splits import Layout, Needed, Row, Split


def _easy_vqa_home() -> Path:
    """The folder of the package, which has data/<split>/images/<number>.png."""
    return easy_vqa.image_paths("train")[0].parents[3]


def _easy_vqa_rows(root: Path, role: str, split: easy_vqa.Split, images: range) -> Iterator[Row]:
    questions = easy_vqa.load(split)
    names = [path.relative_to(root).as_posix() for path in easy_vqa.image_paths(split)]
    found = zip(questions.texts, questions.answers, questions.image_ids, strict=True)
    for number, (text, answer, image) in enumerate(found):
        if image not in images:
            continue
        yield {
            "id": f"{split}-{number}",
            "images": [names[image]],
            "text": text,
            "answer": answer,
            "references": [answer],
            "kind": easy_vqa.answer_type(answer),
        }


def _easy_vqa_split(name: easy_vqa.Split, images: range = range(sys.maxsize)) -> Split:
    again = "install the package easy-vqa again"
    return Split(
        rows=partial(_easy_vqa_rows, split=name, images=images),
        files=(Needed(f"data/{name}/questions.json", again),),
        folders=(Needed(f"data/{name}/images", again),),
    )


# The package has two splits. "fit" and "validation" are the first 3,750 and the last 250 images of
# "train", for experiments that choose by other images than those they report on.
EASY_VQA = {
    "train": _easy_vqa_split("train"),
    "test": _easy_vqa_split("test"),
    "fit": _easy_vqa_split("train", range(3750)),
    "validation": _easy_vqa_split("train", range(3750, 4000)),
}

LAYOUTS = {
    "easy_vqa": Layout("vqa", EASY_VQA, home=_easy_vqa_home),
    "vqav2": Layout("vqa", vqav2.SPLITS),
    "coco": Layout("caption", coco.SPLITS),
    "gqa": Layout("gqa", gqa.SPLITS, images=gqa.IMAGES),
    "nlvr2": Layout("nlvr2", nlvr2.SPLITS),
}


def splits_of(layout: str, split: str) -> dict[str, Split]:
    """The splits, by name, that "train+val" is the union of.

    Raises:
        ValueError: unknown, the same twice, or some with answers and some without.
    """
    one_of("layout", layout, LAYOUTS)
    known = LAYOUTS[layout].splits
    names = split.split("+")
    for name in names:
        one_of(f"split of {layout} (or several, joined by +)", name, known)
    if len(set(names)) < len(names):
        raise ValueError(f"split={split!r} has a split twice: name each once")
    if len({known[name].answers for name in names}) > 1:
        raise ValueError(f"split={split!r} joins splits with answers and without: open them apart")
    return {name: known[name] for name in names}
