"""Tables and inputs that the tests multiply."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_route import ROUTES, RoutingInput

HOSTS = ("linear", "qkv", "adapter")
BUILT_IN = tuple(ROUTES)
MODES = [
    {"transpose": transpose, "segments": segments, "pool": pool, "normalize": normalize}
    for transpose, segments, pool, normalize in product(
        ("exact", "eccv24"), ("per_group", "joint"), ("mean", "first"), ("none", "unit")
    )
]
VALID_MODES = [m for m in MODES if (m["transpose"], m["pool"]) != ("eccv24", "first")]


def in_turn(*axes: Iterable[Any]) -> list[Any]:
    """The product of parameters, every second slow: of three axes on any two values still meet."""
    slow = (pytest.mark.slow,)
    return [
        pytest.param(
            *(value for _, value in each), marks=slow if sum(n for n, _ in each) % 2 else ()
        )
        for each in product(*map(enumerate, axes))
    ]


def mode_id(modes: dict[str, str]) -> str:
    return "-".join(modes.values())


def takes(route: str, modes: dict[str, str], Nv: int, T: int, C: int) -> bool:
    """Whether a built-in route accepts Nv visual tokens beside T text tokens, at width C."""
    if route == "self_gram":
        return Nv == 1
    if modes["transpose"] == "eccv24" and Nv > 1:
        return {"add": Nv == T, "mul": Nv == T, "expand": Nv == C}.get(route, True)
    return True


@dataclass
class Case:
    """Leaves and settings of one call, float64 unless asked otherwise."""

    x_h: Tensor
    x_r: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor
    weight: Tensor | None = None
    b_A: Tensor | None = None
    adapted: tuple[int, ...] = (0,)
    of: int = 1

    def leaves(self) -> dict[str, Tensor]:
        named = {"x_h": self.x_h, "x_r": self.x_r, "A": self.A, "B": self.B, "bias": self.bias}
        return named | ({} if self.b_A is None else {"b_A": self.b_A})


def case(host: str, *, B: int = 2, T: int = 3, Nv: int = 1, d: int = 5, r: int = 4) -> Case:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x_h, x_r = randn(B, T, d), randn(B, Nv, d)
    if host == "adapter":
        return Case(x_h, x_r, randn(r, d), randn(d, r), randn(d), b_A=randn(r))
    adapted, of = ((0, 2), 3) if host == "qkv" else ((0,), 1)
    n, g = 2, len(adapted)
    weight = torch.randn(of * n, d, dtype=torch.float64)
    bias = randn(of * n)
    return Case(x_h, x_r, randn(g * r, d), randn(g * n, r), bias, weight, None, adapted, of)


def valid_tokens(B: int, Nv: int) -> Tensor:
    """A mask with one sample full, one without any valid token, the rest in between."""
    mask = torch.arange(Nv) < torch.randint(1, Nv + 1, (B, 1))
    mask[0] = True
    mask[-1] = False
    return mask


def packed(lengths: list[int], x_r: Tensor, mask: Tensor | None = None) -> RoutingInput:
    """A routing input for packed sequences of these lengths, two padding rows at the end."""
    index = [b for b, length in enumerate(lengths) for _ in range(length)] + [-1, -1]
    return RoutingInput(x_r, mask, torch.tensor(index))
