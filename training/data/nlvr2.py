"""NLVR2: is a sentence true of two photographs; an object a line."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fused_route.training.data.json_files import Entry, lines
from fused_route.training.data.splits import Needed, Row, Split

LABELS = {"True": "true", "False": "false"}
# name of a split: its folder of images, and the archive of them
FOLDERS = {
    "train": ("images/train", "train_img.zip"),
    "dev": ("dev", "dev_img.zip"),
    "test1": ("test1", "test1_img.zip"),
}


def _file(split: str) -> Needed:
    name = f"{split}.json"
    fix = f"put nlvr2/data/{name} of https://github.com/lil-lab/nlvr into {{folder}}"
    return Needed(name, fix, elsewhere=f"data/{name}")


def _rows(root: Path, role: str, split: str) -> Iterator[Row]:
    for sentence in lines(_file(split).under(root)):
        label = sentence.get("label", str)
        if label not in LABELS:
            raise sentence.error(f"has the label {label!r}; it must be one of {', '.join(LABELS)}")
        yield {
            "id": sentence.get("identifier", str),
            "images": _images(sentence, split),
            "text": sentence.get("sentence", str),
            "answer": LABELS[label],
            "references": [LABELS[label]],
            "kind": "",
        }


def _images(sentence: Entry, split: str) -> list[str]:
    """Names of the two images: those of the sentence without the last part of its number."""
    pair, _, _ = sentence.get("identifier", str).rpartition("-")
    folder, _ = FOLDERS[split]
    if split == "train":  # too many for one folder
        kind = str if isinstance(sentence.values.get("directory"), str) else int
        folder += f"/{sentence.get('directory', kind)}"
    return [f"{folder}/{pair}-img{side}.png" for side in (0, 1)]


SPLITS = {
    name: Split(
        rows=partial(_rows, split=name),
        files=(_file(name),),
        folders=(Needed(folder, f"unpack {archive} in {{folder}}"),),
    )
    for name, (folder, archive) in FOLDERS.items()
}
