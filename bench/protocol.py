"""How times are taken: the same for every provider, which take turns.

wall     eager calls with the host's time. On a GPU events stand between the passes of many calls
         that are queued without waiting, so a pass takes as long as its slower side, host or GPU.
graph    replays of a CUDA graph, over several input sets that together exceed the cache.
kernels  the sum of all kernels' times, by the profiler.

All gradients are None before every call, so that none is added to. Clocks and modes of a GPU are
left as they are.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch

from bench.subject import Subject

# More than the second-level cache of any GPU that the kernels run on (50 MB on an H100).
COLD_BYTES = 150e6
PER_SYNCHRONISATION = 50
ROUNDS = 5
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

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, stop: Any) -> float:
        return float(stop - start)

    def wait(self) -> None:
        pass


class GpuClock:
    """Marks in the stream of the current GPU."""

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
    y.backward(subject.dy)
    if subject.finish is not None:
        subject.finish()
    return start, between, clock.mark()


def samples(subject: Subject, clock: Clock, calls: int) -> Passes:
    """Seconds of each pass of this many calls, queued in groups."""
    found: Passes = {"forward": [], "backward": [], "both": []}
    for first in range(0, calls, PER_SYNCHRONISATION):
        marks = [one_call(subject, clock) for _ in range(min(PER_SYNCHRONISATION, calls - first))]
        clock.wait()
        for start, between, stop in marks:
            found["forward"].append(clock.seconds(start, between))
            found["backward"].append(clock.seconds(between, stop))
            found["both"].append(clock.seconds(start, stop))
    return found


def wall(
    subjects: dict[str, Subject], clock: Clock, seconds: float, failed: dict[str, Exception]
) -> dict[str, Passes]:
    """Samples of every provider's passes: in each round all take a turn of about seconds/ROUNDS.

    One that raises is put into `failed`, and the others go on without it.
    """
    calls: dict[str, int] = {}
    found: dict[str, Passes] = {}

    def turn(name: str, round_: int) -> None:
        if round_ == 0:
            samples(subjects[name], clock, 2)
            once = median(samples(subjects[name], clock, 3)["both"])
            calls[name] = max(2, min(1000, int(seconds / ROUNDS / once)))
            return
        for which, values in samples(subjects[name], clock, calls[name]).items():
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


def captured(subject: Subject, is_both: bool) -> torch.cuda.CUDAGraph:
    """A graph of the forward pass, or of both.

    What waits for the GPU cannot be captured, and a capture that fails leaves PyTorch's allocator
    and generator behind in a capture: such a subject is found before, and raises.
    """

    def run() -> None:
        subject.forget()
        y = subject.forward()
        if is_both:
            y.backward(subject.dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graph(make: Callable[[int], Subject], sets: int, seconds: float) -> Passes:
    """Samples of graph replays; `make(i)` gives the subject of the i-th input set.

    A graph holds none of its inputs: all sets live until the last replay. "backward" is the
    difference of the medians of the other two, since a graph holds both.
    """
    clock, found = GpuClock(), dict[str, list[float]]()
    subjects = [make(i) for i in range(sets)]
    for which, is_both in (("forward", False), ("both", True)):
        graphs = [captured(subject, is_both) for subject in subjects]
        for each in graphs:
            each.replay()
        clock.wait()
        found[which] = _replays(graphs, clock, seconds)
        del graphs
        for subject in subjects:
            subject.forget()
    found["backward"] = [median(found["both"]) - median(found["forward"])]
    return found


def _replays(graphs: list[torch.cuda.CUDAGraph], clock: Clock, seconds: float) -> list[float]:
    """Seconds of single replays, in turn, for about this long."""
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 3 * len(graphs):
        marks = []
        for _ in range(PER_SYNCHRONISATION // len(graphs) + 1):
            for each in graphs:
                start = clock.mark()
                each.replay()
                marks.append((start, clock.mark()))
        clock.wait()
        times += [clock.seconds(*pair) for pair in marks]
    return times


def kernels(subject: Subject, calls: int = 10) -> tuple[float, float]:
    """(seconds of all kernels, how many they are) of one call, by the profiler."""
    clock = GpuClock()
    samples(subject, clock, 2)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        samples(subject, clock, calls)
    ran = [
        event for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]  # fmt: skip
    return sum(event.time_range.elapsed_us() for event in ran) / calls / 1e6, len(ran) / calls


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
    """{"copy": bytes/s of a large copy, read and written; "matmul": FLOP/s of a large product}."""
    on_gpu = device.type == "cuda"
    clock = clock_of(device)
    size = 2**30 if on_gpu else 2**27
    n = 8192 if on_gpu else 2048
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = {}
    for name, run in (("copy", lambda: target.copy_(source)), ("matmul", lambda: a @ b)):
        for _ in range(3):
            run()
        clock.wait()
        times: list[float] = []
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(times) < 5:
            start = clock.mark()
            run()
            end = clock.mark()
            clock.wait()
            times.append(clock.seconds(start, end))
        best[name] = median(times)
    return {
        "copy": 2 * size / best["copy"],
        "matmul": 2 * n**3 / best["matmul"],
        "dtype": str(dtype).removeprefix("torch."),
    }
