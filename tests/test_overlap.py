"""Kernels that are launched while the one before still runs, as no GPU has them yet.

The interpreter runs one after the other; what a kernel touches before it waits is what another
order could spoil, and is held to what the kernel before it leaves alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from interpreter import Traffic
from kernel_cases import Call, Layer, P, gradients, run, trained
from tile_tables import launched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import interpreter_builder

from bench.configured import configured
from fused_route import Routing
from fused_route.kernels import config
from fused_route.kernels import launch as launch_module
from fused_route.kernels.launch import Launch

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("unpoisoned")]

GDC: Any = tl.extra.cuda
ADAPTER = ["project", "routed_forward", "routed_backward", "vector_gradient", "weight_partials",
           "add_partials"]  # fmt: skip
# What may wait late, behind what.
FOLLOWS = {
    "project": {"routed_forward", "routed_bottleneck"}, "vector_gradient": {"weight_partials"},
}  # fmt: skip


class BeforeWaiting(Traffic):
    """What a launch moves "early", before the program waits, and later; which programs wait, which
    let the next kernel start, and which of those had not waited before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waited: set[int] = set()
        self.started: set[int] = set()
        self.hasty: set[int] = set()

    def __enter__(self) -> "BeforeWaiting":
        super().__enter__()
        notes = {
            "gdc_wait": lambda: self.waited.add(program()),
            "gdc_launch_dependents": self._start,
        }
        for name, note in notes.items():
            self._patches.enter_context(mock.patch.object(GDC, name, note))
        return self

    def _start(self) -> None:
        self.started.add(program())
        if program() not in self.waited:
            self.hasty.add(program())

    def _move(self, way: str, builder: Any, pointers: Any, mask: Any) -> None:
        when = "later" if program() in self.waited else "early"
        super()._move(f"{way} {when}", builder, pointers, mask)


def program() -> int:
    """The number of the one that runs."""
    at, of = interpreter_builder.grid_idx, interpreter_builder.grid_dim
    return int(np.ravel_multi_index(at, of))


@dataclass
class Seen:
    """One launch: its kernel, how it waits, and the tensors that it has, loads and stores, in time.

    is_hasty: whether it lets the next kernel start before it has waited.
    behind: what torch did between the launch before and this one.
    """

    kernel: str
    wait: str
    given: set[str]
    touched: set[tuple[str, str]]
    is_hasty: bool
    behind: list[str]

    def did(self, *what: str) -> set[str]:
        """The tensors that it did one of these to: "ld early", "st early", "st later"."""
        return {name for name, way in self.touched if way in what}


class Computing(TorchDispatchMode):
    """What torch does outside of our launches, views aside. New memory is among it: it may be some
    that an earlier kernel still reads, and torch fills it where it is to be deterministic.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.ours = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self.ours or func.is_view or name == "detach"):
            self.done.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def early() -> Iterator[list[Seen]]:
    """The launches of this block, each with what it touches before it waits.

    A tensor's name is its address.
    """
    seen: list[Seen] = []
    launch = Launch.__call__
    computing = Computing()

    def noted(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        computing.ours = True
        given = {str(t.data_ptr()): t for t in tensors if t is not None}
        with BeforeWaiting() as moved:
            for name, tensor in given.items():
                moved.watch(name, tensor)
            launch(self, absent, grid, tensors, numbers)
        touched = {(key.split(":")[0], key.split(":")[1]) for key in moved.table()}
        assert "unwatched" not in {name for name, _ in touched}
        everyone = set(range(grid[0] * grid[1] * grid[2]))
        assert moved.waited == moved.started == everyone
        kernel, wait = self.kernel.fn.__name__, self.constants["WAIT"]
        hasty, done = bool(moved.hasty), computing.done
        seen.append(Seen(kernel, wait, set(given), touched, hasty, done))
        computing.done, computing.ours = [], False

    with (
        configured(overlaps=lambda major: True), mock.patch.object(Launch, "__call__", noted),
        computing,
    ):  # fmt: skip
        yield seen


LAYERS = [
    (Layer("adapter", T=37), {}), (Layer("linear"), {}), (Layer("given"), {}), (Layer("qkv"), {}),
    (Layer("given_qkv"), {}), (Layer("linear_p3"), {}), (Layer("qv_p3"), {}),
    (Layer("adapter"), {"drops": True}), (Layer("linear_p3"), {"drops": True}),
    (Layer("adapter"), {"recompute": True}), (Layer("linear"), {"recompute": True}),
    (Layer("adapter"), {"lengths": [4, 0, 9]}), (Layer("adapter", T=300, S=1), {}),
    (Layer("adapter", Nv=3), {}), (Layer("linear", Nv=3), {"lengths": [4, 0, 9]}),
    (Layer("adapter"), {"frozen": ("A", "b_A")}), (Layer("adapter"), {"frozen": ("B", "b_B")}),
    (Layer("linear"), {"frozen": ("x_h", "x_r")}),
]  # fmt: skip


@pytest.mark.parametrize("route", ["none", "mul", "gram_relu"])
@pytest.mark.parametrize(("layer", "more"), LAYERS, ids=str)
def test_nothing_is_touched_that_the_kernel_before_may_still_use(
    layer: Layer, more: dict[str, Any], route: str
) -> None:
    call = Call(Routing(route), **more)
    t = trained(layer, call)
    for name in call.frozen:
        t[name].requires_grad_(False)
    leaves = {name: tensor for name, tensor in t.items() if tensor.requires_grad}

    def results() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return gradients(run(layer, call, t, P if call.drops else 0.0, "triton"), leaves)

    plain = results()
    with early() as seen:
        overlapped = results()
    for name, value in plain.items():
        assert torch.equal(value, overlapped[name]), name
    check(seen)
    with torch.no_grad(), early() as seen:
        y = run(layer, call, t, 0.0, "triton")
    assert call.drops or torch.equal(y, plain["y"])
    check(seen)


def check(seen: list[Seen]) -> None:
    """Nothing is touched early that the launch before may still use."""
    for this in seen:
        hasty = this.is_hasty or this.did("ld early", "st early")
        assert this.wait == "late" or not hasty, this
    assert seen[0].wait == "first"
    for before, this in pairwise(seen):
        if this.wait == "late":
            assert before.wait == "first" and this.kernel in FOLLOWS[before.kernel]
            assert not this.behind, this
            assert not this.did("ld early") & before.did("st early", "st later"), this
            assert not this.did("st early") & before.given, this


@pytest.mark.parametrize(("kernel", "early_loads", "early_stores"), [
    ("routed_forward", {"x_ptr", "A_ptr", "b_A_ptr"}, {"x_t_ptr"}),
    ("weight_partials", {"x_ptr", "dx_t_ptr", "dy_ptr", "z_ptr"}, {"partial_ptr"}),
])  # fmt: skip
def test_what_late_kernels_do_meanwhile(
    kernel: str, early_loads: set[str], early_stores: set[str]
) -> None:
    """All of x and its projection; all sums but the image's."""
    layer, call = Layer("adapter", T=37), Call(Routing("mul"))
    t, names = trained(layer, call), {}
    launch = Launch.__call__

    def noted(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        if self.kernel.fn.__name__ == kernel:
            arguments = zip(self.kernel.arg_names, tensors, strict=False)
            names.update({str(v.data_ptr()): k for k, v in arguments if v is not None})
        launch(self, absent, grid, tensors, numbers)

    with mock.patch.object(Launch, "__call__", noted), early() as seen:
        gradients(run(layer, call, t, 0.0, "triton"), t)
    assert [s.kernel for s in seen] == ADAPTER
    (this,) = (s for s in seen if s.kernel == kernel)
    # x is also the residual, under the later of its names.
    assert {names[n].replace("base", "x") for n in this.did("ld early")} == early_loads
    assert {names[n] for n in this.did("st early")} == early_stores


def test_an_image_made_along_leaves_nothing_to_wait_late_for() -> None:
    layer, call = Layer(), Call(Routing("mul"))
    t = trained(layer, call)
    with (
        configured(overlaps=lambda major: True, image=lambda *of: "along"),
        mock.patch.object(GDC, "gdc_wait", lambda: None),
        mock.patch.object(GDC, "gdc_launch_dependents", lambda: None),
        launched(lambda launch, numbers: launch.constants["WAIT"]) as waits,
    ):
        gradients(run(layer, call, t, 0.0, "triton"), t)
    assert waits == ["first"] * 4


def test_nowhere_a_default() -> None:
    """Not one launch was made so on a GPU."""
    for major in (None, 8, 9, 10, 12):
        assert not config.overlaps(major)
    layer, call = Layer(), Call(Routing("mul"))
    t = trained(layer, call)
    with launched(lambda launch, numbers: launch.constants["WAIT"]) as waits:
        gradients(run(layer, call, t, 0.0, "triton"), t)
    assert waits == ["none"] * 6
    with mock.patch.object(config, "OVERLAPS", frozenset({9})):
        assert [major for major in (None, 8, 9, 10) if config.overlaps(major)] == [9]


@pytest.mark.parametrize(("wait", "expected"), [("none", None), ("first", True), ("late", True)])
@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_a_launch_is_early_where_its_kernel_waits(
    wait: str, expected: bool | None, backend: str
) -> None:
    told: dict[str, Any] = {}

    def warmup(*types: Any, **options: Any) -> Any:
        told.update(options)
        return SimpleNamespace(run=None, packed_metadata=None, function=None)

    active = SimpleNamespace(get_current_target=lambda: GPUTarget(backend, 90, 32))
    launch = Launch(SimpleNamespace(warmup=warmup), config.ADD, {"WAIT": wait})
    with mock.patch.object(launch_module, "driver", SimpleNamespace(active=active)):
        launch._compile((torch.empty(1),), ())
    if backend == "cuda":
        assert told.get("launch_pdl") is expected and told["WAIT"] == wait
    assert config.compiler_options(config.ADD, "hip", wait).get("launch_pdl") is None
