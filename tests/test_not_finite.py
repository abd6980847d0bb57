"""NaN and infinity in inputs reach what they reach in eager torch, and nothing else."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import BUILT_IN
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    HOSTS,
    KERNEL_ROUTES,
    Call,
    Layer,
    P,
    gradients,
    oracle_dropout,
    run,
    trained,
)
from torch import Tensor

from fused_route import Routing, RoutingInput, routed_adapter, routed_linear

NAN, INF = float("nan"), float("inf")
drawn = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # smaller examples would take minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
IMAGES: tuple[dict[str, Any], ...] = (
    {},
    {"Nv": 3},
    {"lengths": [4, 2, 5]},
    {"drops": True},
    {"Nv": 3, "is_masked": True},
    {"recompute": True},
)
RELU = ("gram_relu", "ones_relu")


def spoilt(t: dict[str, Tensor], name: str, value: float, part: float) -> dict[str, Tensor]:
    """The same leaves, one element of one of them replaced."""
    copies = {k: x.detach().clone() for k, x in t.items()}
    x = copies[name]
    x[torch.unravel_index(torch.tensor(int(part * x.numel())), x.shape)] = value
    return {k: x.requires_grad_(t[k].requires_grad) for k, x in copies.items()}


def both(layer: Layer, call: Call, t: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """(kernels, eager): y and every gradient, with the same dropout."""
    found = []
    for impl in ("triton", "reference"):
        dropout: Any = P if call.drops else 0.0
        if impl == "reference":
            dropout = oracle_dropout(layer, call, t, 7)
        found.append(gradients(run(layer, call, t, dropout, impl), t))
    return found


@dataclass(frozen=True)
class Spoil:
    """A call with one element of one of its leaves replaced."""

    layer: Layer
    call: Call
    t: dict[str, Tensor]
    name: str
    value: float

    def __repr__(self) -> str:
        return f"Spoil({self.name}, {self.value}, {self.layer}, {self.call})"


@st.composite
def spoils(draw: Any, routes: tuple[str, ...]) -> Spoil:
    host = draw(st.sampled_from(HOSTS))
    route, image = draw(st.sampled_from(routes)), dict(draw(st.sampled_from(IMAGES)))
    layer = Layer(host, S=3, T=5, Nv=image.pop("Nv", 1), d=20, n=12, r=5)
    call = Call(Routing(route), **image)
    t = trained(layer, call)
    names = [name for name in t if name != "x_r" or route != "none"]
    name, value = draw(st.sampled_from(names)), draw(st.sampled_from((NAN, INF, -INF)))
    return Spoil(layer, call, spoilt(t, name, value, draw(st.floats(0, 0.999))), name, value)


def unequal(spoil: Spoil) -> bool:
    """Where the kernels multiply by a zero of their own, and eager torch has nothing to multiply.

    Segments lie side by side, and K is block-diagonal: of rows in which one segment of the
    bottleneck is not finite, the others are not either.
    """
    layer, route = spoil.layer, spoil.call.routing.route
    is_matrix = route.name in ("gram", "gram_relu") and layer.Nv > 1
    return is_matrix and len(layer.adapted[0]) > 1 and spoil.name in ("A", "B", "x_r")


def compare(spoil: Spoil) -> None:
    call, name = spoil.call, spoil.name
    ours, theirs = both(spoil.layer, call, spoil.t)
    assert ours.keys() == theirs.keys()
    assert (ours["y"].isfinite() <= theirs["y"].isfinite()).all()  # none is hidden
    if not unequal(spoil):
        for k in ours:
            assert torch.equal(ours[k].isfinite(), theirs[k].isfinite()), k
    if name in ("x_h", "x_r", "base_out"):
        for found in (ours["y"], theirs["y"]):
            rows = found.flatten(0, -2) if call.lengths else found.flatten(1)
            touched = (~rows.isfinite()).any(-1)
            assert int(touched.sum()) <= (5 if call.lengths and name == "x_r" else 1)


@pytest.mark.interpret
@drawn
@given(spoils(tuple(route for route in KERNEL_ROUTES if route not in RELU)))
def test_kernels_show_what_eager_torch_shows(
    spoil: Spoil,
) -> None:
    compare(spoil)


@pytest.mark.interpret
@drawn
@given(spoils(RELU))
def test_kernels_show_what_eager_torch_shows_through_a_relu(
    spoil: Spoil,
) -> None:
    compare(spoil)


@pytest.mark.interpret
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("route", [route for route in KERNEL_ROUTES if route != "none"])
def test_prepared_inputs(route: str, value: float) -> None:
    """x_v of one sample, as layers are given it that project together or split."""
    found = []
    torch.manual_seed(0)
    x_h, x_r, A, B = (torch.randn(*s) for s in ((3, 5, 20), (3, 1, 20), (4, 20), (12, 4)))
    x_v = torch.randn(3, 1, 4)
    x_v[1, 0, 2] = value
    for impl in ("triton", "reference"):
        t = {"x_h": x_h, "A": A, "B": B, "x_v": x_v}
        t = {k: x.clone().requires_grad_() for k, x in t.items()}
        given = RoutingInput(x_r, x_v=t["x_v"])
        y = routed_linear(
            t["x_h"], t["A"], t["B"], given, base_out=torch.zeros(3, 5, 12), route=route,
            impl=impl,
        )  # fmt: skip
        assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()
        found.append(gradients(y, t))
    for name in found[0]:
        assert torch.equal(found[0][name].isfinite(), found[1][name].isfinite()), name


@pytest.mark.interpret
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("route", KERNEL_ROUTES)
def test_what_is_dropped_or_masked_reaches_nothing(route: str, value: float) -> None:
    call = Call(Routing(route), drops=True, is_masked=True)
    layer = Layer("given", S=3, T=5, Nv=3, d=20, n=12, r=5)
    t = trained(layer, call)
    dropout = oracle_dropout(layer, call, t, 7)
    assert dropout.keep_h is not None
    x_h = torch.where(dropout.keep_h, t["x_h"], value).detach().requires_grad_()
    x_r = t["x_r"].detach().clone()
    x_r[-1] = value  # the sample without a valid token
    for found in both(layer, call, {**t, "x_h": x_h, "x_r": x_r.requires_grad_()}):
        for name, tensor in found.items():
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("route", BUILT_IN)
def test_one_sample_does_not_reach_another(route: str, value: float) -> None:
    x_h, x_r, A, B = (torch.randn(*s) for s in ((3, 5, 8), (3, 1, 8), (4, 8), (8, 4)))
    for spoil in ("x_h", "x_r"):
        t = {"x_h": x_h.clone(), "x_r": x_r.clone()}
        t[spoil][1] = value
        t = {k: x.requires_grad_() for k, x in t.items()}
        y = routed_adapter(t["x_h"], A, B, t["x_r"], route=route)
        assert y[[0, 2]].isfinite().all()
        grads = torch.autograd.grad(y[[0, 2]].sum(), list(t.values()), allow_unused=True)
        for grad in grads:
            assert grad is None or grad[[0, 2]].isfinite().all()


@pytest.mark.interpret
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("R", [5, 16])
@pytest.mark.parametrize("route", ["add", "mul", "gram", "expand", "patches"])
def test_columns_that_fill_a_tile_add_no_nan(route: str, R: int, value: float) -> None:
    """Infinities stay what eager torch makes of them, or zero behind a relu."""
    x_h, x_r = torch.rand(1, 2, 8) + 0.1, torch.rand(1, 3 if route == "patches" else 1, 8) + 0.1
    A, B = torch.rand(R, 8) + 0.1, torch.rand(8, R) + 0.1
    x_h[0, 0, 0] = value
    y, expected = (
        routed_adapter(
            x_h, A, B, x_r, route="gram" if route == "patches" else route, activation="relu",
            residual=False, impl=impl,
        )
        for impl in ("triton", "reference")
    )  # fmt: skip
    assert not expected.isnan().any()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
