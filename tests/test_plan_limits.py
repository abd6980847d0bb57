"""What plans hold, and how large what they ask for can be."""

import gc
import weakref
from typing import Literal

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fused_route import RoutingInput, routed_adapter
from fused_route.fusion import Fusion
from fused_route.kernels import config
from fused_route.plan import Plan
from fused_route.sizes import Wanted
from fused_route.testing import assert_as_good_as_eager

ALL = Wanted(True, True, False, False, True, True, True, True)
OWNED = Fusion(
    "scale", "one", "plain", "none", 1, "owned", "residual", "gelu", 0.0, (0,), 1, "saved", "ieee"
)


def plan(major: int | None = 9) -> Plan:
    dtype = torch.bfloat16
    return Plan(OWNED, 768, 768, 64, dtype, dtype, False, major)


def test_a_plan_that_nobody_holds_is_freed() -> None:
    """A schedule of dropout makes a new one at every step."""
    made = plan()
    made.sums(made.sizes(64, 4, 0), ALL, True)
    made._extended("forward", "rows")
    kept = weakref.ref(made)
    del made
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize(("M", "S"), [(64, 2**16), (64, 2**22), (2048, 2**16), (2**18, 2**18)])
def test_more_samples_than_rows_take_no_more_splits(M: int, S: int, major: int) -> None:
    """Packed, and most of them without a row."""
    made = plan(major)
    sums = made.sums(made.sizes(M, S, 0), ALL, True)
    splits, visual = sums.add_numbers
    assert splits >= 1 and visual >= 1 and splits + visual <= 2 * config.WEIGHT_PROGRAMS
    assert sums.length * 4 < 40e6  # bytes; 13 GB with as many splits as samples have in rows
    rows_per_split = sums.partials_numbers[3]
    assert (splits - 1) * rows_per_split < M <= splits * rows_per_split
    assert (visual - 1) * rows_per_split < S <= visual * rows_per_split


@pytest.mark.interpret
@pytest.mark.parametrize("route", ["add", "mul", "ones_relu"])
def test_gradients_where_most_samples_have_no_row(route: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x_h": (5, 20), "x_r": (300, 1, 20), "A": (6, 20), "B": (20, 6)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    dy, sample_index = torch.randn(5, 20, generator=generator), torch.tensor([7, 7, 150, 299, 299])

    def results(impl: Literal["triton", "reference"], dtype: torch.dtype) -> dict[str, Tensor]:
        t = {name: x.to(dtype, copy=True).requires_grad_() for name, x in drawn.items()}
        given = RoutingInput(t["x_r"], sample_index=sample_index)
        y = routed_adapter(t["x_h"], t["A"], t["B"], given, route=route, impl=impl)
        y.backward(dy.to(dtype))
        return {"y": y.detach(), **{name: x.grad for name, x in t.items() if x.grad is not None}}

    assert_as_good_as_eager(
        results("triton", torch.float32),
        results("reference", torch.float64),
        results("reference", torch.float32),
    )
