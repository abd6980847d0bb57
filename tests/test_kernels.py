"""The kernels in Triton's interpreter: outputs and every gradient as good as eager torch's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import BY_P3, DTYPES, HOSTS, KERNEL_ROUTES, Call, Layer, compared

from fused_route import (
    ROUTES,
    Route,
    Routing,
    identity,
    matrix,
    rank1,
    routed_adapter,
    scale,
    shift,
)
from fused_route.reference import ACTIVATIONS
from fused_route.testing import assert_as_good_as_eager

pytestmark = pytest.mark.interpret

# S, T, Nv, d, n, r: what no tile divides, and what one fills to the last element
SHAPES = {
    "one_row": Layer(S=1, T=1, d=16, n=16, r=16),
    "one_token": Layer(S=5, T=1, Nv=2, d=24, n=20, r=5),
    "exact": Layer(S=2, T=32, d=64, n=64, r=16),
    "odd": Layer(S=3, T=37, Nv=3, d=33, n=17, r=24),
    "long": Layer(S=2, T=150, d=40, n=24, r=3),
    "many_samples": Layer(S=70, T=3, d=20, n=12, r=8),
    "d720": Layer(S=2, T=9, Nv=2, d=720, n=100, r=8),
    "d1000": Layer(S=1, T=11, d=1000, n=130, r=7),
}
WIDE = {"R100": 100, "R128": 128, "R200": 200, "R256": 256}
IMAGES: dict[str, dict[str, Any]] = {
    "patches": {"Nv": 5},
    "masked": {"Nv": 5, "is_masked": True},
    "masked_one": {"Nv": 1, "is_masked": True},
    "packed": {"lengths": [4, 0, 9]},
    "packed_patches": {"Nv": 4, "lengths": [33, 5, 1], "is_masked": True},
    "packed_one_long": {"Nv": 3, "lengths": [1, 2, 200]},  # most programs have no rows
}


def check(layer: Layer, call: Call, dtype: torch.dtype) -> None:
    assert_as_good_as_eager(*compared(layer, call, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("host", dict.fromkeys((*HOSTS, *BY_P3)))
def test_routes(host: str, route: str, dtype: torch.dtype) -> None:
    check(Layer(host, T=37), Call(Routing(route)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("image", IMAGES)
def test_images(image: str, route: str, dtype: torch.dtype) -> None:
    settings = dict(IMAGES[image])
    layer = Layer("qkv" if dtype == torch.float16 else "adapter", Nv=settings.pop("Nv", 1))
    check(layer, Call(Routing(route), **settings), dtype)


@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("image", IMAGES)
def test_images_by_p3(image: str, route: str) -> None:
    settings = dict(IMAGES[image])
    layer = Layer("qv_p3", Nv=settings.pop("Nv", 1))
    check(layer, Call(Routing(route), **settings), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["mul", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("host", ["adapter", "linear", "qkv"])
def test_shapes(host: str, shape: str, route: str, dtype: torch.dtype) -> None:
    check(replace(SHAPES[shape], host=host), Call(Routing(route)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["mul", "gram", "gram_relu"])
@pytest.mark.parametrize("R", WIDE)
@pytest.mark.parametrize("host", ["adapter", "qkv"])
def test_wide_bottlenecks(host: str, R: str, route: str, dtype: torch.dtype) -> None:
    r = WIDE[R] // (2 if host == "qkv" else 1)
    Nv = 1 if route == "gram_relu" else 2
    check(Layer(host, S=2, T=19, Nv=Nv, d=48, n=24, r=r), Call(Routing(route)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("host", "route"), [("linear_p3", "gram"), ("qkv_p3", "mul")])
def test_shapes_by_p3(host: str, route: str, shape: str, dtype: torch.dtype) -> None:
    check(replace(SHAPES[shape], host=host), Call(Routing(route)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("host", "r"), [("linear_p3", 200), ("qkv_p3", 100), ("qv_p3", 128)])
def test_wide_bottlenecks_by_p3(host: str, r: int, dtype: torch.dtype) -> None:
    """The product goes several steps through the bottleneck."""
    check(Layer(host, S=2, T=19, Nv=2, d=48, n=24, r=r), Call(Routing("gram")), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("host", BY_P3)
def test_without_a_bias_by_p3(host: str, dtype: torch.dtype) -> None:
    check(Layer(host, biases=False), Call(Routing("mul")), dtype)


@pytest.mark.parametrize(
    ("image", "dtype"),
    [("one", dtype) for dtype in DTYPES] + [(image, torch.float32) for image in IMAGES],
    ids=str,
)
@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("host", ["adapter", "qkv", "qkv_p3"])
def test_dropout(host: str, route: str, image: str, dtype: torch.dtype) -> None:
    settings = dict(IMAGES.get(image, {}))
    layer = Layer(host, Nv=settings.pop("Nv", 1))
    check(layer, Call(Routing(route), drops=True, **settings), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, biases: bool, residual: bool, dtype: torch.dtype) -> None:
    layer = Layer(activation=activation, biases=biases, residual=residual, Nv=3)
    for route in ("add", "gram"):
        check(layer, Call(Routing(route)), dtype)


@pytest.mark.parametrize("route", ["none", "mul", "gram_relu"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("drops", [False, True])
def test_recompute(host: str, route: str, drops: bool) -> None:
    call = Call(Routing(route), drops=drops)
    saved, again = (
        compared(Layer(host), replace(call, recompute=recompute), torch.bfloat16)[0]
        for recompute in (False, True)
    )
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, again[name]), name


MODES = [
    {"segments": "joint"},
    {"normalize": "unit"},
    {"pool": "first"},
    {"compat": "eccv24"},
    {"compat": "eccv24", "normalize": "unit"},
]


@pytest.mark.parametrize("modes", MODES, ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize("route", KERNEL_ROUTES)
def test_modes(route: str, modes: dict[str, str]) -> None:
    for Nv in (1, 4):
        if modes.get("compat") and Nv > 1 and route in ("add", "mul", "expand"):
            continue  # pair tokens; refused in test_coverage
        check(Layer("qkv", Nv=Nv, r=6), Call(Routing(route, **modes)), torch.float16)


def test_published_expand_with_a_token_for_each_column() -> None:
    check(Layer("given_qkv", Nv=12, r=6), Call(Routing("expand", compat="eccv24")), torch.float16)


OWN_ROUTES = {
    "own_identity": lambda x_v: identity(),
    "own_shift": lambda x_v: shift(x_v.tanh()),
    "own_scale": lambda x_v: scale(x_v.sigmoid()),
    "own_rank1": lambda x_v: rank1(x_v.tanh(), x_v.sigmoid()),
    "own_matrix": lambda x_v: matrix(x_v.mT @ x_v.tanh()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", ["none", "relu"])
@pytest.mark.parametrize("name", OWN_ROUTES)
def test_routes_of_ones_own(name: str, first: str, dtype: torch.dtype) -> None:
    route = Route(name, OWN_ROUTES[name], takes="vector", first=first)  # type: ignore[arg-type]
    assert name not in ROUTES
    check(Layer("qkv", T=9), Call(Routing(route)), dtype)
    check(Layer("adapter"), Call(Routing(route), lengths=[3, 2, 20]), dtype)


LEAVES = {
    "adapter": ("x_h", "x_r", "A", "b_A", "B", "b_B"),
    "linear": ("x_h", "x_r", "A", "B"),
    "given": ("x_h", "x_r", "A", "B", "base_out"),
    "linear_p3": ("x_h", "x_r", "A", "B"),
}


@pytest.mark.parametrize("route", ["mul", "gram", "none"])
@pytest.mark.parametrize(
    ("host", "only"), [(host, leaf) for host, names in LEAVES.items() for leaf in names]
)
@pytest.mark.parametrize("kept", ["alone", "left_out"])
def test_any_gradients_may_be_wanted(host: str, only: str, kept: str, route: str) -> None:
    if route == "none" and kept == "alone" and only == "x_r":
        return  # takes no image
    others = tuple(name for name in LEAVES[host] if name != only)
    frozen = others if kept == "alone" else (only,)
    for Nv in (1, 3):
        check(Layer(host, Nv=Nv), Call(Routing(route), frozen=frozen), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str)
def test_an_image_of_another_dtype(dtype: torch.dtype) -> None:
    """Of 8 bits, which chips load some kinds of, and of 64; one visual token, and three pooled."""
    x_h, A, B = (torch.randn(*s) * s[-1] ** -0.5 for s in ((2, 5, 32), (8, 32), (32, 8)))
    for Nv in (1, 3):
        x_r = torch.randn(2, Nv, 32).to(dtype)
        found = routed_adapter(x_h, A, B, x_r, impl="triton")
        expected = routed_adapter(x_h, A, B, x_r, impl="reference")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
