"""Rows as a memory-mapped `datasets.Dataset`, written once and opened again by a key."""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError

from fused_route.training.data.splits import Row
from fused_route.training.files import place

NEAR = 32  # times as many rows as are gathered, among which they are gathered at once
FORM = 2  # of the rows; one more makes every cache be built anew
FEATURES = {
    "id": datasets.Value("string"),
    "images": datasets.List(datasets.Value("string")),
    "text": datasets.Value("string"),
    "answer": datasets.Value("string"),
    "references": datasets.List(datasets.Value("string")),
    "kind": datasets.Value("string"),
}


def key_of(files: Sequence[Path], *parts: object) -> str:
    """Digest of what rows are made from: names that say which, and the files they are read from.

    A file counts with its size and time of change. To digest the contents of VQAv2 or GQA, up to
    several GB, would take seconds at every start; what changes a file changes its time.
    """
    stamps = [(str(file.resolve()), file.stat()) for file in files]
    stamped = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stamps]
    text = json.dumps([FORM, parts, stamped])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def distinct(read: Callable[[], Iterator[Row]], what: str) -> Iterator[Row]:
    """The rows that `read` gives.

    Raises:
        ValueError: at the end, where there were none, or two with one id.
    """
    # 8 bytes a row: the ids themselves would take 1.5 GB of GQA's 14 million
    hashes = array("q")
    for row in read():
        hashes.append(hash(row["id"]))
        yield row
    if not hashes:
        raise ValueError(f"{what} has no rows: the files that it is read from have none of it")
    in_order = np.sort(np.frombuffer(hashes, np.int64))
    again = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    if not again:
        return
    seen: set[str] = set()
    for name in (row["id"] for row in read() if hash(row["id"]) in again):
        if name in seen:
            raise ValueError(
                f"{what} has the id {name!r} twice: join no splits that overlap, or mend the file"
            )
        seen.add(name)


def cached_rows(
    read: Callable[[], Iterator[Row]], key: str, layout: str, split: str, cache_dir: Path
) -> datasets.Dataset:
    """The rows that `read` gives, read only where `cache_dir` does not have them under `key`.

    Several processes may ask at once: one reads, the others wait for it.

    Raises:
        ValueError: what `read` raises; a cache that cannot be written, or is damaged.
    """
    try:
        with _bars_of_first_process():
            return datasets.Dataset.from_generator(
                read,
                features=datasets.Features(FEATURES),
                cache_dir=str(cache_dir),
                # shown by the bar; a name of letters and _
                split=datasets.NamedSplit(re.sub(r"\W", "_", split)),
                dataset_name=layout,
                fingerprint=key,
            )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            cause = ValueError(f"{cache_dir} cannot be written: {cause.strerror or cause}")
        raise (cause or error) from None
    except (OSError, ValueError) as error:
        (folder, *_) = [*cache_dir.glob(f"{layout}/*{key}"), cache_dir]
        reason = " ".join(str(error).split())
        fix = "use another cache_dir" if folder == cache_dir else "delete it"
        raise ValueError(f"{folder} cannot be used ({reason}): {fix}") from None


def tables(rows: datasets.Dataset, at_once: int) -> Iterator[pa.Table]:
    """Rows as tables of `at_once` rows, the last of fewer.

    Rows that were chosen out of others are gathered from the part that they lie in: `datasets`
    makes a table of each row, which takes fifty times as long. Where they lie too far from each
    other, as shuffled ones do, it is left to that.
    """
    chosen = rows._indices
    if chosen is None:
        yield from rows.with_format("arrow").iter(at_once)
        return
    for start in range(0, len(rows), at_once):
        places = chosen.fast_slice(start, at_once).column(0).to_numpy()
        first = int(places.min())
        width = int(places.max()) + 1 - first
        if width > NEAR * at_once:
            yield rows.with_format("arrow")[start : start + at_once]
        else:
            yield rows.data.fast_slice(first, width).take(pa.array(places - first))


@contextmanager
def _bars_of_first_process() -> Iterator[None]:
    """Turns progress bars off, other than in the process of rank 0."""
    if place()[0] == 0 or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
