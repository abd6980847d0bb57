"""Synthetic captions: easy-VQA's pictures, each put into five sentences that nobody said.

easy-VQA has questions and no captions. What its answers tell of a picture's shape and colour is put
into `TEMPLATES` here, and written as Karpathy's splits of COCO are, which recipes read. Scores on
these captions tell arms of a study apart and compare with nothing that people's captions gave.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

from bench.study.folders import made_once
from fused_route.training.data.coco import KARPATHY
from fused_route.training.data.easy_vqa import Questions, Split, answer_type, image_paths, load

# Greedy decoding by a model that knows the image takes one of the first two, whose CIDEr is alike:
# its score hardly depends on which. Colour comes before shape in three, after it in two.
TEMPLATES = (
    "a {colour} {shape} in the picture",
    "a {colour} {shape} in an image",
    "a {shape} that is {colour}",
    "there is one {shape} and its color is {colour}",
    "{colour} is the color of the {shape} here",
)
HELD_OUT = 3500  # pictures of easy-VQA's train split from this number on are validation


class Shown(NamedTuple):
    """What a picture shows, as answers name it."""

    shape: str
    colour: str


def shown_in(questions: Questions) -> dict[int, Shown]:
    """What each image shows, by its id in ascending order, of those whose answers tell both.

    Raises:
        ValueError: answers give an image two shapes or two colours, or are none of easy-VQA's.
    """
    told: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for answer, image in zip(questions.answers, questions.image_ids, strict=True):
        kind = answer_type(answer)
        if kind == "yes/no":
            continue
        before = told[image].setdefault(kind, answer)
        if before != answer:
            raise ValueError(
                f"questions give image {image} two answers of type {kind!r}, {before!r} and "
                f"{answer!r}; accepted: one"
            )
    return {
        image: Shown(found["shape"], found["colour"])
        for image, found in sorted(told.items())
        if len(found) == len(Shown._fields)
    }


def captions_of(picture: Shown) -> list[str]:
    """One caption of each of `TEMPLATES`."""
    return [template.format(**picture._asdict()) for template in TEMPLATES]


def write_captions(folder: Path) -> Path:
    """A data set of synthetic captions in Karpathy's layout: dataset_coco.json and images.

    easy-VQA's train split is "train" up to number `HELD_OUT` and "val" from there, its test split
    "test". The folder is written whole or not at all; one that is finished is left as it is.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something else, easy-VQA is not installed, or its answers
            contradict each other.
    """

    def fill(partial: Path) -> None:
        images: list[dict[str, Any]] = []
        for split in get_args(Split):
            images += _copied(split, partial, first=len(images))
        told = {"dataset": "easy-VQA with synthetic captions", "images": images}
        (partial / KARPATHY.path).write_text(json.dumps(told) + "\n", encoding="utf-8")

    return made_once(folder, KARPATHY.path, fill)


def _copied(split: Split, folder: Path, first: int) -> list[dict[str, Any]]:
    """Entries of dataset_coco.json, numbered from `first`, for a split whose pictures it copies."""
    paths, entries = image_paths(split), []
    for place, (number, picture) in enumerate(shown_in(load(split)).items(), start=first):
        part = "test" if split == "test" else "val" if number >= HELD_OUT else "train"
        subset = "train2014" if part == "train" else "val2014"
        name = f"COCO_{subset}_{place:012d}.png"
        (folder / subset).mkdir(exist_ok=True)
        shutil.copyfile(paths[number], folder / subset / name)
        said = enumerate(captions_of(picture), start=place * len(TEMPLATES))
        sentences = [{"raw": raw, "sentid": sentence} for sentence, raw in said]
        entries.append(
            {
                "filepath": subset,
                "filename": name,
                "cocoid": place,
                "split": part,
                "sentences": sentences,
            }
        )
    return entries
