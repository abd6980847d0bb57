"""Tiles measured on the GPU at hand, as rows for `kernels/config.py`.

A candidate for a cell of the table must pass the gates on this chip and give results as good as
eager torch's; then it is timed. What is found goes at once into a log, one JSON object a line,
which a later run continues. A tile that would replace the table's, in `TUNED` for GPUs of this
compute capability, is compiled with the other dtypes of its row too.
"""

import json
import math
import os
import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from hashlib import sha256
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from bench.offline.gate_cases import RANKS
from bench.results import FOLDER
from bench.tile_trials import (
    MEASURED,
    ROWS,
    Cell,
    Job,
    Verdicts,
    agree,
    chip_of,
    compiled,
    faulty_rows,
    time_on_gpu,
)
from fused_route.kernels import config
from fused_route.kernels.config import Tile

GAIN = 0.03  # a tile that is faster by no more than this, or than the spread, replaces none

LINE = {"kernel", "R_PAD", "numbers", "tile", "chip", "dtypes", "faults", "times", "device", "code"}

Times = dict[str, list[float]]
Chosen = dict[Cell, tuple[Tile, Tile]]


class Record(NamedTuple):
    """What is known of a job: faults, or times by `ROWS` in µs: [median, 20 %, 80 %]."""

    job: Job
    faults: list[str]
    times: Times


@dataclass(frozen=True)
class Tools:
    """What judges and times tiles.

    Args:
        gate: the faults of each job, in order.
        agree: raises AssertionError where the layer's results are not as good as eager torch's.
        timer: `Record.times` of a tile in a cell.
    """

    gate: Callable[[Sequence[Job]], Verdicts] = compiled
    agree: Callable[[Cell, Tile], object] = agree
    timer: Callable[[Cell, Tile], Times] = time_on_gpu


def candidates(cell: Cell, most: int = 40) -> list[Tile]:
    """Tiles around the table's two, those first, then the ones with the fewest changes.

    Each of BM, BN and warps halved or doubled, a stage more or less, with and without a limit of
    registers; left out is what holds over twice the accumulators a thread that the table's do.
    """
    kernel, R_PAD = cell.kernel, cell.R_PAD
    limit = 2 * max(accumulators(kernel, R_PAD, tile) for tile in cell.present)
    changes: dict[Tile, int] = {}
    for t in cell.present:
        limits = dict.fromkeys((t.registers, None))
        for BM, BN, warps, stage, registers in product(
            (2, 1, 4), (2, 1, 4), (2, 1, 4), (0, -1, 1), limits
        ):  # halves of the present sizes
            changed = (BM != 2) + (BN != 2) + (warps != 2) + (stage != 0)
            changed += registers != t.registers
            tile = replace(
                t, BM=t.BM * BM // 2, BN=t.BN * BN // 2, warps=t.warps * warps // 2,
                stages=t.stages + stage, registers=registers, spills=0 if changed else t.spills,
            )  # fmt: skip
            sizes = 16 <= tile.BM <= 128 and 16 <= tile.BN <= 256
            if not (sizes and 2 <= tile.warps <= 8 and 1 <= tile.stages <= 5):
                continue
            if accumulators(kernel, R_PAD, tile) <= limit:
                changes[tile] = min(changed, changes.get(tile, changed))
    return sorted(changes, key=changes.__getitem__)[:most]


def accumulators(kernel: str, R_PAD: int, tile: Tile) -> float:
    """Registers of a thread that hold a kernel's sums."""
    shape = {"weights": (tile.BN, R_PAD), "matrices": (tile.BN, tile.BN)}
    rows, columns = shape.get(kernel, (tile.BM, R_PAD))
    return rows * columns / (32 * tile.warps)


class Log:
    """Records in a file, of one device and of the kernels as they are now.

    Others in the file are left alone: those of other devices, those of kernels that have changed
    since, and a line that a killed run left unfinished.

    Args:
        path: made by the first record.
        device: its name; None: the one whose records the file has.

    Raises:
        ValueError: device is None, and the file has no records of these kernels, or of several
            devices.
    """

    def __init__(self, path: Path, device: str | None) -> None:
        kernels = sorted(Path(config.__file__).parent.glob("*.py"))
        sources = b"".join(file.read_bytes() for file in kernels if file.name != "config.py")
        self.path, self.code = path, sha256(sources).hexdigest()[:12]
        lines = [line for line in self._lines() if line["code"] == self.code]
        devices = {line["device"] for line in lines}
        if device is None and len(devices) != 1:
            of = ", ".join(sorted(devices)) or "none"
            raise ValueError(
                f"out={str(path)!r} must hold records of one GPU with the kernels as they are now, "
                f"got {of}"
            )
        self.device = device or devices.pop()
        self.records = [read(line) for line in lines if line["device"] == self.device]

    def _lines(self) -> Iterator[dict[str, Any]]:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and found.keys() >= LINE:
                yield found

    def add(self, record: Record) -> None:
        """Appends a record, so that it outlives this process."""
        job = record.job
        line = {
            **job.cell._asdict(), "tile": astuple(job.tile), "chip": job.chip, "dtypes": job.dtypes,
            "faults": record.faults, "times": record.times, "device": self.device,
            "code": self.code, "triton": triton.__version__,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # what a killed run left unfinished
                    file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.records.append(record)

    def done(self) -> set[Job]:
        """What needs no second look."""
        return {record.job for record in self.records}


def read(line: dict[str, Any]) -> Record:
    """The record of a line."""
    cell = Cell(line["kernel"], line["R_PAD"], line["numbers"])
    job = Job(cell, Tile(*line["tile"]), line["chip"], line["dtypes"])
    return Record(job, line["faults"], line["times"])


def jobs(cells: Sequence[Cell], chip: int | str) -> list[Job]:
    """All candidates: each cell's first, then each cell's second, so that any budget helps all."""
    by_cell = [[Job(cell, tile, chip) for tile in candidates(cell)] for cell in cells]
    return [job for turn in zip_longest(*by_cell) for job in turn if job is not None]


def sweep(
    wanted: Sequence[Job], log: Log, tools: Tools, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Judges and times what the log does not have yet, until the time is over."""
    done = log.done()
    todo = [job for job in wanted if job not in done]
    if not todo:
        return
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc="tuning", unit="tile")
    with bar, closing(tools.gate(todo)) as verdicts:
        for job in todo:
            if is_over():
                break
            bar.set_postfix_str(f"{job.cell.kernel} {job.cell.R_PAD} {written(job.tile)}")
            log.add(measured(job, next(verdicts), log, tools))
            bar.update()


def measured(job: Job, faults: list[str], log: Log, tools: Tools) -> Record:
    """The times of a tile that passed the gates, or what is wrong with it.

    A tile that breaks the GPU for this process is put down, so that the next run leaves it out.
    """
    try:
        if len(faulty_rows(faults)) < len(ROWS):
            tools.agree(job.cell, job.tile)
            return Record(job, faults, tools.timer(job.cell, job.tile))
    except (AssertionError, OutOfResources) as error:
        faults = [f"{type(error).__name__}: {error}".splitlines()[0]]
    except torch.OutOfMemoryError:  # not the tile's fault
        raise
    except Exception as error:
        log.add(Record(job, [f"{type(error).__name__}: {error}"], {}))
        raise
    return Record(job, faults, {})


def choose(records: Sequence[Record]) -> Chosen:
    """By cell the fastest sound tiles, for few rows and for many: the table's where none is faster.

    Faster is faster by more than `GAIN` and than the spread of the two between a fifth and four
    fifths of their times. A tile with a fault in any dtype of its row is out, for the rows that the
    fault is of; the table's stays, too, where it was not measured itself.
    """
    rejected = {
        (record.job.cell, record.job.tile, rows)
        for record in records
        for rows in faulty_rows(record.faults)
    }
    timed: dict[Cell, dict[Tile, Times]] = {}
    for (cell, tile, *_), _, times in records:
        of_cell = timed.setdefault(cell, {})
        if times:
            of_cell[tile] = times
    chosen: Chosen = {}
    for cell, of_cell in timed.items():
        few, many = (
            fastest(
                {t: of[rows] for t, of in of_cell.items() if (cell, t, rows) not in rejected},
                tile,
                (cell, tile, rows) in rejected,
            )
            for rows, tile in zip(ROWS, cell.present, strict=True)
        )
        chosen[cell] = few, many
    return chosen


def fastest(times: dict[Tile, list[float]], present: Tile, is_rejected: bool) -> Tile:
    """The tile with the least median, or the present one where that is as good."""
    best = min(times, key=lambda tile: times[tile][0], default=present)
    if present not in times:
        return best if is_rejected else present
    spread = max((high - low) / median for median, low, high in (times[best], times[present]))
    return best if times[present][0] / times[best][0] > 1 + max(GAIN, spread) else present


def unconfirmed(chosen: Chosen, log: Log) -> list[Job]:
    """Tiles that would enter the table and have not been compiled with all dtypes of the row."""
    chips = {record.job.cell: record.job.chip for record in log.records}
    entering = [
        Job(cell, tile, chips[cell], "row")
        for cell, tiles in chosen.items()
        for tile in dict.fromkeys(tiles)
        if tile not in cell.present
    ]
    done = log.done()
    return [job for job in entering if job not in done]


def confirmed(
    log: Log, cells: Sequence[Cell], tools: Tools, is_over: Callable[[], bool] = lambda: False
) -> tuple[Chosen, int]:
    """What is chosen, of tiles compiled with all dtypes of the row, or the table's already.

    The number counts faster tiles that were left out because the time was over.
    """

    def chosen() -> Chosen:
        return choose([record for record in log.records if record.job.cell in cells])

    while (open_jobs := unconfirmed(chosen(), log)) and not is_over():
        with closing(tools.gate(open_jobs)) as verdicts:
            for job in tqdm(open_jobs, desc="compiling winners", unit="tile"):
                if is_over():
                    break
                log.add(Record(job, next(verdicts), {}))
    found = chosen()
    left = {(job.cell, job.tile) for job in unconfirmed(found, log)}
    for cell, tiles in found.items():
        few, many = (
            present if (cell, tile) in left else tile
            for tile, present in zip(tiles, cell.present, strict=True)
        )
        found[cell] = few, many
    return found, len(left)


def written(tile: Tile) -> str:
    """A tile as config.py has it."""
    sizes = [tile.BM, tile.BN, tile.warps, tile.stages]
    limit = [] if tile.registers is None else [tile.registers]
    named = [
        f"{field.name}={getattr(tile, field.name)!r}"
        for field in fields(tile)[5:]
        if getattr(tile, field.name) != field.default
    ]
    return f"Tile({', '.join([*map(repr, [*sizes, *limit]), *named])})".replace("'", '"')


def table(chosen: Chosen) -> str:
    """The rows, as they stand in config.py."""
    lines = []
    for kernel in config.TILES:
        of_kernel = {cell: tiles for cell, tiles in chosen.items() if cell.kernel == kernel}
        if of_kernel:
            lines.append(f'    "{kernel}": {{')
            for cell, (few, many) in of_kernel.items():
                row = f"({cell.R_PAD}, {cell.size}): ({written(few)}, {written(many)}),"
                lines.append(f"        {row}")
            lines.append("    },")
    return "\n".join(lines)


def gains(chosen: Chosen, log: Log) -> Iterator[str]:
    """A line for each tile that changes."""
    times = {(job.cell, job.tile): times for job, _, times in log.records if times}
    for cell, tiles in chosen.items():
        for rows, tile, present in zip(ROWS, tiles, cell.present, strict=True):
            if tile != present:
                now, then = (
                    times.get((cell, t), {}).get(rows, [math.nan]) for t in (tile, present)
                )
                yield (
                    f"{cell.kernel} ({cell.R_PAD}, {cell.size}) {rows}: {written(present)} "
                    f"{then[0]:.1f} µs, {written(tile)} {now[0]:.1f} µs"
                )


def add_arguments(parser: ArgumentParser) -> None:
    """Those of `main`; what is not given is None."""
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="rows of the table: all")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="R_PAD", help="16 to 256: all")
    parser.add_argument("--numbers", help=f"one of {', '.join(MEASURED)}: {MEASURED[0]}")
    parser.add_argument("--out", type=Path, help="log, which a second run continues")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stops when they are over")


def named(arguments: Namespace) -> list[Cell]:
    """The cells that the arguments name; ValueError for a name that is none."""
    kernels = getattr(arguments, "kernels", None) or list(config.TILES)
    ranks = getattr(arguments, "ranks", None) or list(RANKS)
    numbers = getattr(arguments, "numbers", None) or MEASURED[0]
    for name, given, accepted in (
        ("kernels", kernels, list(config.TILES)), ("ranks", ranks, list(RANKS)),
        ("numbers", [numbers], list(MEASURED)),
    ):  # fmt: skip
        if wrong := [value for value in given if value not in accepted]:
            raise ValueError(f"{name} must be of {accepted}, got {wrong[0]!r}")
    return [Cell(*of) for of in product(dict.fromkeys(kernels), dict.fromkeys(ranks), [numbers])]


def clock(budget: float | None) -> Callable[[], bool]:
    """Whether a budget of seconds, counted from now, is over; ValueError where it is none."""
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be seconds greater than 0, got {budget}")
    end = time.monotonic() + (budget or math.inf)
    return lambda: time.monotonic() >= end


def main(arguments: Namespace, tools: Tools | None = None) -> int:
    """Sweeps, chooses and prints; without a GPU it chooses from the log of one.

    Args:
        arguments: kernels (keys of the table), ranks (R_PAD), numbers (of `MEASURED`), out (the
            log) and budget (seconds); what is None or absent is: all, all, bf16, a file in
            bench/results named after the GPU, no end.

    Raises:
        ValueError: no GPU and no log of one, a GPU below sm_80, or a name that is none.
    """
    cells, tools, out = named(arguments), tools or Tools(), getattr(arguments, "out", None)
    is_over = clock(getattr(arguments, "budget", None))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if device is None and (out is None or not out.is_file()):
        raise ValueError(
            "tune needs a GPU and torch finds none; with out=FILE, the log of a run on one, it "
            f"chooses from that: got out={None if out is None else str(out)!r}"
        )
    slug = re.sub(r"[^a-z0-9]+", "-", (device or "").lower()).strip("-")
    log = Log(out or FOLDER / f"tune-{slug}.jsonl", device)
    wanted = [] if device is None else jobs(cells, chip_of())
    sweep(wanted, log, tools, is_over)
    chosen, left = confirmed(log, cells, tools, is_over)
    print("\n".join([*gains(chosen, log), table(chosen)]))
    if open_jobs := len(set(wanted) - log.done()) + left:
        print(f"next: python -m bench tune --out {log.path} again, {open_jobs} tiles are left")
    else:
        print(
            "next: these rows into kernels/config.py, TUNED of this GPU's compute capability, "
            "then python -m bench gates"
        )
    return 0
