"""Texts that are longer than what a model reads of them, counted and said."""

import sys
from collections import Counter

import pyarrow.compute as pc  # type: ignore[import-untyped]

from fused_route.training.data.row_cache import tables
from fused_route.training.experiment.batches import Batches
from fused_route.training.experiment.tasks import Rows
from fused_route.training.files import place

AT_ONCE = 10_000  # rows
OWN = 4  # tokens that a tokenizer may add; any other is of a byte at least


def say_cut(batches: Batches, rows: Rows) -> None:
    """A line on standard error for each task that has texts whose end is left out."""
    if place()[0] != 0:
        return
    for name, number in cut_texts(batches, rows).items():
        print(
            f"tasks.{name}: {number} of {len(rows.of(name))} texts are longer than the "
            f"{batches.reads(name)} tokens that are read with the prompt, their ends are left out: "
            "raise max_length",
            file=sys.stderr,
        )


def cut_texts(batches: Batches, rows: Rows) -> dict[str, int]:
    """Number of rows whose text is cut, of the tasks that have any.

    Texts too short for it by their bytes are not looked at (a token may be of a single one, so
    that no longer ones can go too), equal ones once: questions come with many images. Few at a
    time: the tokens of 300,000 questions take more than a GB.
    """
    found = {}
    for name, samples in rows.samples.items():
        most, number = batches.reads(name), 0
        if most is None:
            continue
        short, long = most - OWN - len(batches.tasks[name].prompt.encode()), Counter[str]()
        for batch in tables(samples.rows.select_columns(["text"]), AT_ONCE):
            column = batch.column("text")
            long.update(column.filter(pc.greater(pc.binary_length(column), short)).to_pylist())
        texts = list(long)
        for start in range(0, len(texts), AT_ONCE):
            part = texts[start : start + AT_ONCE]
            cut = batches.cut(name, part)
            number += sum(long[text] for text, is_cut in zip(part, cut, strict=True) if is_cut)
        if number:
            found[name] = number
    return found
