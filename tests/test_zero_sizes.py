"""No samples, no tokens, no packed rows: outputs of the right shape, gradients of zero."""

from typing import Any

import pytest
import torch
from bad_inputs_models import Model
from cases import BUILT_IN, Case, case
from kernel_cases import (
    HOSTS,
    KERNEL_ROUTES,
    Call,
    Layer,
    assert_equal,
    gradients,
    leaves,
)
from torch import Tensor, nn

from fused_route import (
    RoutedAdapter,
    RoutedConfig,
    RoutedLinear,
    Routing,
    RoutingInput,
    VisualProjector,
    attach,
    fold,
    masked_mean,
    routed_adapter,
    routed_linear,
)

# samples, tokens
EMPTY = {"no samples": (0, 3), "no tokens": (2, 0), "neither": (0, 0)}


def called(c: Case, host: str, routing: Routing, given: Tensor | RoutingInput) -> Tensor:
    if host == "adapter":
        return routed_adapter(c.x_h, c.A, c.B, given, b_A=c.b_A, b_B=c.bias, route=routing)
    return routed_linear(
        c.x_h, c.A, c.B, given, weight=c.weight, bias=c.bias, route=routing,
        adapted=c.adapted, of=c.of,
    )  # fmt: skip


def assert_nothing(y: Tensor, inputs: dict[str, Tensor]) -> None:
    """No rows, and no gradient from them."""
    assert y.numel() == 0 and y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), list(inputs.values()), allow_unused=True)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        assert grad is None or (grad.shape == x.shape and (grad == 0).all()), name


@pytest.mark.parametrize("normalize", ["none", "unit"])
@pytest.mark.parametrize("size", EMPTY)
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", ["linear", "qkv", "adapter"])
def test_functions(host: str, route: str, size: str, normalize: str) -> None:
    S, T = EMPTY[size]
    for Nv in (1,) if route == "self_gram" else (1, 3):
        c = case(host, B=S, T=T, Nv=Nv)
        routing = Routing(route, normalize=normalize)
        for mask in (None, torch.zeros(S, Nv, dtype=torch.bool)):
            y = called(c, host, routing, RoutingInput(c.x_r, mask))
            columns = c.x_h.shape[-1] if host == "adapter" else c.bias.shape[0]
            assert y.shape == (S, T, columns)
            assert_nothing(y, c.leaves())


@pytest.mark.parametrize("S", [0, 2])
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", ["linear", "adapter"])
def test_no_packed_rows(host: str, route: str, S: int) -> None:
    c = case(host, B=S, T=1)
    c.x_h = torch.randn(0, c.x_h.shape[-1], dtype=torch.float64, requires_grad=True)
    given = RoutingInput(c.x_r, None, torch.zeros(0, dtype=torch.int64))
    assert given.offsets is not None and given.offsets.tolist() == [0] * (S + 1)
    assert given.longest == 0
    assert_nothing(called(c, host, Routing(route), given), c.leaves())


@pytest.mark.parametrize("route", BUILT_IN)
def test_nothing_but_packed_padding_passes_unrouted(route: str) -> None:
    c = case("adapter", B=2, T=1)
    x_h = torch.randn(3, c.x_h.shape[-1], dtype=torch.float64)
    c.x_h = x_h
    given = RoutingInput(c.x_r, None, torch.full((3,), -1))
    routed = called(c, "adapter", Routing(route), given)
    torch.testing.assert_close(routed, called(c, "adapter", Routing("none"), c.x_r))


@pytest.mark.parametrize("size", EMPTY)
@pytest.mark.parametrize("settings", [{}, {"inner_rank": 2}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("host", ["linear", "adapter"])
def test_modules(host: str, settings: dict[str, Any], size: str) -> None:
    S, T = EMPTY[size]
    layer: RoutedLinear | RoutedAdapter
    if host == "linear":
        layer = RoutedLinear(nn.Linear(8, 6), 4, **settings)
    else:
        layer = RoutedAdapter(8, 4, norm="before", **settings)
    nn.init.normal_(layer.B)
    x_h = torch.randn(S, T, 8, requires_grad=True)
    with layer.context.using(torch.randn(S, 3, 8)):
        y = layer(x_h)
    assert y.shape == (S, T, 6 if host == "linear" else 8)
    assert_nothing(y, {"x_h": x_h, **dict(layer.named_parameters())})


@pytest.mark.parametrize("size", EMPTY)
def test_attached_models_train_on_nothing(size: str) -> None:
    S, T = EMPTY[size]
    attached = attach(Model(), RoutedConfig(["first", "second"], visual_width=5))
    before = {name: p.detach().clone() for name, p in attached.model.named_parameters()}
    optimiser = torch.optim.SGD(attached.trainable_parameters(), lr=1.0)
    with attached.using(torch.randn(S, 2, 5)):
        y = attached.model(torch.randn(S, T, 8))
    assert y.shape == (S, T, 8)
    y.sum().backward()
    optimiser.step()
    for name, parameter in attached.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("size", EMPTY)
@pytest.mark.parametrize("route", ["add", "mul", "gram"])
def test_folded_images(route: str, size: str) -> None:
    S, T = EMPTY[size]
    attached = attach(Model().eval(), RoutedConfig(["first"], route=route))
    with fold(attached.model, torch.randn(S, 2, 8)):
        assert attached.model(torch.randn(S, T, 8)).shape == (S, T, 8)
    with fold(attached.model, torch.randn(1, 2, 8), into="host"):
        assert attached.model(torch.randn(1, 0, 8)).shape == (1, 0, 8)


@pytest.mark.parametrize("size", EMPTY)
def test_means_and_projectors(size: str) -> None:
    S, T = EMPTY[size]
    for mask in (None, torch.ones(S, T).long()):
        mean = masked_mean(torch.randn(S, T, 8), mask)
        assert mean.shape == (S, 1, 8) and (mean == 0).all()
    assert VisualProjector(5, {8})(torch.randn(0, 2, 5))[8].shape == (0, 2, 8)
    assert RoutingInput(torch.randn(0, 8)).repeated(3).x_r.shape == (0, 1, 8)


def packed_call(layer: Layer, route: str, t: dict[str, Tensor], impl: str) -> Tensor:
    """The layer on packed rows that are none, beside images that are there."""
    given = RoutingInput(t["x_r"], None, torch.zeros(0, dtype=torch.int64))
    adapted, of = layer.adapted
    settings: dict[str, Any] = {"route": route, "impl": impl}
    if layer.host == "adapter":
        return routed_adapter(
            t["x_h"], t["A"], t["B"], given, b_A=t["b_A"], b_B=t["b_B"], **settings
        )
    base: dict[str, Any] = {name: t.get(name) for name in ("weight", "bias", "base_out")}
    return routed_linear(
        t["x_h"], t["A"], t["B"], given, **base, adapted=adapted, of=of, plan=layer.plan, **settings
    )


@pytest.mark.interpret
@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("host", HOSTS)
def test_no_packed_rows_in_kernels(host: str, route: str) -> None:
    for S, Nv in ((2, 1), (2, 3), (0, 1)):
        layer, call = Layer(host, S=S, T=0, Nv=Nv, d=16, n=8, r=4), Call(Routing(route))
        found = []
        for impl in ("triton", "reference"):
            torch.manual_seed(3)
            t = {k: x.flatten(0, 1) if k in ("x_h", "base_out") else x
                 for k, x in leaves(layer, call, torch.float32).items()}  # fmt: skip
            t = {k: x.requires_grad_(k not in ("weight", "bias")) for k, x in t.items()}
            found.append(gradients(packed_call(layer, route, t, impl), t))
        assert_equal(*found)
