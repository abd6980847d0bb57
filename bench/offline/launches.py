"""Kernels launched and bytes saved for backward: by the library, and by eager torch.

Aten operations and Triton kernels count alike, one each; on CPU tensors, with a driver that
launches nothing (`null_driver`) or in Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import formulations
from bench.offline.count_launches import Launches, count, saved_bytes
from bench.operands import Layer, Operands

S, T, D, R = 4, 32, 64, 16  # bf16
DROPOUTS = (0.0, 0.1)

LAYERS = {
    "adapter": Layer("adapter"),
    "adapter, x_r trained": Layer("adapter", trains_image=True),
    "adapter, recompute": Layer("adapter", recompute=True),
    "adapter, 3 visual tokens": Layer("adapter", "gram", Nv=3),
    "linear": Layer("linear"),
    "linear, x_r trained": Layer("linear", trains_image=True),
    "linear, recompute": Layer("linear", recompute=True),
    "linear, 3 visual tokens": Layer("linear", "gram", Nv=3),
    "linear, base given": Layer("given"),
    "qkv, 2 of 3": Layer("qkv"),
    "qkv, 2 of 3, base given": Layer("given_qkv"),
    "linear, P3": Layer("linear", plan="p3"),
    "linear, P3, recompute": Layer("linear", recompute=True, plan="p3"),
    "linear, P3, 3 visual tokens": Layer("linear", "gram", Nv=3, plan="p3"),
    "qkv, 2 of 3, P3": Layer("qkv", plan="p3"),
}


class Cost(NamedTuple):
    """Of one call and its backward; saved: bytes beyond inputs and parameters."""

    forward: Launches
    backward: Launches
    saved: int

    @property
    def launches(self) -> tuple[int, int]:
        """Of the forward and of the backward pass."""
        forward, backward = (sum(part.counts.values()) for part in self[:2])
        return forward, backward


def way(o: Operands, by: str) -> Callable[[], Tensor]:
    """y of the operands by "ours", "eager" or "module"."""
    if by == "module":
        return partial(o.module(), o.x)
    return partial({"ours": formulations.library, "eager": formulations.by_hand}[by], o)


def cost(layer: Layer, by: str) -> Cost:
    """That of a layer by "ours", "eager" or "module"."""
    o = Operands(layer, S, T, D, R, torch.bfloat16)
    call = way(o, by)
    y: list[Tensor] = []
    forward = count(lambda: y.append(call()))
    backward = count(lambda: y[0].backward(o.dy))
    return Cost(forward, backward, saved_bytes(call, exclude=o.inputs))


def table() -> str:
    """Every layer, without dropout and with it."""
    lines = [
        f"bf16, {S} samples of {T} tokens, d = n = {D}, r = {R}: H = {2 * S * T * R} bytes; "
        "every gradient but that of x_r unless it is trained",
        "",
        "| layer | dropout | launches, forward + backward | eager's | saved bytes | eager's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, layer in LAYERS.items():
        for p in DROPOUTS:
            ours, eager = (cost(replace(layer, dropout=p), by) for by in ("ours", "eager"))
            launches = " | ".join("{} + {}".format(*of.launches) for of in (ours, eager))
            lines.append(f"| {name} | {p} | {launches} | {ours.saved} | {eager.saved} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table; compiles kernels for sm_90 on the way, a minute where none is cached."""
    from bench.offline.null_driver import use_null_driver

    use_null_driver()
    print(table())
