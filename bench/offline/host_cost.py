"""Time of the host for a call and its backward: the library's beside eager torch's.

With a driver that launches nothing, on CPU tensors so small that their arithmetic hardly counts.
Eager operations run here, where on a GPU they would be launched, which costs the host more. Times
of a shared machine mean little by themselves: all chains take turns in one process, without
garbage collection, and the best round counts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench import formulations
from bench.operands import Layer, Operands
from bench.protocol import undisturbed
from bench.subject import Subject
from fused_route.kernels.config import compiler_options
from fused_route.kernels.launch import Launch

S, T, D, R = 2, 2, 16, 4  # fp32
HOSTS = {
    "adapter": Layer("adapter"), "linear": Layer("linear"),
    "linear, P3": Layer("linear", plan="p3"),
}  # fmt: skip
# "reference" is the library's own eager torch; "by hand" the fewest calls that give the same.
WAYS = ("ours", "module", "reference", "by hand")
LAUNCH_LIMIT = 0.25


@contextmanager
def one_thread() -> Iterator[None]:
    """And no garbage collection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with undisturbed():
            yield
    finally:
        torch.set_num_threads(threads)


def best(
    calls: dict[str, Callable[[], object]], repeats: int = 100, rounds: int = 25
) -> dict[str, float]:
    """Microseconds of each call: means of rounds in which they take turns, the best of each."""
    times = dict.fromkeys(calls, float("inf"))
    with one_thread():
        for _ in range(repeats):
            for call in calls.values():
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                times[name] = min(times[name], time.perf_counter() - start)
    return {name: seconds / repeats * 1e6 for name, seconds in times.items()}


def operands(host: str) -> Operands:
    """Tiny ones, with one visual vector without gradient."""
    return Operands(HOSTS[host], S, T, D, R)


def passes(host: str) -> dict[str, float]:
    """Microseconds of forward and backward by way."""
    o = operands(host)
    module = o.module()
    subjects = {
        "ours": o.subject(formulations.library),
        "module": o.subject(lambda o: module(o.x)),
        "reference": o.subject(formulations.clean),
        "by hand": o.subject(formulations.by_hand),
    }
    subjects["module"].leaves |= dict(module.named_parameters())

    def both(subject: Subject) -> None:
        subject.forget()
        subject.forward().backward(subject.dy)

    return best({way: partial(both, subject) for way, subject in subjects.items()})


def launches(host: str) -> dict[str, tuple[float, float]]:
    """By kernel: microseconds of a `Launch` and of `kernel[grid](…)`, for the same arguments."""
    seen: dict[str, tuple[Launch, tuple[Any, ...]]] = {}
    launch = Launch.__call__

    def noted(self: Launch, *given: Any) -> None:
        seen[self.kernel.fn.__name__] = self, given
        launch(self, *given)

    o = operands(host)
    with mock.patch.object(Launch, "__call__", noted):
        formulations.library(o).backward(o.dy)
    found = {}
    for name, (again, given) in seen.items():
        _, grid, tensors, numbers = given
        options = compiler_options(again.tile, "cuda")
        anew = partial(again.kernel[grid], *tensors, *numbers, **again.constants, **options)
        times = best({"again": partial(again, *given), "anew": anew}, repeats=300, rounds=9)
        found[name] = times["again"], times["anew"]
    return found


def table() -> str:
    """Passes, then launches."""
    lines = [
        "| forward + backward | " + " | ".join(f"{way}, µs" for way in WAYS) + " | of reference"
        " | of by hand |",
        "| --- |" + " --- |" * (len(WAYS) + 2),
    ]
    for host in HOSTS:
        times = passes(host)
        shares = [times["ours"] / times[way] for way in ("reference", "by hand")]
        numbers = [f"{times[way]:.0f}" for way in WAYS] + [f"{share:.2f}" for share in shares]
        lines.append(f"| {host} | " + " | ".join(numbers) + " |")
    lines += ["", "| a launch of | ours, µs | kernel[grid], µs | share |", "| --- |" + " --- |" * 3]
    for kernel, (again, anew) in launches("adapter").items():
        lines.append(f"| {kernel} | {again:.1f} | {anew:.1f} | {again / anew:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    from bench.offline.null_driver import use_null_driver

    use_null_driver()
    print(table())
