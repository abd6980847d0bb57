"""What holds for any shape, dtype, layout, route and mode of the reference; drawn by hypothesis."""

import json
from typing import Any

import torch
from cases import BUILT_IN, MODES, VALID_MODES
from drawn import DTYPES, LAYOUTS, Drawn, calls, error, layouts
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fused_route import (
    RoutedAdapter,
    RoutedConfig,
    RoutedLinear,
    Routing,
    RoutingInput,
    routed_adapter,
    routed_linear,
)
from fused_route.config import HOSTS, PROJECTORS, TRAIN
from fused_route.modules import NORMS, POSITIONS
from fused_route.reference import ACTIVATIONS
from fused_route.testing import assert_as_good_as_eager

drawn = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EXACT = 1e-11  # of float64, for sums in another order


@drawn
@given(calls(DTYPES))
def test_shape_dtype_and_finite(call: Drawn) -> None:
    y, x_h = call(), call.t["x_h"]
    columns = call.t["weight"].shape[0] if call.host == "linear" else x_h.shape[-1]
    assert y.shape == (*x_h.shape[:-1], columns)
    assert y.dtype == x_h.dtype and y.isfinite().all()


@drawn
@given(calls())
def test_samples_are_computed_as_if_alone(call: Drawn) -> None:
    assume(len(call.t["x_h"]))
    alone = [
        call(
            x_h=call.t["x_h"][b : b + 1],
            x_r=call.t["x_r"][b : b + 1],
            mask=None if call.mask is None else call.mask[b : b + 1],
        )
        for b in range(len(call.t["x_h"]))
    ]
    assert error(call(), torch.cat(alone)) < EXACT


@drawn
@given(calls(DTYPES), st.data())
def test_layout_in_memory_does_not_matter(call: Drawn, data: st.DataObject) -> None:
    laid_out: dict[str, Any] = {
        name: LAYOUTS[data.draw(layouts(name), label=name)](x) for name, x in call.t.items()
    }
    plain: dict[str, Any] = {name: x.contiguous().clone() for name, x in laid_out.items()}
    truth = call(**{name: x.double() for name, x in plain.items()})
    actual, expected = {"y": call(**laid_out)}, {"y": call(**plain)}
    assert_as_good_as_eager(actual, {"y": truth}, expected, factor=4.0)


@drawn
@given(calls(), st.randoms(use_true_random=False))
def test_permuting_samples_permutes_outputs(call: Drawn, random: Any) -> None:
    order = list(range(len(call.t["x_h"])))
    random.shuffle(order)
    permuted = call(
        x_h=call.t["x_h"][order],
        x_r=call.t["x_r"][order],
        mask=None if call.mask is None else call.mask[order],
    )
    assert error(permuted, call()[order]) < EXACT


@drawn
@given(calls(), st.randoms(use_true_random=False))
def test_the_order_of_visual_tokens_does_not_matter(call: Drawn, random: Any) -> None:
    routing = call.routing
    assume(routing.transpose == "exact" and routing.pool == "mean")
    order = list(range(call.t["x_r"].shape[1]))
    random.shuffle(order)
    mask = None if call.mask is None else call.mask[:, order]
    assert error(call(x_r=call.t["x_r"][:, order], mask=mask), call()) < EXACT


@drawn
@given(calls(DTYPES), st.sampled_from((0.0, 1e4, float("nan"), float("inf"))))
def test_what_masked_tokens_hold_does_not_matter(call: Drawn, held: float) -> None:
    assume(call.mask is not None)
    assert call.mask is not None
    x_r = call.t["x_r"].masked_fill(~call.mask.unsqueeze(-1), held)
    assert torch.equal(call(x_r=x_r), call())


@drawn
@given(calls(), st.floats(-4, 4))
def test_linear_in_B_and_in_s(call: Drawn, s: float) -> None:
    B, zero = call.t["B"], torch.zeros_like(call.t["B"])
    base = call(B=zero)
    update = call(s=1.0) - base
    if call.host == "linear":
        assert error(call(s=s), base + s * update) < EXACT
    other = torch.ones_like(B)
    both = call(s=1.0, B=2.0 * B + other)
    assert error(both, base + 2.0 * update + (call(s=1.0, B=other) - base)) < 100 * EXACT


@drawn
@given(calls(least=1), st.data())
def test_rows_do_not_see_each_other(call: Drawn, data: st.DataObject) -> None:
    """Except in self_gram, which is made of them, and pairs of tokens keep their places."""
    assume(call.routing.route.name != "self_gram")
    S, T, _ = call.t["x_h"].shape
    b, t = data.draw(st.integers(0, S - 1)), data.draw(st.integers(0, T - 1))
    x_h = call.t["x_h"].clone()
    x_h[b, t] = torch.nan
    changed = torch.zeros(S, T, 1, dtype=torch.bool)
    changed[b, t] = True
    y, expected = call(x_h=x_h), call()
    assert y[b, t].isnan().all()
    zero = torch.zeros(())
    assert error(torch.where(changed, zero, y), torch.where(changed, zero, expected)) < EXACT


@drawn
@given(calls(least=1), st.integers(0, 3))
def test_packed_rows_equal_padded_ones(call: Drawn, padding: int) -> None:
    assume(call.routing.transpose == "exact")
    S, T, d = call.t["x_h"].shape
    rows = torch.cat([call.t["x_h"].flatten(0, 1), call.t["x_h"].new_ones(padding, d)])
    index = torch.tensor([b for b in range(S) for _ in range(T)] + [-1] * padding)
    packed = RoutingInput(call.t["x_r"], call.mask, index)
    t = call.t
    if call.host == "adapter":
        y = routed_adapter(
            rows, t["A"], t["B"], packed, b_A=t["b_A"], b_B=t["b_B"], route=call.routing
        )
    else:
        y = routed_linear(
            rows, t["A"], t["B"], packed, weight=t["weight"], bias=t["bias"], s=0.5,
            route=call.routing, adapted=call.adapted, of=call.of,
        )  # fmt: skip
    assert error(y[: S * T], call().flatten(0, 1)) < EXACT


@drawn
@given(calls())
def test_modules_are_the_functions(call: Drawn) -> None:
    t, r = call.t, call.t["B"].shape[1]
    d = t["A"].shape[1]
    layer: RoutedLinear | RoutedAdapter
    if call.host == "adapter":
        layer = RoutedAdapter(d, r, call.routing, dtype=torch.float64)
    else:
        base = nn.Linear(d, len(t["bias"]), dtype=torch.float64)
        layer = RoutedLinear(base, r, 0.5 * r, call.routing, adapted=call.adapted, of=call.of)
    state = {f"base.{k}" if k in ("weight", "bias") else k: t[k] for k in t if k[0] != "x"}
    layer.load_state_dict(state)
    with layer.context.using(RoutingInput(t["x_r"], call.mask)):
        assert torch.equal(layer(t["x_h"]), call())


@drawn
@given(st.sampled_from(BUILT_IN), st.sampled_from(MODES))
def test_a_config_routes_as_its_modes(route: str, modes: dict[str, str]) -> None:
    if modes in VALID_MODES:
        assert RoutedConfig(["x"], route=route, **modes).routing() == Routing(route, **modes)  # type: ignore[arg-type]
        return
    for make in (Routing, lambda route, **modes: RoutedConfig(["x"], route=route, **modes)):
        try:
            make(route, **modes)
        except ValueError as error:
            assert "pool='first' with transpose='eccv24'" in str(error)
        else:
            raise AssertionError(f"{make} accepts {modes}")


names = st.text(min_size=1, max_size=12)
lists_of_names = st.one_of(st.lists(names, max_size=3), st.tuples(names, names))


@st.composite
def configs(draw: Any) -> RoutedConfig:
    """Any configuration that is accepted."""
    host = draw(st.sampled_from(sorted(HOSTS)))
    modes = draw(st.sampled_from(VALID_MODES))
    route = draw(st.sampled_from(BUILT_IN))
    optional: dict[str, Any] = {
        "r": st.integers(1, 10**6),
        "dropout": st.floats(0, 1, exclude_max=True),
        "modules_to_save": lists_of_names,
        "train": st.lists(st.sampled_from(TRAIN), unique=True),
        "projector": st.sampled_from(PROJECTORS),
        "layers_to_transform": st.lists(st.integers(0, 99), min_size=1, max_size=4),
    }
    if route != "none":
        optional["inner_rank"] = st.one_of(st.none(), st.integers(1, 64))
        optional["visual_width"] = st.one_of(st.none(), st.integers(1, 4096))
    if host == "lora":
        optional["alpha"] = st.floats(allow_nan=False, allow_infinity=False)
        segments = {"of": 3, "adapted": draw(st.sampled_from(((0, 2), [1], (2, 0))))}
    else:
        segments = {}
        optional |= {
            "activation": st.sampled_from(sorted(ACTIVATIONS)),
            "norm": st.sampled_from(NORMS),
            "position": st.sampled_from(POSITIONS),
            "share": st.sampled_from(("none", "block")),
            "bias": st.booleans(),
            "residual": st.booleans(),
        }
    chosen = draw(st.fixed_dictionaries({}, optional=optional))
    if "layers_to_transform" in chosen:
        chosen["layers_pattern"] = draw(st.one_of(st.none(), names, st.lists(names, min_size=1)))
    if route != "none" and chosen.get("visual_width") is None:
        chosen["routed_by"] = draw(st.sampled_from(("image", "text", "encoder")))
    targets = draw(st.one_of(names, st.lists(names, min_size=1, max_size=3)))
    return RoutedConfig(targets, host, route=route, **modes, **segments, **chosen)


@drawn
@given(configs())
def test_a_config_survives_json(config: RoutedConfig) -> None:
    written = json.loads(json.dumps(config.to_json()))
    assert RoutedConfig.from_json(written) == config
    assert RoutedConfig.from_json(written).to_json() == config.to_json()
    assert config.differences(RoutedConfig.from_json(written)) == []
