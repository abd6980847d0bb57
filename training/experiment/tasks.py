"""What tasks ask of a model and how they are scored; the rows of an experiment's tasks as one."""

import bisect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from fused_route.training.data.answers import Form, as_given
from fused_route.training.data.gqa import UNBALANCED
from fused_route.training.data.samples import Samples, open_samples
from fused_route.training.experiment.recipe import Recipe, TaskRecipe
from fused_route.training.files import place
from fused_route.training.metrics.answers import (
    each_exact,
    each_nlvr2,
    each_vqa,
    means,
    nlvr2_scores,
)
from fused_route.training.metrics.captions import caption_scores
from fused_route.training.metrics.vqa_accuracy import normalized

Predictions = Mapping[str, str]
SHUFFLE = 0  # seed of the order of images under control="shuffled": the same for every run


class Scored(NamedTuple):
    """Scores of predictions.

    Attributes:
        main: the one by which models are compared.
        scores: all of them, by name.
        each: of each row, by its id; their mean is the main one.
    """

    main: float
    scores: dict[str, float]
    each: dict[str, float]


@dataclass(frozen=True)
class Task:
    """What a task is, whatever its data.

    Attributes:
        score: of predictions by id, for rows of the role "evaluate".
        candidates: the answers to choose among; empty: any text.
        targets: what is trained on: "answer", the row's; "sampled", one of its references, drawn
            by its score, which weighs the loss.
        images: of a row.
        form: of the answers that a classifier chooses among: one that `score` counts as right.
    """

    score: Callable[[Predictions, Samples, TaskRecipe], Scored]
    candidates: tuple[str, ...] = ()
    targets: str = "answer"
    form: Form = as_given
    images: int = 1


def _columns(samples: Samples, *names: str) -> list[dict[str, Any]]:
    table = samples.rows.select_columns(["id", *names]).to_dict()
    ids = table["id"]
    return [dict(zip(ids, table[name], strict=True)) for name in names]


def _vqa(predictions: Predictions, samples: Samples, recipe: TaskRecipe) -> Scored:
    references, kinds = _columns(samples, "references", "kind")
    each = each_vqa(predictions, references, recipe.normalize)
    scores = means(each, kinds)
    return Scored(scores["accuracy"], scores, each)


def _gqa(predictions: Predictions, samples: Samples, recipe: TaskRecipe) -> Scored:
    """Of the balanced questions, as the official accuracy; of all where none is balanced."""
    answers, kinds = _columns(samples, "answer", "kind")
    counted = {key for key, kind in kinds.items() if not kind.endswith(UNBALANCED)} or kinds.keys()
    predictions, answers, kinds = (
        {key: value for key, value in of.items() if key in counted}
        for of in (predictions, answers, kinds)
    )
    each = each_exact(predictions, answers, recipe.normalize)
    scores = means(each, kinds)
    return Scored(scores["accuracy"], scores, each)


def _nlvr2(predictions: Predictions, samples: Samples, recipe: TaskRecipe) -> Scored:
    (answers,) = _columns(samples, "answer")
    scores = nlvr2_scores(predictions, answers)
    return Scored(scores["accuracy"], scores, each_nlvr2(predictions, answers))


def _captions(predictions: Predictions, samples: Samples, recipe: TaskRecipe) -> Scored:
    """With "_regex" behind every name, and a line on standard error, without the PTB tokenizer."""
    (references,) = _columns(samples, "references")
    found = caption_scores(predictions, references)
    label = "" if found.tokenizer == "ptb" else f"_{found.tokenizer}"
    if label:
        print(f"captions: {found.note}", file=sys.stderr)
    scores = {f"{name}{label}": value for name, value in found.scores.items()}
    return Scored(found.scores["cider"], scores, found.each)


TASKS = {
    "vqa": Task(_vqa, targets="sampled", form=normalized),
    "gqa": Task(_gqa),
    "nlvr2": Task(_nlvr2, candidates=("true", "false"), images=2),
    "caption": Task(_captions),
}


class Rows(Dataset[dict[str, Any]]):
    """The rows of several tasks, one after the other.

    A row is that of `Samples`, with "name" (the task's in the recipe), "row" (the index that it was
    asked for by) and "paths" (files of its images). Indices go on behind the last: in another epoch
    the same rows have others.

    Attributes:
        samples: by the task's name.
        starts: index of each task's first row, and the number of all at the end.
        shuffled: by the task's name, whose images each row has instead of its own; empty: its own.
    """

    def __init__(self, samples: Mapping[str, Samples], control: str = "none") -> None:
        self.samples = dict(samples)
        self.control = control
        self.shuffled: dict[str, np.ndarray] = {}
        if control == "shuffled":
            draw = np.random.default_rng(SHUFFLE)
            self.shuffled = {n: _others(n, s, draw) for n, s in self.samples.items()}
        self.starts = [0, *accumulate(len(s.rows) for s in self.samples.values())]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index % len(self)
        place = bisect.bisect_right(self.starts, number) - 1
        name = list(self.samples)[place]
        samples = self.samples[name]
        within = number - self.starts[place]
        row: dict[str, Any] = samples.rows[within]
        shown = row if name not in self.shuffled else samples.rows[int(self.shuffled[name][within])]
        paths = [samples.path(image) for image in shown["images"]]
        return {**row, "name": name, "row": index, "paths": paths}

    def of(self, name: str) -> range:
        """The indices of a task's rows."""
        place = list(self.samples).index(name)
        return range(self.starts[place], self.starts[place + 1])

    def images(self) -> list[Path]:
        """Every image once, in the order of the rows."""
        found: dict[Path, None] = {}
        for samples in self.samples.values():
            for images in samples.rows["images"]:
                found.update((samples.path(image), None) for image in images)
        return list(found)

    def without(self, paths: Collection[Path]) -> "Rows":
        """Those that are about none of these images; a line for each task says how many went.

        Raises:
            ValueError: a task that has no others.
        """
        gone, kept = frozenset(paths), {}
        for name, samples in self.samples.items():
            every = samples.rows["images"]
            rows = [
                row
                for row, images in enumerate(every)
                if not any(samples.path(image) in gone for image in images)
            ]
            said = f"tasks.{name}: left out {len(every) - len(rows)} of {len(every)} rows"
            if not rows:
                raise ValueError(f"{said}, whose images cannot be read; none is left")
            if len(rows) < len(every) and place()[0] == 0:
                print(f"{said}: their images cannot be read any more", file=sys.stderr)
            all_kept = len(rows) == len(every)
            kept[name] = samples if all_kept else replace(samples, rows=samples.rows.select(rows))
        return Rows(kept, self.control)


def _others(name: str, samples: Samples, draw: np.random.Generator) -> np.ndarray:
    """For each row the row whose images it gets: drawn, each once, never of the same images.

    Each once as far as that goes: of images that more than half of the rows have, others are
    taken again.

    Raises:
        ValueError: all rows have the same images.
    """
    keys = ["\0".join(images) for images in samples.rows["images"]]
    _, own = np.unique(keys, return_inverse=True)
    if own.max() == 0:
        raise ValueError(
            f"control='shuffled': all {len(own)} rows of tasks.{name} have the same images, there "
            "are no others to give them"
        )
    found = draw.permutation(len(own))
    for row in np.flatnonzero(own[found] == own):
        given = own[found[row]]
        if given != own[row]:
            continue  # exchanged with another already
        can = np.flatnonzero((own[found] != own[row]) & (own != given))
        if len(can):
            other = draw.choice(can)
            found[[row, other]] = found[[other, row]]
        else:
            found[row] = draw.choice(np.flatnonzero(own != own[row]))
    return found


def open_rows(recipe: Recipe, split: str, role: str, names: Sequence[str] | None = None) -> Rows:
    """The rows of a split ("train", "validation", "test" or a layout's own) of a recipe's tasks.

    Raises:
        ValueError: no such task or split, or data that cannot be used.
    """
    opened = {}
    for name in recipe.tasks if names is None else names:
        task = recipe.tasks.get(name)
        if task is None:
            raise ValueError(f"task {name!r} is not in the recipe: {', '.join(recipe.tasks)}")
        opened[name] = open_samples(
            task.source,
            task.split(split),
            role=role,
            cache_dir=Path(recipe.cache) / "rows",
            broken=recipe.broken,
            limit=task.limit,
        )
    return Rows(opened, recipe.control)
