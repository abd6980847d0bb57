"""The table of routes, users' own routes, and what normalize="unit" promises."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import BUILT_IN
from torch import Tensor

from fused_route import (
    ROUTES,
    Operand,
    Route,
    RoutedLinear,
    Routing,
    matrix,
    rank1,
    routed_adapter,
    routed_linear,
    scale,
    shift,
)
from fused_route.routing import gain

DESIGN = {  # mix with one visual token, with several, and what x_t meets first
    "none": ("identity", "identity", "none"),
    "add": ("shift", "shift", "none"),
    "mul": ("scale", "scale", "none"),
    "gram": ("rank1", "matrix", "none"),
    "expand": ("rank1", "rank1", "none"),
    "gram_relu": ("rank1", "matrix", "relu"),
    "ones": ("rank1", "rank1", "none"),
    "ones_relu": ("rank1", "rank1", "relu"),
}


@pytest.mark.parametrize("name", DESIGN)
def test_table(name: str) -> None:
    routing, (one, several, first) = Routing(name), DESIGN[name]
    assert routing.operand(torch.randn(2, 1, 1, 4)).mix == one
    assert routing.operand(torch.randn(2, 1, 3, 4)).mix == several
    assert routing.route.first == first


def test_every_built_in_route_is_in_the_design() -> None:
    assert set(BUILT_IN) == {*DESIGN, "self_gram"}


@pytest.fixture
def brightest() -> Route:
    route = Route("brightest", lambda x_v: scale(x_v.amax(-2, keepdim=True)))
    ROUTES.register(route)
    return route


def test_a_route_of_ones_own(brightest: Route) -> None:
    layer = RoutedLinear(torch.nn.Linear(6, 4), 3, route="brightest")
    torch.nn.init.normal_(layer.B)
    x_h, x_r = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    with layer.context.using(x_r):
        y = layer(x_h)
    z = (x_h @ layer.A.T) * (x_r @ layer.A.T).amax(1, keepdim=True)
    torch.testing.assert_close(y, layer.base(x_h) + z @ layer.B.T)
    assert ROUTES.register(brightest) is brightest  # twice is fine: notebooks run cells again
    assert pickle.loads(pickle.dumps(brightest)) is brightest
    assert copy.deepcopy(layer).routing.route is brightest


WRONG: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "pairs": (scale, "scale takes .* got .2, 1, 5, 3."),  # token with token: eccv24's alone
    "mixes samples": (lambda x_v: scale(x_v.mean(0, keepdim=True)[..., :1, :]), "scale takes"),
    "no rows": (lambda x_v: shift(x_v.mean(-2)), "shift takes"),
    "rank1": (lambda x_v: rank1(x_v, x_v[..., :1, :]), "rank1 takes"),
    "matrix": (matrix, "matrix takes"),
    "a tensor": (lambda x_v: x_v, "what prepare returns must be identity.*got Tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_prepare_that_would_broadcast_is_refused(what: str) -> None:
    prepare, message = WRONG[what]
    x = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=message):
        routed_linear(x, x[0, :3], torch.zeros(4, 3), x, base_out=x, route=Route("own", prepare))


def test_names_are_unique_and_known() -> None:
    with pytest.raises(ValueError, match="name='mul' is taken"):
        ROUTES.register(Route("mul", lambda x_v: shift(x_v[..., :1, :])))
    with pytest.raises(ValueError, match=r"route must be one of none, add.*got 'mull'"):
        Routing("mull")
    with pytest.raises(ValueError, match="takes must be one of"):
        Route("r", ROUTES["add"].prepare, takes="vectors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a Python identifier"):
        Route("no name", ROUTES["add"].prepare)


def test_own_route_has_no_published_form(brightest: Route) -> None:
    with pytest.raises(ValueError, match="eccv24"):
        Routing(brightest, compat="eccv24")


@pytest.mark.parametrize(
    "modes",
    [{"transpose": "t"}, {"segments": "s"}, {"pool": "p"}, {"normalize": "n"}, {"compat": "c"}],
)
def test_modes_are_known(modes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(modes))} must be one of .*; got"):
        Routing("mul", **modes)


def test_compat_sets_both_modes() -> None:
    routing = Routing("gram", compat="eccv24")
    assert (routing.transpose, routing.segments) == ("eccv24", "joint")
    assert Routing("gram") == Routing(ROUTES["gram"])


OPERANDS = {
    "scale": lambda C: scale(3.0 * torch.randn(1, C)),
    "rank1": lambda C: rank1(torch.randn(1, C).relu(), 0.1 * torch.randn(1, C)),
    "matrix": lambda C: matrix(torch.randn(C, C).relu()),
}


@pytest.mark.parametrize("first", ["none", "relu"])
@pytest.mark.parametrize("mix", OPERANDS)
def test_gain_is_the_mean_square_ratio(mix: str, first: str) -> None:
    operand: Operand = OPERANDS[mix](16)
    x_t = 0.7 * torch.randn(200_000, 16)
    z = operand(x_t.relu() if first == "relu" else x_t)
    measured = z.square().mean() / x_t.square().mean()
    torch.testing.assert_close(gain(operand, first).mean(), measured, rtol=0.02, atol=0)


@pytest.mark.parametrize("C", [4, 64])
@pytest.mark.parametrize("Nv", [1, 36])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("name", [n for n in BUILT_IN if n not in ("none", "add", "self_gram")])
def test_unit_keeps_the_scale_whatever_the_image(name: str, size: float, Nv: int, C: int) -> None:
    routing = Routing(name, normalize="unit")
    x_v = size * torch.randn(1, 1, Nv, C).to(torch.float64)
    x_t = torch.randn(1, 1, 100_000, C, dtype=torch.float64)
    z = routing.mix(x_t, routing.operand(x_v))
    torch.testing.assert_close(z.square().mean().item(), 1.0, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [n for n in BUILT_IN if n != "none"])
def test_unit_of_a_black_image_is_zero_with_a_finite_gradient(
    name: str, dtype: torch.dtype
) -> None:
    x_v = torch.zeros(2, 1, 1, 8, dtype=dtype, requires_grad=True)
    routing = Routing(name, normalize="unit")
    x_t = torch.randn(2, 1, 3, 8, dtype=dtype)
    z = routing.mix(x_t, routing.operand(x_v))
    torch.testing.assert_close(z, x_t if name == "add" else torch.zeros_like(x_t))
    z.sum().backward()
    assert x_v.grad is not None and x_v.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mul", "gram", "expand"])
def test_unit_of_an_image_beyond_fp32_is_no_black_one(name: str) -> None:
    routing, x_t = Routing(name, normalize="unit"), torch.randn(1, 1, 3, 8)
    assert routing.mix(x_t, routing.operand(torch.full((1, 1, 2, 8), 1e25))).isnan().all()


def test_a_route_need_not_have_a_hash() -> None:
    @dataclass
    class Times:  # with __eq__, so without __hash__
        factor: float

        def __call__(self, x_v: Tensor) -> Operand:
            return scale(self.factor * x_v)

    x_h, A, B, x_r = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(8, 4), torch.randn(2, 8)
    found = routed_adapter(x_h, A, B, x_r, route=Route("times", Times(1.0), takes="vector"))
    assert torch.equal(found, routed_adapter(x_h, A, B, x_r, route="mul"))
