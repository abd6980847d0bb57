"""Kernels in the interpreter on drawn shapes, dtypes, layouts, modes: as good as eager torch."""

from typing import Any

import pytest
import torch
from cases import VALID_MODES, takes
from drawn import LAYOUTS, layouts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    HOSTS,
    KERNEL_ROUTES,
    Call,
    Layer,
    P,
    compared,
    gradients,
    oracle_dropout,
    run,
    trained,
)

from fused_route import Routing
from fused_route.reference import ACTIVATIONS
from fused_route.testing import assert_as_good_as_eager

pytestmark = pytest.mark.interpret

drawn = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # smaller examples would take minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def layers(draw: Any) -> Layer:
    return Layer(
        host=draw(st.sampled_from(HOSTS)),
        S=draw(st.integers(1, 5)),
        T=draw(st.integers(1, 40)),
        Nv=draw(st.integers(1, 4)),
        d=draw(st.integers(1, 70)),
        n=draw(st.integers(1, 50)),
        r=draw(st.integers(1, 20)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        residual=draw(st.booleans()),
        biases=draw(st.booleans()),
    )


def fits(layer: Layer, route: str, modes: dict[str, str], *, is_plain: bool) -> bool:
    """Whether the kernels take it. Of one column, "unit" leaves a sign, without a gradient."""
    C = layer.r * (len(layer.adapted[0]) if modes["segments"] == "joint" else 1)
    if modes["normalize"] == "unit" and C == 1:
        return False
    if layer.Nv == 1 or modes["transpose"] == "exact":
        return True
    return is_plain and route not in ("add", "mul") and takes(route, modes, layer.Nv, 0, C)


@st.composite
def layers_and_calls(draw: Any) -> tuple[Layer, Call]:
    """What the kernels take."""
    layer, masked = draw(layers()), draw(st.booleans())
    lengths = draw(st.none() | st.lists(st.integers(0, 20), min_size=layer.S, max_size=layer.S))
    lengths = lengths if lengths and sum(lengths) else None
    fitting = [
        (route, modes)
        for route in KERNEL_ROUTES
        for modes in VALID_MODES
        if fits(layer, route, modes, is_plain=not masked and not lengths)
    ]
    route, modes = draw(st.sampled_from(fitting))
    call = Call(
        Routing(route, **modes),
        drops=draw(st.booleans()),
        is_masked=masked and route != "none",
        lengths=lengths,
        recompute=draw(st.booleans()),
        frozen=tuple(draw(st.sets(st.sampled_from(("x_h", "x_r", "B", "b_A", "b_B"))))),
    )
    return layer, call


@drawn
@given(layers_and_calls(), st.sampled_from(DTYPES))
def test_as_good_as_eager(drawn: tuple[Layer, Call], dtype: torch.dtype) -> None:
    assert_as_good_as_eager(*compared(*drawn, dtype))


@drawn
@given(layers_and_calls(), st.sampled_from(DTYPES), st.data())
def test_in_any_layout_too(
    drawn: tuple[Layer, Call], dtype: torch.dtype, data: st.DataObject
) -> None:
    """As good as the kernels are on contiguous tensors, which the test before holds to eager."""
    layer, call = drawn
    ours, plain, truth = {}, {}, {}
    for name, x in trained(layer, call, dtype).items():
        layout = LAYOUTS[data.draw(layouts(name), label=name)]
        if name == "x_r" and call.drops:  # see the last test
            layout = LAYOUTS["contiguous"]
        ours[name] = layout(x.detach()).requires_grad_(x.requires_grad)
        values = ours[name].detach().contiguous().clone()
        plain[name] = values.requires_grad_(x.requires_grad)
        truth[name] = values.detach().double().requires_grad_(x.requires_grad)
    actual, expected = (
        gradients(run(layer, call, t, P if call.drops else 0.0, "triton"), t) for t in (ours, plain)
    )
    exact = gradients(
        run(layer, call, truth, oracle_dropout(layer, call, truth, 7), "reference"), truth
    )
    assert_as_good_as_eager(actual, exact, expected)


def test_dropout_of_the_image_follows_from_the_seed_in_any_layout() -> None:
    layer, call = Layer(S=3, T=5, Nv=4), Call(Routing("gram"), drops=True)
    t = trained(layer, call)
    transposed = {**t, "x_r": LAYOUTS["transposed"](t["x_r"].detach())}
    one, other = (run(layer, call, x, P, "triton") for x in (t, transposed))
    assert_as_good_as_eager({"y": other}, {"y": one.double()}, {"y": one})
