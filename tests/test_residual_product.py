"""A residual as an operand of a product with the unit matrix: exact, but for what is not finite."""

from typing import Any

import pytest
import torch
from kernel_cases import Call, Layer, assert_equal, gradients, run, trained
from tile_tables import tiles
from torch import Tensor

from fused_route import Routing
from fused_route.fusion import Fusion
from fused_route.kernels import config
from fused_route.plan import Plan

pytestmark = pytest.mark.interpret

ADAPTER = Layer("adapter", S=3, T=7, d=50, r=6)
# Steps of 32 columns: the second is not full.
BLOCKS: dict[str, Any] = {"BM": 16, "BN": 32}


def both(call: Call, dtype: torch.dtype, infinite: bool = False) -> tuple[dict[str, Tensor], ...]:
    """y and all gradients with the residual added, and multiplied."""
    found = []
    for residual in ("added", "multiplied"):
        t = trained(ADAPTER, call, dtype)
        if infinite:
            with torch.no_grad():
                t["x_h"][1, :, 3] = float("inf")
        with tiles(residual=residual, **BLOCKS):
            found.append(gradients(run(ADAPTER, call, t, 0.25 if call.drops else 0.0, "triton"), t))
    return tuple(found)


@pytest.mark.parametrize("route", ["none", "mul", "gram"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_product_is_exact(dtype: torch.dtype, route: str) -> None:
    assert_equal(*both(Call(Routing(route)), dtype))


def test_what_dropout_drops_reaches_no_other_column() -> None:
    """An infinity of x that is dropped before the bottleneck is in y where it is in x alone."""
    added, multiplied = both(Call(Routing("none"), drops=True), torch.float16, infinite=True)
    lost = ~multiplied["y"][1].isfinite()
    assert torch.equal(lost, ~added["y"][1].isfinite())
    assert set(lost.sum(-1).tolist()) == {1, ADAPTER.d}  # dropped, and kept


def test_what_is_not_finite_stays_in_its_row() -> None:
    """There the sum has an infinity or NaN in every column too: the bottleneck spreads it."""
    added, multiplied = both(Call(Routing("none")), torch.float16, infinite=True)
    for y, other in ((added["y"], multiplied["y"]), (multiplied["y"], added["y"])):
        assert torch.equal(y[::2], other[::2])
        assert not y[1].isfinite().any()


F16, F32 = torch.float16, torch.float32


@pytest.mark.parametrize(("base", "p", "dtype", "x_dtype", "expected"), [
    ("residual", 0.0, F16, F16, "multiplied"), ("residual", 0.1, F16, F16, "added"),
    ("residual", 0.0, F32, F32, "added"), ("residual", 0.0, F16, F32, "added"),
    ("frozen", 0.0, F16, F16, "added"), ("none", 0.0, F16, F16, "added"),
])  # fmt: skip
def test_only_residuals_in_16_bits_without_dropout(
    base: str, p: float, dtype: torch.dtype, x_dtype: torch.dtype, expected: str
) -> None:
    fusion = Fusion(
        mix="identity", u="one", w="one", first="none", groups=1, image="none", base=base,
        activation="none", p=p, segments=(0,), of=1, x_t="saved", products="ieee", plan="p1",
    )  # fmt: skip
    with tiles(residual="multiplied"):
        plan = Plan(fusion, 64, 64, 16, dtype, x_dtype, False, None)
    for launch in (plan.forward, plan.forward_in_parts, plan.backward):
        assert launch.constants["BASE"] == expected


def test_the_table_names_what_the_kernels_know() -> None:
    rows = [row for table in (config.TILES, *config.TUNED.values()) for row in table.values()]
    told = {tile.residual for row in rows for pair in row.values() for tile in pair}
    assert told == {"added", "multiplied"}
