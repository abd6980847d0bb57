"""One tile in one cell of the table: compiled for the gates, compared with eager torch, timed.

Nothing here knows which tile is better: `bench.tune` does. Times are of the kernel alone, by
replaying its one launch with tensors that are not in the cache.
"""

import os
import statistics
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.configured import configured
from bench.offline import gates
from bench.offline.ahead_of_time import AMD, NVIDIA
from bench.offline.gate_cases import HEAVIEST, Case, unique
from bench.offline.specialisations import NUMBERS, Layer
from fused_route import routed_adapter
from fused_route.functional import Impl
from fused_route.kernels import config
from fused_route.kernels.config import Tile
from fused_route.kernels.launch import Launch
from fused_route.plan import major_of
from fused_route.testing import assert_as_good_as_eager

ROWS = {"few": (40, 50), "many": (512, 64)}  # (samples, tokens of each): M = 2000 and 32768
CHECKED = (20, 130, 768)  # samples, tokens and width at which results are compared
D = 768
REPLAYS = 60
MOST_COPIES = 64  # of a launch's tensors: what a few programs read lies in the cache anyway
MEASURED = ("bf16", "fp16", "fp32")
# Dtypes that share a row of the table, by bytes of an element.
SHARING = {2: ("bf16", "fp16"), 4: ("fp32", "tf32")}

# Keys of the table by the name of the jitted function; "_matrix" is added by `key_of`.
KEYS = {
    "project": "project", "routed_forward": "forward", "routed_backward": "backward",
    "vector_gradient": "vectors", "matrix_gradient": "matrices", "weight_partials": "weights",
}  # fmt: skip


class Cell(NamedTuple):
    """A cell of the table, measured with one dtype: of `MEASURED`."""

    kernel: str
    R_PAD: int
    numbers: str

    @property
    def size(self) -> int:
        """Bytes of an element of A and B."""
        return NUMBERS[self.numbers][1].itemsize

    @property
    def present(self) -> tuple[Tile, Tile]:
        """What the table has for the GPU at hand: for few rows, for many."""
        major = major_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        few, many = (
            config.tile(self.kernel, self.R_PAD, self.size, is_many, major)
            for is_many in (False, True)
        )
        return few, many


class Job(NamedTuple):
    """A tile to be compiled for a chip, with the cell's "own" dtype or with all of its "row"."""

    cell: Cell
    tile: Tile
    chip: int | str
    dtypes: str = "own"


Verdicts = Generator[list[str], None, None]


def chip_of(device: str = "cuda") -> int | str:
    """The chip that stands for a GPU in the gates: itself, or the nearest lower one they know.

    Raises:
        ValueError: a GPU below sm_80.
    """
    if torch.version.hip is not None:
        return AMD[0]
    major, minor = torch.cuda.get_device_capability(device)
    return nearest_chip(10 * major + minor)


def nearest_chip(capability: int) -> int:
    """The largest known compute capability that is not above this one."""
    lower = [chip for chip in NVIDIA if chip <= capability]
    if not lower:
        raise ValueError(f"the kernels need a GPU of sm_80 or later, this one is sm_{capability}")
    return max(lower)


def key_of(name: str, constants: dict[str, Any]) -> str | None:
    """The key in the table of a jitted function with these constants; None for K4."""
    key = KEYS.get(name)
    is_matrix = key in ("forward", "backward") and constants["MIX"] == "matrix"
    return f"{key}_matrix" if is_matrix else key


@contextmanager
def overridden(cell: Cell, tile: Tile) -> Iterator[None]:
    """The library with this tile in this cell, for few and for many rows.

    For the sake of "vectors" sums of the image's gradient have a launch of their own.
    """
    table, image = config.tile, config.image

    def trial(kernel: str, R_PAD: int, size: int, many: bool, major: int | None = None) -> Tile:
        is_this = (kernel, R_PAD, size) == (cell.kernel, cell.R_PAD, cell.size)
        return tile if is_this else table(kernel, R_PAD, size, many, major)

    def where(major: int | None, size: int, many: bool) -> str:
        return "apart" if cell.kernel == "vectors" else image(major, size, many)

    # A kernel's time is its own: it starts when the one before it has ended.
    with configured(tile=trial, image=where, overlaps=lambda major: False):
        yield


def cases(job: Job, rows: str) -> list[Case]:
    """What the gates compile of a job: its kernel at the heaviest mixes, with dropout or not."""
    cell, found = job.cell, []
    x_t = "recomputed" if cell.kernel == "project" else "saved"
    for numbers in SHARING[cell.size] if job.dtypes == "row" else (cell.numbers,):
        for mixes, d, p in (
            (HEAVIEST, 768, 0.1), (HEAVIEST[2:], 768, 0.0), (HEAVIEST, 1000, 0.1)
        ):  # fmt: skip
            layers = [Layer(*mix, cell.R_PAD, d, numbers, rows, p, x_t) for mix in mixes]
            with overridden(cell, job.tile):
                found += unique(layers, (job.chip,))
    return [
        case
        for case in found
        if key_of(case.specialisation.function.__name__, case.specialisation.values) == cell.kernel
    ]


def first_faults(job: Job) -> list[str]:
    """What is wrong with the first of a job's cases that is not sound, with few and with many rows.

    A fault begins with the rows that it is of: kernels of few rows may do more.
    """
    found, known_faults = list[str](), dict[Any, list[str]]()
    for rows in ROWS:
        for case in cases(job, rows):
            key = case.specialisation, case.arch
            if key not in known_faults:
                known_faults[key] = gates.check(case, besides={}).faults
            if known_faults[key]:
                where = f"{case.arch} {case.layer.mix} d={case.layer.d} {case.layer.numbers}"
                found += [f"{rows}: {where}: {fault}" for fault in known_faults[key]]
                break
    return found


def faulty_rows(faults: Sequence[str]) -> set[str]:
    """The rows that a tile is not for: those that its faults name, or all if they name none."""
    named = {rows for rows in ROWS if any(fault.startswith(f"{rows}: ") for fault in faults)}
    return named or (set(ROWS) if faults else set())


def compiled(jobs: Sequence[Job]) -> Verdicts:
    """`first_faults` of each job, by as many processes as leave two processors to the timing."""
    processes = max(1, (os.cpu_count() or 1) - 2)
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        yield from pool.map(first_faults, jobs)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def leaves(cell: Cell, S: int, T: int, d: int, device: str) -> dict[str, Tensor]:
    """Tensors of an adapter with the route gram, and dy: of one image token, or of three for K."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, R = NUMBERS[cell.numbers][0], cell.R_PAD
    Nv = 3 if cell.kernel.endswith("_matrix") or cell.kernel == "matrices" else 1

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return {
        "x_h": randn(S, T, d), "x_r": randn(S, Nv, d), "A": randn(R, d, scale=d**-0.5),
        "B": randn(d, R, scale=R**-0.5), "b_A": randn(R), "b_B": randn(d), "dy": randn(S, T, d),
    }  # fmt: skip


def results(cell: Cell, given: dict[str, Tensor], impl: Impl) -> dict[str, Tensor]:
    """y and all gradients."""
    t = {name: x.detach().requires_grad_(name != "dy") for name, x in given.items()}
    y = routed_adapter(
        t["x_h"], t["A"], t["B"], t["x_r"], b_A=t["b_A"], b_B=t["b_B"], route="gram",
        recompute=cell.kernel == "project", impl=impl,
    )  # fmt: skip
    y.backward(t["dy"])
    return {"y": y.detach()} | {name: x.grad for name, x in t.items() if x.grad is not None}


def expected(cell: Cell, sizes: tuple[int, int, int], device: str) -> tuple[dict[str, Tensor], ...]:
    """(float64 truth, eager torch of the same dtype) of the results."""
    given = leaves(cell, *sizes, device)
    truth = {name: x.double() for name, x in given.items()}
    return results(cell, truth, "reference"), results(cell, given, "reference")


def agree(
    cell: Cell, tile: Tile, sizes: tuple[int, int, int] = CHECKED, device: str = "cuda"
) -> None:
    """Holds the layer with this tile to the errors of eager torch, or raises AssertionError.

    By the kernels of few rows and by those of many, whatever the size.
    """
    for fewest in (2**31, 0):
        with overridden(cell, tile), mock.patch.object(config, "MANY_ROWS", fewest):
            actual = results(cell, leaves(cell, *sizes, device), "triton")
        assert_as_good_as_eager(actual, *expected(cell, sizes, device))


def captured(
    cell: Cell, tile: Tile, S: int, T: int, d: int = D, device: str = "cuda"
) -> tuple[Launch, tuple[Any, ...]]:
    """The launch of a cell's kernel in one forward and backward pass, and its arguments."""
    found: list[tuple[Launch, tuple[Any, ...]]] = []
    launch = Launch.__call__

    def noted(self: Launch, *given: Any) -> None:
        launch(self, *given)
        is_of_text = self.constants.get("STREAM", 0) == 0  # K0 of the image has few rows
        if is_of_text and key_of(self.kernel.fn.__name__, self.constants) == cell.kernel:
            found.append((self, given))

    with overridden(cell, tile), mock.patch.object(Launch, "__call__", noted):
        results(cell, leaves(cell, S, T, d, device), "triton")
    (only,) = found
    return only


def copies(given: tuple[Any, ...], cached: int) -> list[tuple[Any, ...]]:
    """A launch's arguments with other tensors, as often as fill the cache (bytes) twice."""
    absent, grid, tensors, numbers = given
    distinct = {t.data_ptr(): t for t in tensors if t is not None}
    size = sum(t.nbytes for t in distinct.values())
    made = []
    for _ in range(min(MOST_COPIES, max(2, -(-2 * cached // max(size, 1))))):
        # a tensor that is given twice, as the base and as x, stays one
        clones = {address: t.clone() for address, t in distinct.items()}
        again = tuple(None if t is None else clones[t.data_ptr()] for t in tensors)
        made.append((absent, grid, again, numbers))
    return made


def time_on_gpu(cell: Cell, tile: Tile) -> dict[str, list[float]]:
    """µs of one launch by `ROWS`: [median, 20 %, 80 %] of the replays of a graph of launches."""
    return {rows: replayed(*captured(cell, tile, S, T)) for rows, (S, T) in ROWS.items()}


def replayed(launch: Launch, given: tuple[Any, ...]) -> list[float]:
    """[median, 20 %, 80 %] of the µs of a launch that finds its tensors in memory."""
    rotated = copies(given, torch.cuda.get_device_properties().L2_cache_size)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in rotated:
            launch(*arguments)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    taken = [start.elapsed_time(end) * 1e3 / len(rotated) for start, end in pairwise(events)]
    fifths = statistics.quantiles(taken, n=5)
    return [statistics.median(taken), fifths[0], fifths[-1]]
