"""How times are taken: the same for every provider, which take turns.

wall     eager calls with the host's time, queued without waiting, so that they take as long as
         their slower side, host or GPU. There a mark is an event, which costs the host up to 14 µs:
         "both" is the time of a group of calls over their number, with marks at the group's ends
         alone; "forward" and "backward" come from other calls, with marks between the passes. On a
         CPU marks cost nothing, and all three come from the same calls.
graph    replays of one CUDA graph that holds a call of each of several input sets, which together
         exceed the cache: a group's time over its calls, so that no launch of a graph and no event
         is in it.
kernels  the sum of the times of all kernels, copies and sets of memory, by the profiler: a copy is
         GPU time that a provider takes as well. How many kernels there are leaves copies out.
         Results of commits up to bf837d1 are without copies and sets.

All gradients are None before every call, so that none is added to. Clocks and modes of a GPU are
left as they are.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch

from bench.subject import Subject

# More than the second-level cache of any GPU that the kernels run on (50 MB on an H100).
COLD_BYTES = 150e6
PER_SYNCHRONISATION = 50
ROUNDS = 5
GROUPS = 4  # of the calls of a turn, where a group needs no more
GRAPH_GROUPS = 20  # of the replays of a graph
CEILING_GROUP = 10  # calls
Passes = dict[str, list[float]]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summary(samples: Sequence[float]) -> list[float]:
    """[median, 20 %, 80 %] in µs of seconds."""
    if len(samples) < 2:
        return [samples[0] * 1e6] * 3
    fifths = quantiles(samples, n=5, method="inclusive")
    return [value * 1e6 for value in (median(samples), fifths[0], fifths[-1])]


class HostClock:
    """Marks of time on the host, for devices that compute before they return."""

    marks_cost = False

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, stop: Any) -> float:
        return float(stop - start)

    def wait(self) -> None:
        pass


class GpuClock:
    """Marks in the stream of the current GPU."""

    marks_cost = True

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop)) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


Clock = HostClock | GpuClock


def clock_of(device: torch.device) -> Clock:
    return GpuClock() if device.type == "cuda" else HostClock()


def one_call(subject: Subject, clock: Clock) -> tuple[Any, Any, Any]:
    """Marks before the forward pass, between the passes and after all."""
    subject.forget()
    start = clock.mark()
    y = subject.forward()
    between = clock.mark()
    _go_back(subject, y)
    return start, between, clock.mark()


def _go_back(subject: Subject, y: torch.Tensor) -> None:
    """All that follows the forward pass."""
    y.backward(subject.dy)
    if subject.finish is not None:
        subject.finish()


def samples(subject: Subject, clock: Clock, calls: int) -> Passes:
    """Seconds of each pass of this many calls, with marks between them, queued in groups."""
    found: Passes = {"forward": [], "backward": [], "both": []}
    for first in range(0, calls, PER_SYNCHRONISATION):
        marks = [one_call(subject, clock) for _ in range(min(PER_SYNCHRONISATION, calls - first))]
        clock.wait()
        for start, between, stop in marks:
            found["forward"].append(clock.seconds(start, between))
            found["backward"].append(clock.seconds(between, stop))
            found["both"].append(clock.seconds(start, stop))
    return found


def grouped(subject: Subject, clock: Clock, calls: int) -> list[float]:
    """Seconds of a call without marks, on average over each group that this many fall into."""

    def call() -> None:
        subject.forget()
        _go_back(subject, subject.forward())

    size = max(1, min(PER_SYNCHRONISATION, calls // GROUPS))
    return _group_seconds(call, clock, size, max(1, calls // size))


def _group_seconds(run: Callable[[], object], clock: Clock, size: int, groups: int) -> list[float]:
    """Seconds of a run, on average over each group of this size, with marks at the ends alone.

    Small groups follow each other without waiting: only the first of them finds an idle GPU.
    """
    found: list[float] = []
    queued = max(1, PER_SYNCHRONISATION // size)
    while len(found) < groups:
        marks = [clock.mark()]
        for _ in range(min(queued, groups - len(found))):
            for _ in range(size):
                run()
            marks.append(clock.mark())
        clock.wait()
        found += [clock.seconds(*ends) / size for ends in pairwise(marks)]
    return found


def wall(
    subjects: dict[str, Subject], clock: Clock, seconds: float, failed: dict[str, Exception]
) -> dict[str, Passes]:
    """Samples of every provider's passes: in each round all take a turn of about seconds/ROUNDS.

    Where marks cost, half of a turn is for "both" and half for the passes. One that raises is put
    into `failed`, and the others go on without it.
    """
    calls: dict[str, int] = {}
    found: dict[str, Passes] = {}

    def turn(name: str, round_: int) -> None:
        if round_ == 0:
            samples(subjects[name], clock, 2)
            once = median(grouped(subjects[name], clock, 3))
            most = max(2, min(1000, int(seconds / ROUNDS / once)))
            calls[name] = most // 2 if clock.marks_cost else most
            return
        passes = samples(subjects[name], clock, calls[name])
        if clock.marks_cost:
            passes["both"] = grouped(subjects[name], clock, calls[name])
        for which, values in passes.items():
            found.setdefault(name, {}).setdefault(which, []).extend(values)

    with undisturbed():
        for round_ in range(ROUNDS + 1):
            for name in [name for name in subjects if name not in failed]:
                try:
                    turn(name, round_)
                except Exception as error:  # whatever a provider stumbles on is its result
                    failed[name] = error
    return {name: passes for name, passes in found.items() if name not in failed}


def input_sets(bytes_of_one: float) -> int:
    """How many sets of inputs rotate: at least three, and more than the cache holds."""
    return max(3, int(COLD_BYTES // max(bytes_of_one, 1.0)) + 1)


@contextmanager
def _never_waiting() -> Iterator[None]:
    """What waits for the GPU in this block raises."""

    def set_mode(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode(mode)

    set_mode("error")
    try:
        yield
    finally:
        set_mode("default")


def captured(subjects: Sequence[Subject], is_both: bool) -> torch.cuda.CUDAGraph:
    """A graph of the forward pass, or of both, of one subject after the other.

    What waits for the GPU cannot be captured, and a capture that fails leaves PyTorch's allocator
    and generator behind in a capture: such a subject is found before, and raises.
    """

    def run(subject: Subject) -> torch.Tensor:
        subject.forget()
        y = subject.forward()
        if is_both:
            y.backward(subject.dy)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for subject in subjects:
            for _ in range(2):
                run(subject)
            torch.cuda.synchronize()
            with _never_waiting():
                run(subject)
            subject.forget()  # what the graph does not hold
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    outputs = []  # alive until all is captured: no call writes to what the cache holds of another
    with torch.cuda.graph(graph):
        for subject in subjects:
            outputs.append(run(subject))
    return graph


def graph(make: Callable[[int], Subject], sets: int, seconds: float) -> Passes:
    """Samples of graph replays, by call; `make(i)` gives the subject of the i-th input set.

    A graph holds none of its inputs: all sets live until the last replay. "backward" is the
    difference of the medians of the other two, since a graph holds both.
    """
    clock, found = GpuClock(), dict[str, list[float]]()
    subjects = [make(i) for i in range(sets)]
    for which, is_both in (("forward", False), ("both", True)):
        replayed = captured(subjects, is_both)
        found[which] = [time / sets for time in replays(replayed, clock, seconds)]
        del replayed
        for subject in subjects:
            subject.forget()
    found["backward"] = [median(found["both"]) - median(found["forward"])]
    return found


def replays(replayed: torch.cuda.CUDAGraph, clock: Clock, seconds: float) -> list[float]:
    """Seconds of a replay, on average over each of some groups, which take about this long."""
    for _ in range(2):
        replayed.replay()
    clock.wait()
    (once,) = _group_seconds(replayed.replay, clock, 2, 1)
    size = max(2, min(PER_SYNCHRONISATION, int(seconds / GRAPH_GROUPS / once)))
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 5:
        times += _group_seconds(replayed.replay, clock, size, 1)
    return times


def kernels(subject: Subject) -> tuple[float, float]:
    """(seconds of kernels and copies, how many kernels there are) of one call, by the profiler.

    Of a training step two calls are enough: ten of gpt2's are 85,000 events, 6 s to read on a CPU.
    """
    clock, calls = GpuClock(), 10 if subject.finish is None else 2
    samples(subject, clock, 2)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        samples(subject, clock, calls)
    ran = [
        event for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]  # fmt: skip
    launched = [event for event in ran if not event.name.startswith(("Memcpy", "Memset"))]
    return sum(event.time_range.elapsed_us() for event in ran) / calls / 1e6, len(launched) / calls


def peak_bytes(subject: Subject) -> int:
    """Most memory of a GPU that one call takes beyond what lives before it."""
    subject.forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_call(subject, GpuClock())
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    subject.forget()
    return peak


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> dict[str, Any]:
    """{"copy": bytes/s of a large copy, read and written; "matmul": FLOP/s of a large product}.

    In groups on a GPU: a single call would start on an idle one, with its launch in the time.
    """
    on_gpu = device.type == "cuda"
    clock = clock_of(device)
    size = 2**30 if on_gpu else 2**27
    n = 8192 if on_gpu else 2048
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = {}
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source), "matmul": lambda: a @ b,
    }  # fmt: skip
    for name, run in runs.items():
        for _ in range(3):
            run()
        clock.wait()
        times: list[float] = []
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or not times:
            times += _group_seconds(run, clock, CEILING_GROUP if on_gpu else 1, 5)
        best[name] = median(times)
    return {
        "copy": 2 * size / best["copy"],
        "matmul": 2 * n**3 / best["matmul"],
        "dtype": str(dtype).removeprefix("torch."),
    }
