"""Down-projections that differ: split ones, x_v projected elsewhere, operands prepared before."""

from typing import Any

import pytest
import torch
import transcription
from cases import BUILT_IN, HOSTS, case, valid_tokens
from kernel_cases import DTYPES, KERNEL_ROUTES, module_compared
from torch import Tensor, nn

from fused_route import (
    Dropout,
    RoutedAdapter,
    RoutedLinear,
    Routing,
    RoutingInput,
    routed_adapter,
    routed_linear,
)
from fused_route.bottleneck import Bottleneck
from fused_route.reference import grouped
from fused_route.testing import assert_as_good_as_eager

ROUTES = [route for route in BUILT_IN if route != "none"]
D, N, RANK, K = 6, 4, 3, 2


def split(host: str, route: str, **settings: Any) -> Bottleneck:
    """A layer with an inner rank, and B drawn: at zero nothing behind it would show."""
    made: Bottleneck
    if host == "adapter":
        made = RoutedAdapter(D, RANK, route, inner_rank=K, **settings)
    else:
        adapted, of = ((0, 2), 3) if host == "qkv" else ((0,), 1)
        base = nn.Linear(D, of * N)
        made = RoutedLinear(
            base, RANK, 6.0, route, adapted=adapted, of=of, inner_rank=K, **settings
        )
        base.requires_grad_(False)
    nn.init.normal_(made.B)
    return made


def by_hand(layer: Any, x_h: Tensor, x_r: Tensor, mask: Tensor) -> Tensor:
    """Sample by sample and segment by segment, through φ of the second transcription."""
    rules = transcription.Rules(layer.routing.route.name, "exact", "mean", "none")
    bias = 0.0 if layer.b_A is None else layer.b_A
    x_t = x_h @ layer.A.T @ layer.U.T + bias
    x_v = x_r @ layer.A_v.T @ layer.U_v.T + bias
    out = []
    for b in range(len(x_h)):
        z = [
            transcription._phi(t, v * mask[b, :, None], mask[b].tolist(), rules)
            for t, v in zip(x_t[b].split(RANK, -1), x_v[b].split(RANK, -1), strict=True)
        ]
        if layer.b_A is not None:  # an adapter
            out.append(x_h[b] + nn.functional.gelu(z[0]) @ layer.B.T + layer.b_B)
            continue
        y = list(layer.base(x_h[b]).split(N, -1))
        for segment, z_g, B_g in zip(layer.adapted, z, layer.B.split(N), strict=True):
            y[segment] = y[segment] + layer.s * z_g @ B_g.T
        out.append(torch.cat(y, -1))
    return torch.stack(out)


@pytest.mark.parametrize("Nv", [1, 3])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("host", HOSTS)
def test_split_projections_are_the_formula(host: str, route: str, Nv: int) -> None:
    if route == "self_gram" and Nv > 1:
        return
    layer = split(host, route).double()
    x_h, x_r = torch.randn(3, 4, D).double(), torch.randn(3, Nv, D).double()
    mask = valid_tokens(3, Nv)
    with layer.context.using(RoutingInput(x_r, mask)):
        ours = layer(x_h)
    theirs = by_hand(layer, x_h, x_r, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == (7 if host == "adapter" else 5)
    dy = torch.randn_like(ours)
    for mine, expected in zip(
        *(torch.autograd.grad(y, parameters, dy, allow_unused=True) for y in (ours, theirs)),
        strict=True,
    ):
        if expected is None:  # this route does not look at it
            assert mine is None or not mine.any()
            continue
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Nv", [1, 5])
@pytest.mark.parametrize("route", ["add", "mul", "gram", "expand", "gram_relu", "ones"])
@pytest.mark.parametrize("host", HOSTS)
def test_split_projections_by_kernels(host: str, route: str, Nv: int, dtype: torch.dtype) -> None:
    layer = split(host, route)
    given = RoutingInput(torch.randn(3, Nv, D), valid_tokens(3, Nv) if Nv > 1 else None)
    compared = module_compared(layer, torch.randn(3, 9, D), given, dtype)
    assert {"A", "U", "A_v", "U_v", "B", "x_h", "x_r"} <= compared[0].keys()
    assert_as_good_as_eager(*compared)


def test_split_dropout_hits_both_inputs() -> None:
    layer = split("adapter", "mul", dropout=0.5).train()
    x_h, x_r = torch.ones(1, 2, D), torch.ones(1, 1, D)
    with layer.context.using(x_r):
        seen = {tuple(layer.routing_input(x_h).x_v.flatten().tolist()) for _ in range(20)}  # type: ignore[union-attr]
        assert len(seen) > 3
        layer.eval()
        assert len({tuple(layer(x_h).flatten().tolist()) for _ in range(3)}) == 1


def test_inner_rank_needs_an_image_and_a_number() -> None:
    with pytest.raises(ValueError, match=r"inner_rank=2 splits .* route 'none' takes no image"):
        RoutedAdapter(D, RANK, "none", inner_rank=2)
    with pytest.raises(ValueError, match="inner_rank must be a whole number of at least 1, got 0"):
        RoutedAdapter(D, RANK, "mul", inner_rank=0)


def as_far_as(stage: str, c: Any, routing: Routing, mask: Tensor) -> RoutingInput:
    """The image raw, projected, or prepared."""
    given = RoutingInput(c.x_r, mask)
    if stage == "x_r":
        return given
    x_v = nn.functional.linear(given.x_r, c.A, c.b_A)
    if stage == "x_v":
        return given.projected(x_v)
    G = len(c.adapted) if routing.segments == "per_group" else 1
    return given.prepared(routing.operand(grouped(x_v, G), mask))


@pytest.mark.parametrize("segments", ["per_group", "joint"])
@pytest.mark.parametrize("Nv", [1, 4])
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", HOSTS)
def test_a_projected_or_prepared_image_routes_the_same(
    host: str, route: str, Nv: int, segments: str
) -> None:
    if route == "self_gram" and Nv > 1:
        return
    c, routing = case(host, Nv=Nv), Routing(route, segments=segments)
    mask = valid_tokens(2, Nv)
    results = []
    for stage in ("x_r", "x_v", "operand"):
        given = as_far_as(stage, c, routing, mask)
        if host == "adapter":
            y = routed_adapter(c.x_h, c.A, c.B, given, b_A=c.b_A, b_B=c.bias, route=routing)
        else:
            y = routed_linear(
                c.x_h, c.A, c.B, given, weight=c.weight, bias=c.bias, route=routing,
                adapted=c.adapted, of=c.of,
            )  # fmt: skip
        leaves = list(c.leaves().values())
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)))
    for other in results[1:]:
        for mine, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", ["x_v", "operand"])
@pytest.mark.parametrize("route", KERNEL_ROUTES)
def test_kernels_take_a_projected_or_prepared_image(
    route: str, stage: str, dtype: torch.dtype
) -> None:
    results = []
    for impl, kind in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        torch.manual_seed(0)
        c, routing = case("qkv", B=3, T=7, Nv=1, d=20, r=4), Routing(route)
        t = {
            k: (v * 0.5).detach().to(dtype).to(kind).requires_grad_() for k, v in c.leaves().items()
        }
        c.x_r, c.A = t["x_r"], t["A"]
        given = as_far_as(stage, c, routing, torch.ones(3, 1, dtype=torch.bool))
        base_out = torch.randn(3, 7, 6, dtype=torch.float64).to(dtype).to(kind)
        y = routed_linear(
            t["x_h"], t["A"], t["B"], given, base_out=base_out, route=routing, adapted=(0, 2), of=3,
            impl=impl,  # type: ignore[arg-type]
        )  # fmt: skip
        dy = torch.randn(y.shape, dtype=torch.float64).to(dtype).to(kind)
        y.backward(dy)
        results.append({"y": y.detach()} | {k: v.grad for k, v in t.items() if v.grad is not None})
    assert_as_good_as_eager(*results)


def test_what_was_made_of_the_image_must_fit() -> None:
    c = case("adapter", Nv=3)
    x_v = torch.randn(2, 3, 4, dtype=torch.float64)
    operand = Routing("mul").operand(torch.randn(2, 1, 3, 5).double())

    def call(given: RoutingInput, **more: Any) -> Tensor:
        return routed_adapter(c.x_h, c.A, c.B, given, b_A=c.b_A, b_B=c.bias, **more)

    for wrong, message in (
        (x_v[..., :2], "x_v has 2 columns on cpu, A has R = 4 rows"),
        (x_v.float(), "x_v is torch.float32, A is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call(RoutingInput(c.x_r, x_v=wrong))
    with pytest.raises(ValueError, match=r"x_v must be \(B, Nv, R\) .* got \(2, 2, 4\)"):
        RoutingInput(c.x_r, x_v=x_v[:, :2])
    with pytest.raises(ValueError, match=r"operand must be identity.*, got Tensor"):
        RoutingInput(c.x_r, operand=x_v)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale takes .* got \(2, 1, 1, 5\)"):
        call(RoutingInput(c.x_r, operand=operand))
    keep = torch.ones(2, 3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="keep_r is given, and x_v or operand"):
        call(RoutingInput(c.x_r, x_v=x_v), dropout=Dropout(0.5, None, keep))
    with pytest.raises(ValueError, match="belong to one layer"):
        RoutedAdapter(5, 4).context.set(RoutingInput(c.x_r, x_v=x_v))
    with pytest.raises(ValueError, match="repeat x_r before"):
        RoutingInput(c.x_r, x_v=x_v).repeated(2)
