"""COCO's captions: the official files, and Karpathy's splits of the images of 2014."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fused_route.training.data.json_files import Entry, items
from fused_route.training.data.splits import Needed, Row, Split

KARPATHY = Needed("dataset_coco.json", "unpack caption_datasets.zip in {folder}")
# The splits of dataset_coco.json that each is made of.
KARPATHY_SPLITS = {
    "karpathy-train": ("train", "restval"),
    "karpathy-val": ("val",),
    "karpathy-test": ("test",),
}
OFFICIAL = ("train2014", "val2014", "train2017", "val2017")


def image_folder(name: str) -> Needed:
    """A folder of COCO's images, as its archive of the same name holds it."""
    return Needed(name, f"unpack {name}.zip in {{folder}}")


def karpathy_images(root: Path, split: str) -> Iterator[Entry]:
    """The images of one of `KARPATHY_SPLITS` in dataset_coco.json."""
    for image in items(KARPATHY.under(root), "images"):
        if image.get("split", str) in KARPATHY_SPLITS[split]:
            yield image


def captions_file(subset: str) -> Needed:
    """The official captions of one of `OFFICIAL`."""
    archive = f"annotations_trainval{subset[-4:]}.zip"
    return Needed(f"annotations/captions_{subset}.json", f"unpack {archive} in {{folder}}")


def _karpathy(root: Path, role: str, split: str) -> Iterator[Row]:
    for image in karpathy_images(root, split):
        name = f"{image.get('filepath', str)}/{image.get('filename', str)}"
        captions = [(c.get("sentid", int), c.get("raw", str)) for c in image.inner("sentences")]
        if role == "train":
            yield from (_row(number, name, said, [said]) for number, said in captions)
        else:
            yield _row(image.get("cocoid", int), name, "", [said for _, said in captions])


def _official(root: Path, role: str, subset: str) -> Iterator[Row]:
    file = captions_file(subset).under(root)
    names = {
        image.get("id", int): f"{subset}/{image.get('file_name', str)}"
        for image in items(file, "images")
    }
    captions: defaultdict[int, list[str]] = defaultdict(list)
    for entry in items(file, "annotations"):
        image, said = entry.get("image_id", int), entry.get("caption", str)
        if image not in names:
            raise entry.error(f"is about image {image}, which is not among the file's images")
        if role == "train":
            yield _row(entry.get("id", int), names[image], said, [said])
        else:
            captions[image].append(said)
    if role == "evaluate":
        yield from (_row(image, name, "", captions[image]) for image, name in names.items())


def _row(number: int, image: str, answer: str, references: list[str]) -> Row:
    return {
        "id": str(number),
        "images": [image],
        "text": "",
        "answer": answer,
        "references": references,
        "kind": "",
    }


SPLITS = {
    name: Split(
        rows=partial(_karpathy, split=name),
        files=(KARPATHY,),
        folders=(image_folder("train2014"), image_folder("val2014")),
    )
    for name in KARPATHY_SPLITS
} | {
    subset: Split(
        rows=partial(_official, subset=subset),
        files=(captions_file(subset),),
        folders=(image_folder(subset),),
    )
    for subset in OFFICIAL
}
