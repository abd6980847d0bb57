"""x_v made by K1 and its gradient summed up by K3, as few rows have it on some GPUs."""

from typing import Any
from unittest import mock

import pytest
import torch
from cases import packed
from kernel_cases import Call, Layer, compared, gradients, run, trained
from tile_tables import launched, tiles
from torch import Tensor

from fused_route import Routing
from fused_route.autograd import forward_op
from fused_route.fusion import Fusion
from fused_route.kernels import config
from fused_route.kernels.launch import Launch
from fused_route.ops import Inputs
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


def test_few_rows_where_the_table_says_so() -> None:
    """Nowhere as it is: it was not timed."""
    for major in (None, 8, 9, 10):
        assert config.image(major, 2, many=False) == "apart"
    with mock.patch.object(config, "ALONG", {9: 2}):
        assert config.image(9, 2, many=False) == "along"
        for major, size, many in ((9, 2, True), (9, 4, False), (8, 2, False), (None, 2, False)):
            assert config.image(major, size, many) == "apart"


def test_inference_stores_no_x_v() -> None:
    layer, call = Layer(), Call(Routing("mul"))
    t, stored = trained(layer, call), []
    launch = Launch.__call__

    def noted(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        names = self.kernel.arg_names
        stored.append(dict(zip(names, tensors, strict=False))["x_v_ptr"] is not None)
        launch(self, absent, grid, tensors, numbers)

    with tiles(**BLOCKS), mock.patch.object(Launch, "__call__", noted):
        y = run(layer, call, t, 0.0, "triton")
        with torch.no_grad():
            assert torch.equal(run(layer, call, t, 0.0, "triton"), y)
    assert stored == [True, False]


PACKINGS = pytest.mark.parametrize("lengths", [None, [4, 0, 9], [0, 0, 12]], ids=str)


@PACKINGS
def test_operators_return_nothing_by_chance(lengths: list[int] | None) -> None:
    """Of a sample without rows nobody makes x_v; an operator's output is zero there."""
    with tiles(**BLOCKS):
        _, _, x_v = forward_op(*inputs(lengths), 0, FUSION.text(), 1.0, True)
    assert x_v.isfinite().all()
    if lengths is not None:
        assert (x_v[1] == 0.0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.usefixtures("unpoisoned")
@PACKINGS
def test_operators(lengths: list[int] | None) -> None:
    with tiles(**BLOCKS):
        torch.library.opcheck(forward_op, (*inputs(lengths), 0, FUSION.text(), 1.0, True))


FUSION = Fusion("scale", "one", "plain", "none", 1, "owned", "residual", "none", 0.0, (0,), 1,
                "saved", "ieee")  # fmt: skip


def inputs(lengths: list[int] | None) -> Inputs:
    """An adapter of three samples, dense or packed."""
    d, R = 24, 6
    rows = sum(lengths) if lengths else 15
    row_sample = offsets = None
    if lengths:
        given = packed(lengths, torch.zeros(3, 1, d), None)
        row_sample, offsets = given.row_sample, given.offsets
        assert row_sample is not None
        rows = len(row_sample)
    A, B = torch.randn(R, d).requires_grad_(), torch.randn(d, R).requires_grad_()
    x, x_r = torch.randn(rows, d).requires_grad_(), torch.randn(3, 1, d)
    return Inputs(
        x, x_r, None, None, A, None, B, None, None, None, None, None, row_sample, offsets
    )  # fmt: skip
