"""Which calls the kernels take: `auto` chooses, `triton` refuses with the reason."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from fused_route import (
    ROUTES,
    Dropout,
    Route,
    RoutedAdapter,
    Routing,
    RoutingInput,
    coverage,
    fused,
    known,
    matrix,
    ops,
    routed_linear,
    scale,
)
from fused_route import routed_adapter as adapter
from fused_route.fusion import owns_image
from fused_route.kernels import config

X_H, A, B = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(8, 4)
GPU = torch.device("cuda", 0)


def refused(pattern: str, **changes: Any) -> None:
    given: dict[str, Any] = {"x_h": X_H, "A": A, "B": B, "x_r": torch.randn(2, 8), "route": "mul"}
    given |= changes
    with (
        mock.patch.object(coverage, "device_obstacle", return_value=None),
        pytest.raises(ValueError, match=f"impl='triton' cannot be honoured: .*{pattern}"),
    ):
        adapter(**given, impl="triton")
    adapter(**given, impl="auto")  # what the kernels do not take, the reference does


def test_what_kernels_do_not_cover_is_refused_by_name() -> None:
    many = (torch.randn(2, 3, 8), torch.randn(257, 8), torch.randn(8, 257))
    refused("R = 257 bottleneck columns", x_h=many[0], A=many[1], B=many[2])
    refused("masks of dropout", dropout=Dropout(0.5, None, None))
    refused("mixes tokens", route="self_gram")
    refused("float64", **{k: v.double() for k, v in {"x_h": X_H, "A": A, "B": B}.items()})
    pairs = {"x_r": torch.randn(2, 3, 8), "route": Routing("mul", compat="eccv24")}
    refused("pairs visual with text tokens", **pairs)
    empty = (torch.randn(2, 3, 0), torch.randn(4, 0), torch.randn(0, 4), torch.randn(2, 0))
    refused("has no columns", **dict(zip(("x_h", "A", "B", "x_r"), empty, strict=True)))
    own = Route("own", lambda x_v: scale(x_v), published=lambda x_v: scale(x_v))
    refused("pairs visual", x_r=pairs["x_r"], route=Routing(own, compat="eccv24"))
    with mock.patch.object(ROUTES, "_routes", {**ROUTES, "own": own}):  # as `register` does
        refused("pairs visual", x_r=pairs["x_r"], route=Routing(own, compat="eccv24"))
    rows = RoutingInput(torch.randn(2, 3, 8), operand=scale(torch.randn(2, 1, 3, 4)))
    refused("operand scale has 3 rows a sample", x_r=rows, route=Routing("gram", compat="eccv24"))


class Shard(torch.Tensor):
    """A tensor whose memory is not what its shape says."""


def test_kernels_read_plain_tensors_only() -> None:
    refused("A is a Shard", A=A.as_subclass(Shard))
    refused("x_h is a Shard", x_h=X_H.as_subclass(Shard))
    tensors = {"x_h": X_H, "A": torch.nn.Parameter(A), "B": B, "b_A": None}
    assert coverage.obstacle(tensors, torch.float32, Routing("none"), None, 0.0) is None
    one = RoutingInput(torch.randn(2, 8), operand=scale(torch.ones(2, 1, 1, 4).as_subclass(Shard)))
    refused("operand 0 is a Shard", x_r=one)
    adapter(X_H, A, B, torch.randn(2, 8), impl="auto")  # a sound call vouches for plain ones only
    refused("A is a Shard", A=A.as_subclass(Shard))


def test_kernels_read_plain_operands_of_routes_only() -> None:
    own = Route("own", lambda x_v: scale(x_v.mean(-2, keepdim=True).as_subclass(Shard)))
    with (
        mock.patch.object(coverage, "device_obstacle", return_value=None),
        pytest.raises(ValueError, match=r"operand is a Shard, .* use impl='reference'"),
    ):
        adapter(X_H, A, B, torch.randn(2, 3, 8), route=own, impl="triton")
    adapter(X_H, A, B, torch.randn(2, 3, 8), route=own)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_operands_are_where_the_image_is(impl: Literal["auto", "reference"]) -> None:
    """Kernels are given addresses: of another device's memory they know nothing."""
    own = Route("own", lambda x_v: matrix(torch.eye(4, device="meta").expand(2, 1, 4, 4)))
    given = RoutingInput(torch.randn(2, 8), operand=scale(torch.ones(2, 1, 1, 4, device="meta")))
    for x_r, route, said in (
        (torch.randn(2, 8), own, "route 'own': matrix is on meta, x_v is on cpu"),
        (given, "mul", "route 'mul': scale is on meta, x_v is on cpu"),
    ):
        with pytest.raises(ValueError, match=said):
            adapter(X_H, A, B, x_r, route=route, impl=impl)


# torch 2.11 and 2.14 make forward derivatives of products by it
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_takes_the_reference() -> None:
    x_r = torch.randn(2, 8)
    with mock.patch.object(coverage, "device_obstacle", return_value=None):
        adapter(X_H, A, B, x_r)  # what is known of such a call is not used
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(X_H, torch.ones_like(X_H))
            assert forward_ad.unpack_dual(adapter(dual, A, B, x_r)).tangent is not None
            with pytest.raises(ValueError, match="forward mode"):
                adapter(dual, A, B, x_r, impl="triton")


@pytest.mark.parametrize("repaired", [False, True])
def test_an_interpreter_that_does_not_know_bfloat16(repaired: bool) -> None:
    """Triton's own, which tests repair: without a word it would compute with bits."""
    script = (
        f"{'from interpreter import repair; repair()' if repaired else ''}\n"
        "import torch; from fused_route import routed_adapter\n"
        "def y(dtype, impl='triton'):\n"
        "    torch.manual_seed(0)\n"
        "    shapes = (2, 6, 8), (4, 8), (8, 4), (2, 8)\n"
        "    x, A, B, x_r = (torch.randn(*s, dtype=dtype) for s in shapes)\n"
        "    return routed_adapter(x, A, B, x_r, impl=impl).float()\n"
        "for dtype in (torch.float16, torch.bfloat16):\n"
        "    torch.testing.assert_close(y(dtype), y(dtype, 'reference'), rtol=.02, atol=.02)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    if repaired:
        assert done.returncode == 0, done.stderr
    else:
        assert "ValueError: impl='triton' cannot be honoured: Triton's interpreter" in done.stderr


def test_torch_func_takes_the_reference() -> None:
    x_r = torch.randn(2, 8)
    with mock.patch.object(coverage, "device_obstacle", return_value=None):

        def loss(A: torch.Tensor, impl: str = "auto") -> torch.Tensor:
            return adapter(X_H, A, B, x_r, impl=impl).sum()  # type: ignore[arg-type]

        assert torch.func.grad(loss)(A).shape == A.shape
        with pytest.raises(ValueError, match=r"torch\.func"):
            torch.func.grad(lambda A: loss(A, "triton"))(A)


def test_outputs_of_other_dtypes_are_the_references() -> None:
    base_out = torch.randn(2, 3, 8, dtype=torch.float64)
    x_r = torch.randn(2, 8)
    with (
        mock.patch.object(coverage, "device_obstacle", return_value=None),
        pytest.raises(ValueError, match="base_out is"),
    ):
        routed_linear(X_H, A, torch.randn(8, 4), x_r, base_out=base_out, impl="triton")


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_launch_on_the_device_of_A(current: int) -> None:
    A = SimpleNamespace(is_cuda=True, get_device=lambda: 1, device="cuda:1")

    @ops.on_its_device
    def launch(plan: Any, t: Any) -> str:
        return "launched"

    with (
        mock.patch.object(torch.cuda, "current_device", return_value=current),
        mock.patch.object(torch.cuda, "device") as guard,
    ):
        assert launch(None, SimpleNamespace(A=A)) == "launched"
    assert guard.called == (current != 1)


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="cannot be honoured: tensors are on cpu, not on a GPU"):
        adapter(X_H, A, B, torch.randn(2, 8), impl="triton")


def test_auto_on_a_cpu_is_the_reference() -> None:
    with mock.patch.object(fused, "run") as by_kernels:
        adapter(X_H, A, B, torch.randn(2, 8))
        RoutedAdapter(8, 4, route="none")(X_H)
    assert not by_kernels.called


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "sm_75 is below sm_80"), ((8, 0), None), ((9, 0), None), ((12, 0), None)],
)
def test_nvidia(capability: tuple[int, int], reason: str | None) -> None:
    coverage.gpu_obstacle.cache_clear()
    with (
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        assert coverage.device_obstacle(GPU) == reason
    coverage.gpu_obstacle.cache_clear()


@pytest.mark.parametrize(("chip", "runs"), [("gfx942:sramecc+", True), ("gfx1100", False)])
def test_amd(chip: str, runs: bool) -> None:
    coverage.gpu_obstacle.cache_clear()
    properties = SimpleNamespace(gcnArchName=chip)
    with (
        mock.patch.object(torch.version, "hip", "6.4"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        assert (coverage.device_obstacle(GPU) is None) == runs
    coverage.gpu_obstacle.cache_clear()


def test_without_triton() -> None:
    with mock.patch.object(coverage, "has_triton", return_value=False):
        assert coverage.device_obstacle(GPU) == "Triton is not installed"


def test_limits_are_those_of_the_kernels() -> None:
    assert coverage.MAX_R == config.MAX_R == max(R for R, _ in config.TILES["forward"])


def test_who_computes_x_v() -> None:
    """One vector per sample as it is: the kernels; else torch prepares the operand."""
    plain: dict[str, Any] = {"is_masked": False, "drops": False}
    assert owns_image(Routing("gram"), 1, **plain) and not owns_image(Routing("gram"), 2, **plain)
    assert owns_image(Routing("mul"), 2, **plain) and owns_image(Routing("mul"), 1, **plain)
    assert not owns_image(Routing("mul"), 2, is_masked=False, drops=True)
    assert not owns_image(Routing("mul"), 1, is_masked=True, drops=False)
    assert not owns_image(Routing("mul", normalize="unit"), 1, **plain)
    assert not owns_image(Routing(Route("own", lambda x_v: scale(x_v))), 1, **plain)


def test_calls_are_checked_whenever_anything_differs() -> None:
    """A call that was found sound vouches for no other."""
    x_r = torch.randn(2, 8)
    adapter(X_H, A, B, x_r)
    for changes, pattern in (
        ({"x_r": torch.randn(3, 8)}, "batch of 3"),
        ({"x_r": torch.randn(2, 9)}, "width 9"),
        ({"A": A.double()}, "A is torch.float64"),
        ({"B": B.T}, "B must be"),
        ({"b_A": torch.randn(5)}, "b_A must be"),
        ({"activation": "tanh"}, "activation must be"),
        ({"activation": ["gelu"]}, "activation must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"impl": "cuda"}, "impl must be"),
        ({"x_h": X_H.tolist()}, "x_h must be"),
    ):
        given: dict[str, Any] = {"x_h": X_H, "A": A, "B": B, "x_r": x_r} | changes
        with pytest.raises(ValueError, match=pattern):
            adapter(**given)


def test_autocast_vouches_for_nothing_outside_it() -> None:
    x_h, x_r = X_H.bfloat16(), torch.randn(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        adapter(x_h, A, B, x_r)
    with pytest.raises(ValueError, match="A is"):
        adapter(x_h, A, B, x_r)


def test_a_scale_that_changes_is_read_anew() -> None:
    s = torch.tensor(1.0)
    given: dict[str, Any] = {"x_r": torch.randn(2, 8), "base_out": torch.zeros(2, 3, 8)}
    one = routed_linear(X_H, A, B, s=s, **given)  # type: ignore[arg-type]
    s.mul_(3.0)
    three = routed_linear(X_H, A, B, s=s, **given)  # type: ignore[arg-type]
    assert torch.allclose(three, 3.0 * one)
    with pytest.raises(ValueError, match="s must be"):
        routed_linear(X_H, A, B, s=True, **given)


def test_what_is_known_does_not_grow_without_end() -> None:
    with mock.patch.object(known, "_KNOWN", {}), mock.patch.object(known, "MOST", 3):
        for T in range(1, 9):
            adapter(torch.randn(2, T, 8), A, B, torch.randn(2, 8))
            assert len(known._KNOWN) <= 3
        adapter(X_H, A, B, torch.randn(2, 8), dropout=Dropout(0.5, None, None))
        assert all(isinstance(settings, tuple) for settings, *_ in known._KNOWN)
        assert not any(isinstance(v, Dropout) for settings, *_ in known._KNOWN for v in settings)


def test_tf32_only_where_torch_may() -> None:
    assert fused.products(torch.float32, torch.device("cpu")) == "ieee"
    assert fused.products(torch.bfloat16, GPU) == "ieee"
    torch._dynamo.reset()
    traced = torch.compile(
        lambda x: x if fused.products(torch.float32, GPU) == "ieee" else -x, backend="eager",
        fullgraph=True,
    )  # fmt: skip
    assert torch.equal(traced(A), A)
    with mock.patch.object(torch.version, "hip", None):
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert fused.products(torch.float32, GPU) == "tf32"
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            assert fused.products(torch.float32, GPU) == "ieee"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def test_a_sample_of_more_rows_than_a_grid_takes() -> None:
    """With several visual tokens blocks hold rows of one sample, and are counted in 16 bits."""
    x_h = torch.empty(2, coverage.MAX_OF_SAMPLE + 1, 8, device="meta")
    tensors = {"x_h": x_h, "A": A.to("meta"), "B": B.to("meta")}
    own = Route("own", lambda x_v: matrix(x_v.mT @ x_v))
    for x_r, route, why in (
        (torch.randn(2, 3, 8), "gram", "1048561 rows of one sample"),
        (torch.randn(2, 8), "gram", None),
        (torch.randn(2, 8), own, "1048561 rows of one sample"),
    ):
        given = RoutingInput(x_r.to("meta"))
        found = coverage.obstacle(tensors, torch.float32, Routing(route), given, 0.0)
        assert (found or "").startswith(why or "") and (found is None) == (why is None)


def test_more_blocks_than_a_launch_has() -> None:
    """Of 2**31 programs and more Triton launches none, without an error."""
    x_h = torch.empty(2**20, 8, device="meta")
    tensors = {"x_h": x_h, "A": A.to("meta"), "B": B.to("meta")}
    for S, longest, fits in (
        (65_536, 524_288, False), (65_535, 524_289, False), (65_535, 524_288, True),
    ):  # fmt: skip
        x_r = torch.zeros(1, 1, 1).expand(S, 3, 8)
        given = RoutingInput(x_r, sample_index=torch.zeros(2**20, dtype=torch.long))
        object.__setattr__(given, "longest", longest)
        found = coverage.obstacle(tensors, torch.float32, Routing("gram"), given, 0.0)
        assert (found is None) == fits == (not coverage.is_long(given))
        assert fits or found == f"{S} samples of up to {longest} rows are too many"


@pytest.mark.parametrize("wide", ["A", "B"])
def test_weights_beyond_offsets_of_32_bits(wide: str) -> None:
    d, n = (2**29, 8) if wide == "A" else (8, 2**29)
    shapes = {"x_h": (2, 3, d), "A": (4, d), "B": (n, 4)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = coverage.obstacle(tensors, torch.float32, Routing("none"), None, 0.0)
    assert found is not None and "has 2147483648 elements or more" in found
    less = {
        name: x[..., :-1] if x.shape[-1] == 2**29 else x[: 2**29 - 1] for name, x in tensors.items()
    }
    assert coverage.obstacle(less, torch.float32, Routing("none"), None, 0.0) is None


def test_long_packed_samples_are_not_taken_for_short_ones_of_the_same_shape() -> None:
    x_h, x_r = torch.randn(16, 8), torch.randn(4, 3, 8)

    def call(lengths: list[int], impl: Literal["auto", "triton"] = "auto") -> None:
        index = torch.arange(4).repeat_interleave(torch.tensor(lengths))
        adapter(x_h, A, B, RoutingInput(x_r, sample_index=index), route="gram", impl=impl)

    with (
        mock.patch.object(coverage, "device_obstacle", return_value=None),
        mock.patch.object(coverage, "MAX_OF_SAMPLE", 8),
        mock.patch.object(fused, "run", return_value=x_h),
        mock.patch.object(known, "_KNOWN", {}),
    ):
        call([4, 4, 4, 4], "triton")
        with pytest.raises(ValueError, match="13 rows of one sample"):
            call([13, 1, 1, 1], "triton")
        call([13, 1, 1, 1])


def test_false_is_no_probability_even_where_zero_is_known() -> None:
    with (
        mock.patch.object(coverage, "device_obstacle", return_value=None),
        mock.patch.object(fused, "run", return_value=X_H),
        mock.patch.object(known, "_KNOWN", {}),
    ):
        adapter(X_H, A, B, torch.randn(2, 8), dropout=0.0, impl="triton")
        with pytest.raises(ValueError, match="dropout must be a finite number, got False"):
            adapter(X_H, A, B, torch.randn(2, 8), dropout=False, impl="triton")
