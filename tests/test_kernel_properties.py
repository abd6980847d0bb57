"""What holds for the kernels beside their numbers, in the interpreter: doors, dtypes, dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import (
    HOSTS,
    KERNEL_ROUTES,
    Call,
    Layer,
    assert_equal,
    compared,
    gradients,
    run,
    trained,
)
from torch import Tensor, nn

from fused_route import (
    RoutedAdapter,
    RoutedLinear,
    Routing,
    RoutingInput,
    autograd,
    fused,
    ops,
    routed_adapter,
    routed_linear,
)
from fused_route.fusion import OF_ONE_VECTOR, Fusion
from fused_route.plan import Plan
from fused_route.sizes import Wanted
from fused_route.testing import assert_as_good_as_eager

pytestmark = pytest.mark.interpret

SIZES: dict[str, Any] = {"S": 2, "T": 21, "d": 48, "n": 40, "r": 6}


def by_operator(plan: Plan, longest: int, s: float, *tensors: Any) -> Tensor:
    return autograd.traced(plan.f, longest, s, ops.Inputs(*tensors))


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("host", HOSTS)
def test_both_doors_give_the_same_bits(host: str, route: str, drops: bool) -> None:
    """Eager calls go through an autograd.Function, compilers through an operator."""
    for Nv in (1, 3):
        layer, call = Layer(host, Nv=Nv, **SIZES), Call(Routing(route), drops=drops)
        t = trained(layer, call, torch.float16)
        p = 0.25 if drops else 0.0
        eager = gradients(run(layer, call, t, p, "triton"), t)
        with mock.patch.object(autograd.Routed, "apply", by_operator):
            traced = gradients(run(layer, call, t, p, "triton"), t)
        assert_equal(eager, traced)


@pytest.mark.parametrize("host", HOSTS)
def test_runs_are_repeatable(host: str) -> None:
    layer, call = Layer(host, **SIZES), Call(Routing("gram"), drops=True)
    t = trained(layer, call, torch.bfloat16)
    once, twice = (gradients(run(layer, call, t, 0.25, "triton"), t) for _ in range(2))
    assert_equal(once, twice)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no_samples", "no_tokens"])
@pytest.mark.parametrize("route", ["none", "mul", "gram"])
@pytest.mark.parametrize("host", HOSTS)
def test_no_rows(host: str, route: str, shape: tuple[int, int]) -> None:
    S, T = shape
    for Nv in (1, 2):
        layer, call = Layer(host, S=S, T=T, Nv=Nv, d=16, n=8, r=4), Call(Routing(route))
        t = trained(layer, call)
        found = gradients(run(layer, call, t, 0.0, "triton"), t)
        expected = gradients(run(layer, call, t, 0.0, "reference"), t)
        assert_equal(found, expected)


@pytest.mark.parametrize("host", ["adapter", "given_qkv", "qkv_p3"])
def test_memory_of_any_layout(host: str) -> None:
    """Transposed, strided, expanded and at addresses that loads of 16 bytes do not take.

    All but a weight, by whose layout the plan is chosen.
    """
    layer, call = Layer(host, **SIZES), Call(Routing("mul"))
    plain = trained(layer, call, torch.float16)
    expected = gradients(run(layer, call, plain, 0.0, "triton"), plain)

    def odd(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    layouts = {
        "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else odd(x),
        "strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "odd": odd,
    }
    for name, layout in layouts.items():
        t = {k: layout(v.detach()).requires_grad_(v.requires_grad) for k, v in plain.items()}
        t |= {"weight": plain["weight"]} if "weight" in plain else {}
        assert name == "odd" or not t["x_h"].is_contiguous()
        assert_equal(expected, gradients(run(layer, call, t, 0.0, "triton"), t))
    y = run(layer, call, plain, 0.0, "triton")
    ones = torch.autograd.grad(y.sum(), plain["A"], retain_graph=True)[0]  # dy is expanded
    assert torch.equal(ones, torch.autograd.grad(y, plain["A"], torch.ones_like(y))[0])


@pytest.mark.parametrize("host", ["adapter", "linear", "given", "qkv_p3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(host: str, dtype: torch.dtype) -> None:
    """fp32 parameters: dtypes and gradients as the reference has them under autocast."""
    layer, call = Layer(host, **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    found = []
    for impl in ("triton", "reference"):
        with torch.autocast("cpu", dtype):
            y = run(layer, call, t, 0.0, impl)
        found.append(gradients(y, t))
    ours, theirs = found
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    double = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
    truth = gradients(run(layer, call, double, 0.0, "reference"), double)
    for name, tensor in truth.items():  # both round to 16 bits inside, whatever their own dtype
        assert_as_good_as_eager(
            {name: ours[name].to(dtype)}, {name: tensor}, {name: theirs[name].to(dtype)}
        )


def test_autocast_of_the_residual_stream_keeps_it() -> None:
    x_h, A, B = torch.randn(2, 3, 16), torch.randn(4, 16), torch.zeros(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_adapter(x_h, A, B, torch.randn(2, 16), impl="triton")
    assert y.dtype == torch.float32 and torch.equal(y, x_h)


def test_features_of_another_dtype() -> None:
    for dtype in (torch.float64, torch.float32):
        layer, call = Layer("adapter", **SIZES), Call(Routing("mul"))
        t = trained(layer, call, torch.float16)
        t["x_r"] = t["x_r"].detach().to(dtype).requires_grad_()
        found = gradients(run(layer, call, t, 0.0, "triton"), t)
        expected = gradients(run(layer, call, t, 0.0, "reference"), t)
        assert found["x_r"].dtype == expected["x_r"].dtype == dtype
        assert torch.allclose(found["x_r"].float(), expected["x_r"].float(), rtol=0.01, atol=0.02)


def test_second_derivatives_are_refused() -> None:
    layer, call = Layer("adapter", **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    y = run(layer, call, t, 0.0, "triton")
    with pytest.raises(RuntimeError, match=r"differentiable once.*impl='reference'"):
        torch.autograd.grad(y.sum(), t["x_h"], create_graph=True)


def test_a_second_backward_is_refused() -> None:
    layer, call = Layer("linear", **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    y = run(layer, call, t, 0.0, "triton")
    kept = torch.autograd.grad(y.sum(), t["A"], retain_graph=True)
    assert torch.equal(kept[0], torch.autograd.grad(y.sum(), t["A"])[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), t["A"])


@pytest.mark.parametrize("changed", ["x_h", "A", "B", "weight", "x_r"])
def test_changing_what_backward_needs_is_refused(changed: str) -> None:
    layer, call = Layer("linear", **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    y = run(layer, call, t, 0.0, "triton")
    with torch.no_grad():
        t[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_not_needed_may_change() -> None:
    layer, call = Layer("given", **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    y = run(layer, call, t, 0.0, "triton")
    with torch.no_grad():
        t["base_out"].zero_()
    before = y.clone()
    y.sum().backward()
    y.detach().mul_(2.0)
    assert torch.equal(y, 2.0 * before)


@pytest.mark.parametrize("host", HOSTS)
def test_outputs_may_be_changed_in_place(host: str) -> None:
    layer, call = Layer(host, **SIZES), Call(Routing("mul"))
    t = trained(layer, call)
    y = run(layer, call, t, 0.0, "triton")
    expected = gradients(2.0 * y, t)
    y = run(layer, call, t, 0.0, "triton")
    y.mul_(2.0)
    assert_equal(expected, gradients(y, t))


def test_the_base_output_given_is_not_written() -> None:
    for host in ("given", "given_qkv"):
        layer, call = Layer(host, **SIZES), Call(Routing("mul"))
        t = trained(layer, call)
        before = t["base_out"].clone()
        y = run(layer, call, t, 0.0, "triton")
        assert torch.equal(before, t["base_out"]) and not torch.equal(before, y)


def test_segments_that_are_not_adapted_are_the_bases_bits() -> None:
    layer, call = Layer("qkv", **SIZES), Call(Routing("mul"))
    t = trained(layer, call, torch.float16)
    y = run(layer, call, t, 0.0, "triton")
    base = nn.functional.linear(t["x_h"], t["weight"], t["bias"])
    adapted, of = layer.adapted
    for segment in range(of):
        columns = slice(segment * layer.n, (segment + 1) * layer.n)
        same = torch.equal(y[..., columns], base[..., columns])
        assert same == (segment not in adapted)


class TrainableBase(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


@pytest.mark.parametrize("kind", ["trainable", "hooked", "wrapped", "subclass", "conv1d"])
def test_any_base(kind: str) -> None:
    """Only a frozen nn.Linear or Conv1D as it is becomes part of the operation; all agree."""
    from transformers.pytorch_utils import Conv1D

    class Sub(nn.Linear):
        pass

    torch.manual_seed(0)
    base: nn.Module = {"subclass": Sub, "conv1d": lambda i, o: Conv1D(o, i)}.get(kind, nn.Linear)(
        16, 24
    )
    base.requires_grad_(kind == "trainable")
    if kind == "hooked":
        base.register_forward_hook(lambda module, args, out: out + 1.0)
    kwargs = {"in_features": 16, "out_features": 24} if kind == "wrapped" else {}
    layers = []
    for impl in ("triton", "reference"):
        torch.manual_seed(1)
        inner = TrainableBase(base) if kind == "wrapped" else base
        layer = RoutedLinear(inner, 4, route="mul", impl=impl, **kwargs)  # type: ignore[arg-type]
        nn.init.normal_(layer.B)
        layers.append(layer)
    x_h, image, found = torch.randn(2, 5, 16), torch.randn(2, 16), []
    for layer in layers:
        layer.context.set(image)
        x = x_h.clone().requires_grad_()
        with mock.patch.object(fused, "run", wraps=fused.run) as by_kernels:
            y = layer(x)
        assert by_kernels.called == (layer.impl == "triton")
        if by_kernels.called:
            owned = by_kernels.call_args[0][0].fusion.base == "frozen"
            assert owned == (kind == "conv1d")
        y.square().sum().backward()
        assert x.grad is not None
        found.append([y, x.grad, layer.A.grad, layer.B.grad])
        if kind == "trainable":
            found[-1].append(base.weight.grad)
            base.weight.grad = None
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_split_projections_and_projector() -> None:
    """A as a product of two, features through a projector: autograd carries on from the kernels."""
    results = []
    values = [torch.randn(*s, dtype=torch.float64) for s in ((6, 3), (3, 48), (40, 48), (2, 5, 40))]
    x_h, B = torch.randn(2, 7, 48, dtype=torch.float64), torch.randn(32, 6, dtype=torch.float64)
    W = torch.randn(32, 48, dtype=torch.float64)
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        outer, inner, projector, features = (v.to(dtype).requires_grad_() for v in values)
        for route in ("mul", "gram"):
            y = routed_linear(
                x_h.to(dtype), outer @ inner, B.to(dtype), features @ projector,
                weight=W.to(dtype), route=route, impl=impl,  # type: ignore[arg-type]
            )  # fmt: skip
            y.square().mean().backward()
        results.append([t.grad.double() for t in (outer, inner, projector, features)])  # type: ignore[union-attr]
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def untouched(rows: int, columns: int) -> Tensor:
    """fp16 of any size: pages that nothing touches cost no memory."""
    storage = torch.UntypedStorage(2 * rows * columns)
    return torch.tensor([], dtype=torch.float16).set_(storage).view(rows, columns)


def test_row_offsets_beyond_two_to_the_31() -> None:
    """The last of 2³¹ + 640 elements of x, alone: the interpreter would take days for all."""
    D, R, M = 16, 16, 2**27 + 40
    x, y, x_t = untouched(M, D), untouched(M, D), untouched(M, R)
    x[-40:] = torch.randn(40, D)
    A, B = torch.randn(R, D).half(), torch.randn(D, R).half()
    f = Fusion("identity", "one", "plain", "none", 1, "none", "residual", "none", 0.0, (0,), 1,
               "saved", "ieee")  # fmt: skip
    t = ops.Inputs(x, None, None, None, A, None, B, *[None] * 7)
    plan = ops.plan_for(f, t)
    sizes = plan.sizes(M, 1, 0)
    with last_blocks_only():
        tensors = (x, None, A, None, None, None, B, None, x, y, *[None] * 5)
        plan.routed_forward(sizes, (False, False), tensors, 1.0)
        plan.project(x, A, None, None, x_t, "x_h")
    tail = x[-40:].double()
    expected = tail + (tail @ A.double().T).half().double() @ B.double().T
    assert torch.allclose(y[-40:].double(), expected, rtol=1e-2, atol=2e-2)

    assert torch.allclose(x_t[-40:].double(), tail @ A.double().T, rtol=1e-2, atol=2e-2)

    dx = untouched(M, D)
    with last_blocks_only():
        given = (x, x_t, A, None, None, B, x, dx, *[None] * 8)  # dy = x
        plan.backward(Wanted(True, *[False] * 7), sizes.backward_grid, given, (*sizes.rows, 1.0))
    expected = tail + (tail @ B.double()).half().double() @ A.double()
    assert torch.allclose(dx[-40:].double(), expected, rtol=1e-2, atol=2e-2)


@contextmanager
def last_blocks_only(blocks: int = 3) -> Iterator[None]:
    """Runs only the last programs along the first axis of a grid."""
    from triton.runtime import interpreter

    call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder

    def short(self: Any, *args: Any, **kwargs: Any) -> Any:
        skipped = max(self.grid[0] - blocks, 0)
        self.grid = (self.grid[0] - skipped, *self.grid[1:])

        def set_grid_idx(builder: Any, x: int, y: int, z: int) -> None:
            builder.grid_idx = (x + skipped, y, z)

        with mock.patch.object(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx):
            return call(self, *args, **kwargs)

    assert hasattr(builder, "set_grid_idx")
    with mock.patch.object(interpreter.GridExecutor, "__call__", short):
        yield


def test_images_at_2_to_the_31_are_refused() -> None:
    x_h = torch.empty(1, 1).expand(2**31, 1)
    with pytest.raises(ValueError, match="rows are more than"):
        routed_adapter(x_h, torch.ones(1, 1), torch.ones(1, 1), route="none", impl="triton")


@pytest.mark.parametrize("route", ["gram", "mul"])
def test_the_mix_starts_from_what_is_saved(route: str) -> None:
    """With B the identity y is z, rounded: exactly that of the rounded x_t which backward reads."""
    x_h, A, x_r = torch.randn(2, 40, 16), 4.0 * torch.randn(16, 16), torch.randn(2, 1, 16)
    x_h, A, x_r = x_h.bfloat16(), A.bfloat16(), x_r.bfloat16()
    mix, u, w = OF_ONE_VECTOR[route]
    f = Fusion(mix, u, w, "none", 1, "owned", "none", "none", 0.0, (0,), 1, "saved", "ieee")
    t = ops.Inputs(x_h, x_r, None, None, A, None, torch.eye(16).bfloat16(), *[None] * 7)
    y, x_t, x_v = ops.forward(ops.plan_for(f, t), t, 0, 1.0, True, True)
    assert x_t is not None and x_v is not None
    x, v = x_t.double().view(2, 40, 16), x_v.double()[:, None]
    z = x * v if route == "mul" else (x * v).sum(-1, keepdim=True) * v
    equal = y == z.bfloat16()
    assert float(equal.double().mean()) > 0.99  # fp32 sums may fall on the other side of a tie


@pytest.mark.parametrize("route", ["add", "gram_relu"])
def test_nan_stays_nan(route: str) -> None:
    x_h, A, B = torch.randn(2, 3, 16), torch.randn(4, 16), torch.randn(16, 4)
    x_h[1, 2, 5] = torch.nan
    y = routed_adapter(
        x_h, A, B, torch.randn(2, 16), route=route, activation="relu", residual=False, impl="triton"
    )
    assert y[1, 2].isnan().all() and y.isnan().sum() == 16


@pytest.mark.parametrize("host", ["qkv", "qkv_p3"])
def test_an_infinity_stays_in_its_segment(host: str) -> None:
    layer, call = Layer(host, **SIZES), Call(Routing("mul"))
    t = {k: v.detach() for k, v in trained(layer, call, torch.float16).items()}
    t["A"][: layer.r] *= 1e4  # what overflows is the first adapted segment, the last of y
    ours, theirs = (run(layer, call, t, 0.0, impl) for impl in ("triton", "reference"))
    assert not theirs.isfinite().all()
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_beams_and_packed_rows_reach_the_kernels() -> None:
    image = RoutingInput(torch.randn(2, 16)).repeated(3)
    layer = RoutedAdapter(16, 4, "mul", impl="triton")
    nn.init.normal_(layer.B)
    layer.context.set(image)
    x_h = torch.randn(6, 1, 16)
    expected = routed_adapter(
        x_h, layer.A, layer.B, image, b_A=layer.b_A, b_B=layer.b_B, impl="reference"
    )
    assert torch.allclose(layer(x_h), expected, rtol=1e-4, atol=1e-5)


def test_kernels_compare_like_the_reference_at_a_larger_size() -> None:
    """More than one split of the weight gradients, several blocks a sample."""
    layer = Layer("qkv", S=3, T=400, Nv=1, d=40, n=24, r=8)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_good_as_eager(*compared(layer, Call(Routing("gram")), dtype))
