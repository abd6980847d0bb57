"""Few samples of many rows: gradients of operands go another way, and are as good as eager's."""

from typing import Any

import pytest
import torch
from kernel_cases import Call, Layer, compared, gradients, run, trained
from tile_tables import launched, way_of

from bench.configured import configured
from fused_route import Routing
from fused_route.kernels import config
from fused_route.testing import assert_as_good_as_eager

pytestmark = pytest.mark.interpret

# Where tiles fit any chip, partial sums are of 32 rows each, and steps through K's of 32 or 64.
LENGTHS = {torch.float32: 600, torch.bfloat16: 1100}
ROUTES = {
    "add": 1,
    "mul": 1,
    "gram": 1,
    "gram_relu": 1,
    "expand": 1,
    "unit": 1,
    "matrix": 3,
    "matrix_relu": 3,
}


def routing_of(route: str) -> Routing:
    if route == "unit":  # u and w are given, and both have a gradient
        return Routing("gram", normalize="unit")
    return Routing({"matrix": "gram", "matrix_relu": "gram_relu"}.get(route, route))


def ways(told: list[str | None]) -> set[str]:
    """Of the launches that make an operand's gradient."""
    return {way for way in told if way is not None}


@pytest.mark.parametrize("dtype", LENGTHS, ids=str)
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_two_samples(route: str, drops: bool, dtype: torch.dtype) -> None:
    layer = Layer("adapter", S=2, T=LENGTHS[dtype], Nv=ROUTES[route], d=20, r=5)
    with launched(way_of) as told:
        assert_as_good_as_eager(*compared(layer, Call(routing_of(route), drops=drops), dtype))
    assert ways(told) == {"long"}


@pytest.mark.parametrize("route", ROUTES)
def test_packed_samples_of_uneven_lengths(route: str) -> None:
    """One of them is empty, and rows before and behind belong to none."""
    lengths, Nv = [900, 0, 40, 2000], ROUTES[route]
    layer = Layer("qkv", S=4, Nv=Nv, d=20, n=12, r=5)
    call = Call(routing_of(route), lengths=lengths, is_masked=Nv > 1)
    with launched(way_of) as told:
        assert_as_good_as_eager(*compared(layer, call, torch.float32))
    assert ways(told) == {"long"}


@pytest.mark.parametrize("route", ["mul", "matrix"])
def test_both_ways_agree(route: str) -> None:
    """At the first length that goes the other way, and with tables that leave it where it was."""
    steps = {"mul": config.LONG_VECTORS, "matrix": config.LONG_MATRICES}[route]
    never: dict[str, Any] = {"LONG_VECTORS": 1 << 20, "LONG_MATRICES": 1 << 20}
    T, results = steps * 32, []
    for rows, entries in ((T, {}), (T, never), (T - 1, {})):
        layer = Layer("adapter", S=1, T=rows, Nv=ROUTES[route], d=20, r=5)
        call = Call(routing_of(route))
        t = trained(layer, call)
        with configured(**entries), launched(way_of) as told:
            results.append(gradients(run(layer, call, t, 0.0, "triton"), t))
        assert ways(told) == {"long" if rows == T and not entries else "short"}
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-4)
