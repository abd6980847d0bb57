"""x_v made by K1 and its gradient summed up by K3, as few rows have it on some GPUs."""

from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import Call, Layer, compared, gradients, run, trained
from tile_tables import launched, tiles
from torch import Tensor

from fused_route import Routing
from fused_route.kernels import config
from fused_route.testing import assert_as_good_as_eager

pytestmark = pytest.mark.interpret

OWNED = ("add", "mul", "gram", "expand", "gram_relu", "ones", "ones_relu")
# Of 16 rows and columns: no width of these layers is a multiple, and a sample has several blocks.
BLOCKS: dict[str, Any] = {"BM": 16, "BN": 16, "image": "along"}
FOUR = ["routed_forward", "routed_backward", "weight_partials", "add_partials"]


def check(layer: Layer, call: Call, dtype: torch.dtype, expected: list[str] = FOUR) -> None:
    """y and all gradients as good as eager torch's, by these kernels."""
    with tiles(**BLOCKS), launched() as names:
        assert_as_good_as_eager(*compared(layer, call, dtype))
    assert names == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", OWNED)
@pytest.mark.parametrize("host", ["adapter", "linear", "given", "qkv"])
def test_routes(host: str, route: str, dtype: torch.dtype) -> None:
    check(Layer(host, T=37), Call(Routing(route)), dtype)


@pytest.mark.parametrize("route", ["add", "gram_relu"])
@pytest.mark.parametrize("host", ["adapter", "qkv"])
def test_dropout_drops_what_it_does_elsewhere(host: str, route: str) -> None:
    check(Layer(host, T=21), Call(Routing(route), drops=True), torch.float32)


@pytest.mark.parametrize("lengths", [[4, 0, 9], [33, 5, 1], [0, 0, 40]], ids=str)
@pytest.mark.parametrize("route", ["mul", "gram"])
def test_packed_rows(route: str, lengths: list[int]) -> None:
    """With padding between, and samples without rows, whose x_v nobody makes or reads."""
    for drops in (False, True):
        check(Layer(), Call(Routing(route), lengths=lengths, drops=drops), torch.float32)


@pytest.mark.parametrize("layer", [
    Layer(S=70, T=1), Layer(S=70, T=3), Layer(S=1, T=150), Layer(S=2, T=9, r=40),
    Layer("qkv", r=64),
], ids=str)  # fmt: skip
def test_shapes(layer: Layer) -> None:
    check(layer, Call(Routing("gram")), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_an_image_of_another_dtype(dtype: torch.dtype) -> None:
    check(Layer(), Call(Routing("mul"), x_r_dtype=torch.float32), dtype)


@pytest.mark.parametrize(("frozen", "expected"), [
    (("A", "b_A"), ["routed_forward", "routed_backward", "vector_gradient", "weight_partials",
                    "add_partials"]),
    (("A", "b_A", "x_r"), FOUR),
    (("B", "b_B", "x_h"), FOUR),
    (("x_r", "b_A"), FOUR),
])  # fmt: skip
def test_frozen_inputs(frozen: tuple[str, ...], expected: list[str]) -> None:
    """Without dA there is no column block of x_r that could do the sums: they stay apart."""
    check(Layer(), Call(Routing("gram"), frozen=frozen), torch.float32, expected)


def test_what_was_not_saved_is_projected_again() -> None:
    expected = [FOUR[0], "project", *FOUR[1:]]
    check(Layer(), Call(Routing("mul"), recompute=True), torch.float32, expected)


def test_columns_in_parts_make_one_x_v() -> None:
    layer, call = Layer(S=3, T=5, d=50), Call(Routing("gram"), drops=True)
    found: list[dict[str, Tensor]] = []
    for programs in (1, 132):
        t = trained(layer, call)
        with mock.patch.dict(config.FORWARD_PROGRAMS, {0: programs}), tiles(**BLOCKS):
            found.append(gradients(run(layer, call, t, 0.25, "triton"), t))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_p3_projects_the_image_apart() -> None:
    """Its kernel up to the bottleneck is for many rows."""
    with tiles(**BLOCKS), launched() as names:
        assert_as_good_as_eager(*compared(Layer("linear_p3"), Call(Routing("mul")), torch.float32))
    assert names == [
        *("project", "routed_bottleneck", "extended_product"),
        *("routed_backward", "extended_product", "weight_partials", "add_partials"),
    ]


def test_few_rows_of_16_bits_on_compute_capability_9() -> None:
    for major, size, many, image in ((9, 2, False, "along"), (9, 2, True, "apart"),
                                     (9, 4, False, "apart"), (8, 2, False, "apart")):  # fmt: skip
        for kernel in ("forward", "weights"):
            for R_PAD in (16, 32, 64, 128, 256):
                assert config.tile(kernel, R_PAD, size, many, major).image == image
