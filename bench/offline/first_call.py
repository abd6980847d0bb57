"""What the first steps of a training wait for: the kernels that a model makes Triton compile.

Kernels are compiled once for each specialisation: kernel, dtypes, absent pointers, widths, tile.
Layers of the same kind share them, and so do all numbers of rows on one side of MANY_ROWS. Triton
keeps them on disk for later runs.
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.offline.specialisations import Specialisation, recorded
from fused_route import RoutedAdapter, RoutedLinear, RoutingContext
from fused_route.kernels.config import MANY_ROWS
from fused_route.kernels.launch import Launch

LAYERS, RANK = 12, 16
FEW, MANY = (2, 9), (2, MANY_ROWS // 2)  # samples, tokens
OTHERS = ((3, 40), (2, MANY_ROWS // 2 + 100))

Shapes = tuple[tuple[int, int], ...]


class Model(nn.Module):
    """As attached to a GPT-2: in each layer query and value of the projection, and an adapter.

    Shapes: (S, T, d) to the same, with an image of (S, 1, d) in `context`.
    """

    def __init__(self, d: int, dtype: torch.dtype, dropout: float = 0.0) -> None:
        super().__init__()
        self.context = RoutingContext()
        named: dict[str, Any] = {"context": self.context, "dropout": dropout, "impl": "triton"}
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            base = nn.Linear(d, 3 * d, dtype=dtype).requires_grad_(False)
            self.layers.append(RoutedLinear(base, RANK, adapted=(0, 2), of=3, **named))
            self.layers.append(RoutedAdapter(d, RANK, dtype=dtype, **named))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).chunk(3, -1)[0] if isinstance(layer, RoutedLinear) else layer(x)
        return x


def train(model: Model, shapes: Shapes, trains_below: bool = True) -> None:
    """A forward and a backward pass over S samples of T tokens, for each of the shapes.

    Where nothing is trained below the first layer, that layer has no gradient of its input.
    """
    like = next(model.parameters())
    for S, T in shapes:
        x = torch.zeros(S, T, like.shape[-1], dtype=like.dtype, requires_grad=trains_below)
        with model.context.using(torch.zeros(S, 1, like.shape[-1], dtype=like.dtype)):
            model.train()(x).backward(torch.zeros_like(x))


@torch.no_grad()
def evaluate(model: Model, shapes: Shapes) -> None:
    """A forward pass alone, without dropout."""
    like = next(model.parameters())
    for S, T in shapes:
        x = torch.zeros(S, T, like.shape[-1], dtype=like.dtype)
        with model.context.using(torch.zeros(S, 1, like.shape[-1], dtype=like.dtype)):
            model.eval()(x)


def compiled(passes: Callable[[], None]) -> set[Specialisation]:
    """What these passes make Triton compile; nothing is."""
    with recorded() as seen:
        passes()
    return set(seen)


def seconds(passes: Callable[[], None]) -> float:
    """Time in Triton's compiler for these passes."""
    spent = 0.0
    compile_ = Launch._compile

    def timed(self: Launch, *given: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return compile_(self, *given)
        finally:
            spent += time.perf_counter() - start

    with mock.patch.object(Launch, "_compile", timed):
        passes()
    return spent


def main() -> None:
    """Prints how many kernels a model needs, and how long compiling them for sm_90 takes."""
    from bench.offline.null_driver import use_null_driver

    with tempfile.TemporaryDirectory() as cold:
        os.environ["TRITON_CACHE_DIR"] = cold
        use_null_driver()
        model = Model(256, torch.bfloat16, dropout=0.1)
        stages = {
            "training, few rows": partial(train, model, (FEW,), False),
            "evaluation, few rows": partial(evaluate, model, (FEW,)),
            "training, many rows": partial(train, model, (MANY,), False),
            "evaluation, many rows": partial(evaluate, model, (MANY,)),
        }
        print(f"{LAYERS} layers, bf16, dropout 0.1; {MANY_ROWS} rows are many")
        print("\n| new in | kernels | seconds |\n| --- | --- | --- |")
        seen: set[Specialisation] = set()
        for name, passes in stages.items():
            new = compiled(passes) - seen
            seen |= new
            print(f"| {name} | {len(new)} | {seconds(passes):.1f} |", flush=True)
        print(f"| together | {len(seen)} | |")
