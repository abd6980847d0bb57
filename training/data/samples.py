"""Rows of a data set in its official layout: memory-mapped, cached, with every image there."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from fused_route.checks import one_of, shown, whole
from fused_route.training.data.image_files import MISSING, UNREADABLE, absence, broken_images
from fused_route.training.data.layouts import LAYOUTS, splits_of
from fused_route.training.data.row_cache import cached_rows, distinct, key_of
from fused_route.training.data.splits import ROLES, Needed, Row, Split
from fused_route.training.files import place
from fused_route.training.metrics.captions import wordless

# What to do about rows that cannot be used, and how images are looked at for it.
BROKEN = {"refuse": "listed", "skip": "decoded"}
UNANSWERED, WORDLESS = "no answer", "caption without a word"
# A caption that has one of these has words by every tokenizer; others it is asked about. Of letters
# and numbers of other scripts the PTB tokenizer drops some, and of other signs it keeps some.
WORD = "[0-9A-Za-z_]"

Mask = NDArray[np.bool_]  # (rows,)


@dataclass(frozen=True)
class Source:
    """Where a data set lies.

    Attributes:
        layout: one of `LAYOUTS`.
        root: its folder; None for one that is an installed package.
        images: folder of its images; None for where the layout has them.
    """

    layout: str
    root: Path | None = None
    images: Path | None = None


@dataclass(frozen=True)
class Samples:
    """The rows of a split.

    Attributes:
        task: the layout's.
        rows: with the columns of `Row`.
        folder: what the names of images are relative to.
        skipped: numbers of rows left out, by reason.
    """

    task: str
    rows: datasets.Dataset
    folder: Path
    skipped: dict[str, int]

    def path(self, name: str) -> Path:
        """The file of an image."""
        return self.folder / name


def open_samples(
    source: Source,
    split: str,
    *,
    role: str = "train",
    cache_dir: Path,
    broken: str = "refuse",
    limit: int | None = None,
) -> Samples:
    """The rows of a split, or of several joined by "+". One line says on stderr what was skipped.

    Args:
        role: "train" or "evaluate"; captions come one a row, or all of an image as references.
        cache_dir: keeps the rows for as long as the files they come from are the same, by size
            and time of change, and what was found of the images while their folders are.
        broken: "refuse" rows without image or answer, or "skip" them, and rows whose image cannot
            be read, for which every image is read once. An image to evaluate that has a caption
            without a word counts as without answer.
        limit: only so many first rows, before any is skipped.

    Raises:
        ValueError: an unknown layout, split, role or word; a file or folder that is missing, or
            not as the layout has it; rows that are broken, or none.
    """
    splits = splits_of(source.layout, split)
    one_of("role", role, ROLES)
    one_of("broken", broken, BROKEN)
    limit = None if limit is None else whole("limit", limit)
    root, folder = _places(source, splits)
    needed = _files(splits)
    for line in _absent(root, needed):
        raise ValueError(line)

    def read() -> Iterator[Row]:
        return islice(chain.from_iterable(part.rows(root, role) for part in splits.values()), limit)

    what = f"{source.layout} {split} in {root}"
    key = key_of([file.under(root) for file in needed], source.layout, split, role, limit)
    rows = cached_rows(lambda: distinct(read, what), key, source.layout, split, Path(cache_dir))
    record = Path(cache_dir, "images", f"{key_of([], key, str(folder.resolve()), broken)}.json")
    bad = broken_images(lambda: _names(rows), folder, record, BROKEN[broken])
    masks = _masks(rows, splits, bad)
    if role == "evaluate" and LAYOUTS[source.layout].task == "caption":
        masks[WORDLESS] = _naming(rows, "references", _wordless(rows))
    if broken == "refuse":
        _refuse(rows, masks, bad, (root, folder), splits)
    rows, skipped = _kept(rows, masks, what)
    return Samples(LAYOUTS[source.layout].task, rows, folder, skipped)


def absent(source: Source, split: str) -> list[str]:
    """The files and folders of a split that are not there: a line each, with what to do.

    Raises:
        ValueError: an unknown layout or split, or no folder of the data set.
    """
    splits = splits_of(source.layout, split)
    root, folder = _places(source, splits)
    folders = [needed for part in splits.values() for needed in part.folders]
    return _absent(root, _files(splits)) + _absent(folder, dict.fromkeys(folders))


def _places(source: Source, splits: Mapping[str, Split]) -> tuple[Path, Path]:
    """(folder of the data set, folder of its images)."""
    layout = LAYOUTS[source.layout]
    if layout.home is not None:
        if source.root is not None or source.images is not None:
            raise ValueError(
                f"{source.layout} is an installed package: leave out root={source.root} and "
                f"images={source.images}"
            )
        root = layout.home()
    else:
        first = _files(splits)[0].path
        if source.root is None:
            raise ValueError(f"{source.layout} needs root, the folder that has {first}")
        root = Path(source.root)
        if not root.is_dir():
            raise ValueError(f"{root} is no folder: give as root the one that has {first}")
    return root, root / layout.images if source.images is None else Path(source.images)


def _files(splits: Mapping[str, Split]) -> list[Needed]:
    """The files that splits are read from, each once."""
    return list(dict.fromkeys(file for part in splits.values() for file in part.files))


def _absent(folder: Path, needed: Iterable[Needed]) -> list[str]:
    there = [(one, one.under(folder)) for one in needed]
    return [
        f"{path} does not exist: {one.fixed(folder)}" for one, path in there if not path.exists()
    ]


def _names(rows: datasets.Dataset) -> list[str]:
    """Of all images, each once."""
    names: list[str] = pc.list_flatten(rows.data.column("images")).unique().to_pylist()
    return names


def _masks(
    rows: datasets.Dataset, splits: Mapping[str, Split], bad: Mapping[str, str]
) -> dict[str, Mask]:
    """Which rows cannot be used, by reason."""
    withheld = all(part.answers == "withheld" for part in splits.values())
    number = pc.list_value_length(rows.data.column("references"))
    unanswered = np.zeros(len(rows), bool) if withheld else number.to_numpy() == 0
    return {UNANSWERED: unanswered} | {
        reason: _naming(rows, "images", [name for name, why in bad.items() if why == reason])
        for reason in (MISSING, UNREADABLE)
    }


def _wordless(rows: datasets.Dataset) -> list[str]:
    """Captions that the tokenizer they are scored by cuts to nothing."""
    doubtful: set[str] = set()
    for chunk in rows.data.column("references").chunks:
        captions = pc.list_flatten(chunk)
        doubtful.update(
            captions.filter(pc.invert(pc.match_substring_regex(captions, WORD))).to_pylist()
        )
    return sorted(wordless(sorted(doubtful)))


def _naming(rows: datasets.Dataset, column: str, texts: Sequence[str]) -> Mask:
    """Which rows have one of these texts in a column of lists."""
    mask, start = np.zeros(len(rows), bool), 0
    named = pa.array(texts, pa.string())
    for chunk in rows.data.column(column).chunks if len(texts) else ():
        hit = pc.is_in(pc.list_flatten(chunk), value_set=named)
        mask[start + pc.list_parent_indices(chunk).filter(hit).to_numpy()] = True
        start += len(chunk)
    return mask


def _refuse(
    rows: datasets.Dataset,
    masks: Mapping[str, Mask],
    bad: Mapping[str, str],
    places: tuple[Path, Path],
    splits: Mapping[str, Split],
) -> None:
    """ValueError where a row cannot be used."""
    root, folder = places
    other = "or leave out such rows, with --skip-broken (broken: skip)"
    (unanswered,) = np.nonzero(masks[UNANSWERED])
    if len(unanswered):
        first = rows[int(unanswered[0])]["id"]
        raise ValueError(
            f"{root} has no answer to {len(unanswered)} of {len(rows)} rows of "
            f"{'+'.join(splits)}, the first is {first}: complete its annotations, {other}"
        )
    (wordless,) = np.nonzero(masks.get(WORDLESS, np.zeros(0)))
    if len(wordless):
        first = rows[int(wordless[0])]
        raise ValueError(
            f"{root} has a caption without a word, which cannot be scored by, of {len(wordless)} "
            f"of {len(rows)} rows of {'+'.join(splits)}, the first is {first['id']} "
            f"{shown(first['references'])}: correct it, {other}"
        )
    if bad:
        fixes = {one.path: one.fixed(folder) for part in splits.values() for one in part.folders}
        raise ValueError(f"{absence(list(bad), folder, fixes)}, {other}")


def _kept(
    rows: datasets.Dataset, masks: Mapping[str, Mask], what: str
) -> tuple[datasets.Dataset, dict[str, int]]:
    """(the rows without those that are masked, how many were left out by the first reason)."""
    keep, skipped = np.ones(len(rows), bool), {}
    for reason, mask in masks.items():
        if (mask & keep).any():
            skipped[reason] = int((mask & keep).sum())
        keep &= ~mask
    if not skipped:
        return rows, skipped
    reasons = ", ".join(f"{reason} {number}" for reason, number in skipped.items())
    said = f"{what}: left out {len(rows) - keep.sum()} of {len(rows)} rows: {reasons}"
    if not keep.any():
        raise ValueError(f"{said}; none is left")
    if place()[0] == 0:
        print(said, file=sys.stderr)
    return rows.select(np.flatnonzero(keep)), skipped
