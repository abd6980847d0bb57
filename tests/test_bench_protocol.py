"""How times are taken, on a CPU and on a GPU that is made up: its own clock beside the host's."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import formulations, protocol
from bench.cases import Case
from bench.operands import Operands
from bench.subject import Subject

CPU = torch.device("cpu")
TINY = Case("op", "adapter", "mul", 24, 4, 3, 5, dtype="fp32")


class Gpu:
    """Stands for torch.cuda: a queue of work, whose time runs beside that of the host, in µs."""

    EVENT, LAUNCH = 14.0, 12.0  # of the host

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0
        self.capturing: list[float] | None = None
        self.modes: list[str] = []
        self.events = self.graphs = 0
        gpu = self

        class Event:
            at = 0.0

            def __init__(self, enable_timing: bool) -> None:
                gpu.events += 1

            def record(self) -> None:
                gpu.host += gpu.EVENT
                self.at = max(gpu.host, gpu.done)

            def elapsed_time(self, other: "Event") -> float:
                return (other.at - self.at) / 1e3

        class Graph:
            def __init__(self) -> None:
                gpu.graphs += 1
                self.work: list[float] = []

            def replay(self) -> None:
                gpu.host += gpu.LAUNCH
                gpu.run(sum(self.work))

        @contextmanager
        def graph(made: Graph) -> Iterator[None]:
            self.capturing = made.work
            yield
            self.capturing = None

        stream = mock.MagicMock()
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": stream, "stream": stream,
            "current_stream": stream, "synchronize": self.wait,
            "set_sync_debug_mode": self.set_mode,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: self.host / 1e6))

    def run(self, gpu: float, host: float = 0.0) -> None:
        """Queues so much work, which costs the host this."""
        if self.capturing is not None:
            self.capturing.append(gpu)
            return
        self.host += host
        self.done = max(self.host, self.done) + gpu

    def wait(self) -> None:
        self.host = self.done = max(self.host, self.done)

    def set_mode(self, mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        self.modes.append(mode)

    def subject(self, forward: float, backward: float, host: float = 0.0) -> Subject:
        """Passes of so long on the GPU, and each so long on the host."""
        x = torch.ones(3, requires_grad=True)

        class Pass(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                self.run(forward, host)
                return x.clone()

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> Tensor:
                self.run(backward, host)
                return dy.clone()

        return Subject(lambda: Pass.apply(x), {"x": x}, torch.ones(3))


@pytest.mark.parametrize(("sets", "forward", "backward"), [(3, 9.0, 15.0), (40, 2e3, 5e3)])
def test_a_graph_s_time_is_without_launches(
    sets: int, forward: float, backward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    subjects: list[Subject] = []

    def make(i: int) -> Subject:
        subjects.append(gpu.subject(forward, backward))
        return subjects[-1]

    found = protocol.graph(make, sets, 0.05)
    assert len(subjects) == sets and gpu.graphs == 2
    assert gpu.modes == ["error", "default"] * 2 * sets
    assert median(found["forward"]) * 1e6 == pytest.approx(forward, rel=0.03)
    assert median(found["both"]) * 1e6 == pytest.approx(forward + backward, rel=0.03)
    assert found["backward"][0] * 1e6 == pytest.approx(backward, rel=0.05)
    assert len(found["both"]) >= 5
    assert all(leaf.grad is None for subject in subjects for leaf in subject.leaves.values())


def test_what_waits_for_the_gpu_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    subject = gpu.subject(1.0, 1.0)
    quick, subject.forward = subject.forward, lambda: waiting()

    def waiting() -> Tensor:
        if gpu.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return quick()

    with pytest.raises(RuntimeError, match="synchronizing"):
        protocol.graph(lambda _: subject, 3, 0.01)
    assert gpu.modes == ["error", "default"] and gpu.graphs == 0


def test_all_outputs_of_a_graph_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    alive: list[int] = []
    outputs: list[weakref.ref[Tensor]] = []

    def make(i: int) -> Subject:
        subject = gpu.subject(1.0, 1.0)
        plain = subject.forward

        def forward() -> Tensor:
            y = plain()
            if gpu.capturing is not None:
                alive.append(sum(ref() is not None for ref in outputs))
                outputs.append(weakref.ref(y))
            return y

        subject.forward = forward
        return subject

    protocol.graph(make, 3, 0.001)
    assert alive == [0, 1, 2] * 2  # at most one graph's at a time


@pytest.mark.parametrize("host", [5.0, 400.0])
def test_events_are_in_the_passes_alone(host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    failed: dict[str, Exception] = {}
    found = protocol.wall({"a": gpu.subject(20.0, 30.0, host)}, protocol.GpuClock(), 0.5, failed)[
        "a"
    ]
    assert not failed and len(found["both"]) >= 20
    assert median(found["both"]) * 1e6 == pytest.approx(max(2 * host, 50.0), rel=0.03)
    assert median(found["forward"]) * 1e6 == pytest.approx(max(host + gpu.EVENT, 20.0), rel=0.1)
    assert gpu.host < 0.7e6  # half a second, and what finds out how many calls that are


def test_one_long_call_a_turn_for_each_half(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    subjects = {"a": gpu.subject(1e6, 2e6)}
    found = protocol.wall(subjects, protocol.GpuClock(), 0.5, {})["a"]
    assert {which: len(values) for which, values in found.items()} == {
        "forward": 5, "backward": 5, "both": 5,
    }  # fmt: skip
    assert found["both"] == pytest.approx([3.0] * 5, rel=1e-3)


def test_on_a_cpu_all_passes_are_of_the_same_calls() -> None:
    subjects = {"a": Operands.of_case(TINY, CPU).subject(formulations.by_hand)}
    found = protocol.wall(subjects, protocol.HostClock(), 0.02, {})["a"]
    parts = zip(found["forward"], found["backward"], strict=True)
    assert found["both"] == pytest.approx([sum(both) for both in parts])


def test_input_sets_live_until_the_last_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds no inputs: freed ones would be the next set's memory, and in the cache."""
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def make(i: int) -> Subject:
        operands = Operands.of_case(TINY, CPU, i)
        made.append(weakref.ref(operands.x))
        return operands.subject(formulations.by_hand)

    def replays(*_: object) -> list[float]:
        alive.append(sum(ref() is not None for ref in made))
        return [1.0]

    monkeypatch.setattr(protocol, "GpuClock", protocol.HostClock)
    monkeypatch.setattr(protocol, "captured", lambda subjects, is_both: None)
    monkeypatch.setattr(protocol, "replays", replays)
    protocol.graph(make, 4, 0.1)
    assert alive == [4, 4] and len(made) == 4


def profiled(monkeypatch: pytest.MonkeyPatch, names: dict[str, float]) -> list[int]:
    """Stands for the profiler: of each call events by name with their µs; the calls it saw."""
    calls: list[int] = []

    class Profile:
        def __enter__(self) -> "Profile":
            calls.append(0)
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[SimpleNamespace]:
            found = [
                SimpleNamespace(
                    name=name, device_type=SimpleNamespace(name=where),
                    is_user_annotation=name == "step",
                    time_range=SimpleNamespace(elapsed_us=lambda us=us: us),
                )
                for where in ("CUDA", "CPU") for name, us in names.items()
            ]  # fmt: skip
            return found * calls[-1]

    def called(*_: object) -> tuple[float, float, float]:
        if calls:
            calls[-1] += 1
        return 0.0, 0.0, 0.0

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    monkeypatch.setattr(protocol, "one_call", called)
    monkeypatch.setattr(protocol, "GpuClock", protocol.HostClock)
    return calls


@pytest.mark.parametrize(("finish", "calls"), [(None, 10), (lambda: None, 2)])
def test_copies_count_in_the_time_of_kernels_and_not_in_their_number(
    finish: Callable[[], None] | None, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step, which has thousands of kernels, two calls are profiled."""
    seen = profiled(
        monkeypatch, {"gemm": 20.0, "add": 5.0, "Memcpy DtoD (Device -> Device)": 3.0,
                      "Memset (Device)": 1.0, "step": 50.0}
    )  # fmt: skip
    subject = Subject(lambda: torch.ones(1), {}, finish=finish)
    assert protocol.kernels(subject) == pytest.approx((29e-6, 2.0))
    assert seen == [calls]


def test_ceilings_are_without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 700 µs and a product of 1,500, each with 100 µs of the host's before it."""
    gpu = Gpu(monkeypatch)

    class OnGpu:
        def copy_(self, source: object) -> None:
            gpu.run(700.0, 100.0)

        def __matmul__(self, other: object) -> None:
            gpu.run(1500.0, 100.0)

        def to(self, dtype: torch.dtype) -> "OnGpu":
            return self

    for name in ("randint", "empty_like", "randn"):
        monkeypatch.setattr(torch, name, lambda *_, **__: OnGpu())
    found = protocol.ceilings(torch.device("cuda"), torch.bfloat16, 0.1)
    assert found["copy"] == pytest.approx(2 * 2**30 / 700e-6, rel=0.01)
    assert found["matmul"] == pytest.approx(2 * 8192**3 / 1500e-6, rel=0.01)
    assert found["dtype"] == "bfloat16" and gpu.host < 0.4e6
