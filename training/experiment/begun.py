"""What a run began with: models, rows, answers and processes, so that it goes on with the same."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from accelerate import PartialState
from datasets import Dataset

from fused_route.checks import shown
from fused_route.training.data.answers import read_vocabulary
from fused_route.training.data.row_cache import tables
from fused_route.training.experiment.tasks import Rows

BEGUN = "begun.json"
ROWS = 10_000  # that are digested at a time
# Nothing is trained on it. What rows to validate on have of it decides which of GQA's count.
KIND = ("kind",)
PARTS = {
    "vision": "model.vision: the vision tower has other weights",
    "language": "model.language: the language model has other weights",
    "preprocessing": "model.vision: the tower's configuration or image processor is another",
}


def begun(
    models: Mapping[str, str], train: Rows, validation: Rows | None, processes: int | None
) -> dict[str, Any]:
    """What a run depends on that its recipe does not say.

    Args:
        models: of `Built`.
        train, validation: rows, known by their contents wherever their files lie.
        processes: that share a step, each with a batch of its own; None: not known yet.

    The dtype of the features is added once they are there, see `refuse_other_features`, and the
    names of parameters that do not decay, which an optimiser's state is grouped by.
    """
    known = {"train": _known(train, but=KIND)}
    if validation is not None:
        known["validation"] = _known(validation)
    return {"models": dict(models), "rows": known, "processes": processes}


def _known(rows: Rows, but: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What rows are known by, of each task, without the columns `but`."""
    known = {}
    for name, samples in rows.samples.items():
        columns = [column for column in samples.rows.column_names if column not in but]
        digest = rows_digest(samples.rows.select_columns(columns))
        known[name] = {"rows": len(samples.rows), "digest": digest}
    return known


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a run holds; empty where a run is older than such files.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds no mapping: a run of `fused-route train` writes one")
    return held


def refuse_other(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run where something is another than when it began.

    Raises:
        ValueError: other models, rows, or number of processes.
    """
    then = read_json(folder / BEGUN)
    refuse_other_models(folder, then.get("models", {}), now["models"])
    for split, tasks in then.get("rows", {}).items():
        for name, known in tasks.items():
            here = now["rows"].get(split, {}).get(name, known)
            if here == known:
                continue
            changed = f"{known['rows']} rows there, {here['rows']} here"
            if here["rows"] == known["rows"]:
                changed = f"{here['rows']} rows, but not the same ones"
            raise ValueError(
                f"{folder} was begun with other data: the {split} split of tasks.{name} has "
                f"{changed}; bring those data back, or name another folder with --out"
            )
    processes = then.get("processes", now["processes"])
    if now["processes"] is not None and processes != now["processes"]:
        raise ValueError(
            f"{folder} was begun by {processes} processes, and this is one of {now['processes']}: "
            "its steps would have other rows; start as many, or name another folder with --out"
        )


def refuse_other_models(run: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """ValueError where a frozen model has other weights than the one that a run was trained with.

    Of another configuration or image processor, which a version of a library may change too, a
    line on standard error says.
    """
    for part, said in PARTS.items():
        if then.get(part, now[part]) == now[part]:
            continue
        if part != "preprocessing":
            raise ValueError(
                f"{said} than {run} was trained with: give that model, or train another run"
            )
        if PartialState().is_main_process:
            print(f"{run}: {said} than in training, or a library's version is", file=sys.stderr)


def refuse_other_answers(folder: Path, file: Path, answers: Sequence[str]) -> None:
    """ValueError where the classes of a checkpoint, whose answers are in `file`, mean others."""
    theirs = read_vocabulary(file) if file.is_file() else list(answers)
    pairs = enumerate(zip_longest(theirs, answers))
    different = next(((place, *pair) for place, pair in pairs if pair[0] != pair[1]), None)
    if different is not None:
        place, then, now = ("none" if x is None else shown(x) for x in different)
        raise ValueError(
            f"{folder} chooses among other answers: class {place} is {then} there, {now} here, "
            f"of {len(theirs)} and {len(answers)}; bring the data or the file of answers back, or "
            "name another folder with --out"
        )


def refuse_other_features(folder: Path, features: Sequence[str] | None) -> None:
    """ValueError where a run began with features of another dtype (names of it, None: of none)."""
    then = read_json(folder / BEGUN).get("features", features)
    if then != features:
        said = (", ".join(x or ()) or "none" for x in (then, features))
        raise ValueError(
            "{} was begun with features in {}, the cache has them in {}: name a cache that was "
            "encoded as then, with --cache, or another folder with --out".format(folder, *said)
        )


def rows_digest(rows: Dataset) -> str:
    """SHA-256, in hexadecimal, of the values of rows, however they are stored."""
    digest = hashlib.sha256(f"{len(rows)} {sorted(rows.column_names)}".encode())
    for batch in tables(rows, ROWS):
        for name in sorted(batch.column_names):
            _add(digest, batch.column(name).combine_chunks())
    return digest.hexdigest()


def _add(digest: Any, values: Any) -> None:
    """Adds a column of texts, or of lists of them: how long each is, then what is in them."""
    if isinstance(values, pa.ChunkedArray):  # of no chunk, or one
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], pa.string())
    is_list = pa.types.is_list(values.type)
    lengths = (pc.list_value_length if is_list else pc.binary_length)(values).fill_null(-1)
    digest.update(lengths.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    if is_list:
        return _add(digest, values.flatten())
    if not len(values):
        return
    _, offsets, text = values.buffers()
    places = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    if text is not None:
        digest.update(memoryview(text)[int(places[0]) : int(places[-1])])
