"""P3: which calls it runs, its tiles, and what its product does with segments, rows and masks."""

from unittest import mock

import pytest
import torch
from kernel_cases import Call, Layer, assert_equal, compared, gradients, run, trained
from test_kernel_properties import SIZES, last_blocks_only, untouched
from tile_tables import launched, on_compute_capability
from torch import Tensor, nn

from bench.configured import configured
from fused_route import Routing, layout, ops, routed_linear
from fused_route.dropout import draw_seed
from fused_route.fusion import Fusion
from fused_route.kernels import config
from fused_route.testing import assert_as_good_as_eager

pytestmark = pytest.mark.interpret

PRODUCT = "extended_product"
TILES = {
    tile: size
    for (size, pair) in (*config.PRODUCTS.items(), (2, config.LARGE_PRODUCTS[9, 2]))
    for tile in pair
}
FROZEN = Fusion("identity", "one", "plain", "none", 1, "none", "frozen", "none", 0.0, (0,), 1,
                "saved", "ieee", "p3")  # fmt: skip


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.BM}x{tile.BN}x{tile.BK}")
def test_every_tile(tile: config.ProductTile) -> None:
    """At sizes that take two, and fill only the first, along each axis."""
    dtype = torch.bfloat16 if TILES[tile] == 2 else torch.float32
    inner = tile.BK + 8
    layer = Layer("qkv_p3", S=2, T=tile.BM // 2 + 3, d=inner, n=tile.BN + 8, r=inner)
    with configured(product_tile=lambda *_: tile):
        assert_as_good_as_eager(*compared(layer, Call(Routing("mul"), drops=True), dtype))


def test_tiles_by_compute_capability() -> None:
    """What is largest fits the shared memory of 9.x alone."""
    for size, pair in config.PRODUCTS.items():
        for major in (None, 8, 10, 12):
            for many in (False, True):
                assert config.product_tile(major, size, many, "ieee") == pair[many]
    large = config.product_tile(9, 2, True, "ieee")
    assert large == config.LARGE_PRODUCTS[9, 2][True] != config.PRODUCTS[2][True]
    assert config.product_tile(9, 4, True, "ieee") == config.PRODUCTS[4][True]
    assert config.product_tile(9, 4, True, "tf32").stages == 1
    A = torch.empty(16, 64, dtype=torch.bfloat16)
    t = ops.Inputs(A, None, None, None, A, None, A.mT, *[None] * 7)
    with mock.patch.object(config, "MANY_ROWS", 1):
        for major in (None, 8, 9):
            with on_compute_capability(major):
                expected = config.product_tile(major, 2, True, "ieee")
                assert ops.plan_for(FROZEN, t).product_tile == expected


@pytest.mark.parametrize(
    ("major", "dtype", "host", "d", "rows", "is_p3"),
    [
        (9, torch.bfloat16, "linear", 64, 8, True),
        (9, torch.float16, "qkv", 64, 9, True),
        (9, torch.bfloat16, "linear", 64, 7, False),
        (9, torch.bfloat16, "linear", 72, 8, False),
        (9, torch.float32, "linear", 64, 8, False),
        (9, torch.bfloat16, "given", 64, 8, False),
        (8, torch.bfloat16, "linear", 64, 8, False),
        (10, torch.bfloat16, "linear", 64, 8, False),
        (None, torch.bfloat16, "linear", 64, 8, False),
    ],
)
def test_the_automatic_plan(
    major: int | None, dtype: torch.dtype, host: str, d: int, rows: int, is_p3: bool
) -> None:
    """Where it was measured to be faster, here made small: D up to 64, from 8 rows on."""
    layer = Layer(host, S=1, T=rows, d=d, n=16, r=4)
    t = trained(layer, Call(Routing("mul")), dtype)
    with (
        mock.patch.object(config, "EXTENDS", {9: (64, 8)}),
        on_compute_capability(major),
        launched() as names,
    ):
        gradients(run(layer, Call(Routing("mul")), t, 0.0, "triton"), t)
    assert names.count(PRODUCT) == (2 if is_p3 else 0)
    assert ("routed_forward" in names) == (not is_p3)


def test_where_the_automatic_plan_is_p3() -> None:
    assert config.extends(9, 2, 1024, 2 / 3, config.MANY_ROWS)
    assert not config.extends(9, 2, 1024, 1 / 3, config.MANY_ROWS)
    for major in (8, 10, None):
        assert not config.extends(major, 2, 768, 1.0, 1 << 20)
    for size, width, M in ((4, 768, 1 << 20), (2, 1032, 1 << 20), (2, 768, config.MANY_ROWS - 1)):
        assert not config.extends(9, size, width, 1.0, M)


def odd(x: Tensor) -> Tensor:
    """The same at an address that loads of 16 bytes do not take."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "rows": (lambda x: x, True),
    "columns": (lambda x: x.mT.contiguous().mT, True),
    "rows apart": (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], False),
    "strided": (lambda x: torch.stack([x, x], -1)[..., 0], False),
    "odd": (odd, False),
    "odd columns": (lambda x: odd(x.mT.contiguous()).mT, False),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_weight(layout: str, dtype: torch.dtype) -> None:
    """By rows or columns, as Conv1D's, it is read where it lies; else torch's product does."""
    change, is_read = LAYOUTS[layout]
    layer, call = Layer("qv_p3", **SIZES), Call(Routing("mul"))
    t = trained(layer, call, dtype)
    weight = t["weight"]
    found = []
    for kind, impl in ((dtype, "triton"), (torch.float64, "reference"), (dtype, "reference")):
        leaves = {k: x.detach().to(kind, copy=True) for k, x in t.items() if k != "weight"}
        leaves = {k: x.requires_grad_(k != "bias") for k, x in leaves.items()}
        leaves["weight"] = change(weight.to(kind))
        with launched() as names:
            found.append(gradients(run(layer, call, leaves, 0.0, impl), leaves))
        assert names.count(PRODUCT) == (2 if is_read and impl == "triton" else 0)
    assert_as_good_as_eager(*found)


def test_weights_of_two_to_the_31_elements_are_torchs() -> None:
    weight = torch.empty(1, dtype=torch.float16)
    assert layout.layout_of(weight.expand(2**15, 2**15)) is None  # neither rows nor columns
    assert layout.layout_of(untouched(2**15, 2**15)) == "rows"
    assert layout.layout_of(untouched(2**15, 2**15).mT) == "columns"
    assert layout.layout_of(untouched(2**16, 2**15)) is None


@pytest.mark.parametrize("host", ["qkv_p3", "qv_p3"])
def test_what_is_adapted_reaches_its_segments_alone(host: str) -> None:
    """In bits: what of A and B is of one segment changes that one, and no other."""
    layer, call = Layer(host, **SIZES), Call(Routing("mul"))
    t = {k: x.detach() for k, x in trained(layer, call, torch.float16).items()}
    y = run(layer, call, t, 0.0, "triton").unflatten(-1, (3, layer.n))
    for i, segment in enumerate(layer.adapted[0]):
        changed = {**t, "A": t["A"].clone(), "B": t["B"].clone()}
        changed["A"][i * layer.r : (i + 1) * layer.r] = torch.inf
        changed["B"][i * layer.n : (i + 1) * layer.n] = torch.nan
        found = run(layer, call, changed, 0.0, "triton").unflatten(-1, (3, layer.n))
        for other in range(3):
            same = torch.equal(found[..., other, :], y[..., other, :])
            assert same == (other != segment)
        assert found[..., segment, :].isnan().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_rows_do_not_reach_each_other(value: float) -> None:
    """Forward from x, backward from dy: row 8 of 42, in one tile with the others."""
    layer, call = Layer("qkv_p3", **SIZES), Call(Routing("mul"))
    t = trained(layer, call, torch.bfloat16)
    x = t["x_h"].detach().clone()
    x[0, 8, 3] = value
    y = run(layer, call, {**t, "x_h": x}, 0.0, "triton").detach()
    assert not y[0, 8].isfinite().any() and int((~y.isfinite()).sum()) == y.shape[-1]

    y = run(layer, call, t, 0.0, "triton")
    dy = torch.ones_like(y)
    dy[0, 8] = value
    dx = torch.autograd.grad(y, t["x_h"], dy)[0]
    assert not dx[0, 8].isfinite().any() and int((~dx.isfinite()).sum()) == layer.d


def test_forward_and_backward_drop_the_same() -> None:
    """What of x is dropped does not change z, and has no gradient but the base's, here zero."""
    layer, call = Layer("qkv_p3", S=2, T=70, d=96, n=40, r=6), Call(Routing("mul"), drops=True)
    t = trained(layer, call)
    t["weight"] = torch.zeros_like(t["weight"])
    torch.manual_seed(7)  # as `run` does
    keep = ops.keep_mask(draw_seed(torch.device("cpu")), tuple(t["x_h"].shape), 0.25)
    y = run(layer, call, t, 0.25, "triton")
    dx = torch.autograd.grad(y.sum(), t["x_h"])[0]
    assert torch.equal(dx != 0.0, keep) and 0.7 < float(keep.double().mean()) < 0.8
    changed = {**t, "x_h": torch.where(keep, t["x_h"], 1e4).detach()}
    assert torch.equal(run(layer, call, changed, 0.25, "triton"), y)


@pytest.mark.parametrize("wanted", [("x_h",), ("A",), ("B",), ("x_r",), ("A", "B", "x_r")])
def test_no_product_without_a_gradient_of_x(wanted: tuple[str, ...]) -> None:
    layer, call = Layer("linear_p3", **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    everything = gradients(run(layer, call, t, 0.0, "triton"), t)
    t = {k: x.detach().requires_grad_(k in wanted) for k, x in t.items()}
    with launched() as names:
        found = gradients(run(layer, call, t, 0.0, "triton"), t)
    assert names.count(PRODUCT) == 1 + ("x_h" in wanted)
    assert_equal(found, {k: everything[k] for k in ("y", *wanted)})


def test_bits_are_the_same_whatever_is_kept() -> None:
    """With x_t saved, computed anew, or without gradients."""
    layer = Layer("qkv_p3", **SIZES)
    t = trained(layer, Call(Routing("gram")), torch.bfloat16)
    calls = [Call(Routing("gram"), recompute=recompute) for recompute in (False, True)]
    saved, again = (gradients(run(layer, call, t, 0.0, "triton"), t) for call in calls)
    assert_equal(saved, again)
    with torch.no_grad():
        assert torch.equal(saved["y"], run(layer, calls[0], t, 0.0, "triton"))


def test_row_offsets_beyond_two_to_the_31() -> None:
    """The last of 2³¹ + 640 elements of x, by columns of W: the rest would take days."""
    D, R, M = 16, 16, 2**27 + 40
    x, y, z, dx = untouched(M, D), untouched(M, D), untouched(M, R), untouched(M, D)
    x[-40:] = torch.randn(40, D)
    A, B, W = (torch.randn(16, 16).half() for _ in range(3))
    t = ops.Inputs(x, None, None, None, A, None, B, *[None] * 7)
    made = ops.plan_for(FROZEN, t)
    sizes = made.sizes(M, 1, 0)
    with last_blocks_only():
        given = (x, A, None, None, None, None, z, None, None, None)
        made.bottleneck(True, sizes.bottleneck_grid, given, sizes.rows)
        made.extended_product("forward", x, W.mT, None, z, B, y, None, 0.5)
        made.extended_product("backward", x, W.mT, None, z, A, dx, None, 1.0)
    tail, z = x[-40:].double(), z[-40:].double()
    A, B, W = A.double(), B.double(), W.double()
    assert torch.allclose(z, tail @ A.T, rtol=1e-2, atol=2e-2)
    expected = tail @ W + 0.5 * z @ B.T
    assert torch.allclose(y[-40:].double(), expected, rtol=1e-2, atol=4e-2)
    assert torch.allclose(dx[-40:].double(), tail @ W.T + z @ A, rtol=1e-2, atol=4e-2)


def test_a_bias_that_torch_takes_is_taken() -> None:
    """Strided, or at an odd address."""
    x, A, B = torch.randn(2, 5, 16), torch.randn(4, 16), torch.randn(24, 4)
    base = nn.Linear(16, 24).requires_grad_(False)
    twice = torch.stack([base.bias, base.bias], -1)
    for bias in (base.bias, twice[:, 0], odd(base.bias), base.bias[:1].expand(24)):
        y, expected = (
            routed_linear(
                x, A, B, weight=base.weight, bias=bias, route="none", impl=impl, plan="p3"
            )
            for impl in ("triton", "reference")
        )  # fmt: skip
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
