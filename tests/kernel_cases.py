"""One call of a routed layer, three times: by the kernels, by eager torch, and in float64."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import packed, valid_tokens
from torch import Tensor

from fused_route import Dropout, Routing, RoutingInput, routed_adapter, routed_linear
from fused_route.bottleneck import Bottleneck
from fused_route.functional import ProductPlan
from fused_route.fusion import owns_image
from fused_route.ops import draw_seed, keep_mask
from fused_route.reference import NO_DROPOUT

# Frozen bases by plan P1, and by P3, with a weight by rows or, as Conv1D's, by columns ("qkv_p3").
FROZEN = ("linear", "qkv")
BY_P3 = ("linear_p3", "qkv_p3", "qv_p3")
HOSTS = ("adapter", "linear", "given", "qkv", "given_qkv", "linear_p3", "qkv_p3")
KERNEL_ROUTES = ("none", "add", "mul", "gram", "expand", "gram_relu", "ones", "ones_relu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEGMENTS = {
    "qkv": ((2, 0), 3), "given_qkv": ((0, 2), 3), "qkv_p3": ((2, 0), 3), "qv_p3": ((0, 2), 3),
}  # fmt: skip
P = 0.25


@dataclass(frozen=True)
class Layer:
    """A host with its sizes: S samples of T tokens and Nv visual tokens, widths d → n, rank r."""

    host: str = "adapter"
    S: int = 3
    T: int = 7
    Nv: int = 1
    d: int = 50
    n: int = 40
    r: int = 6
    activation: str = "gelu"
    residual: bool = True
    biases: bool = True

    @property
    def adapted(self) -> tuple[tuple[int, ...], int]:
        """(adapted, of)."""
        return SEGMENTS.get(self.host, ((0,), 1))

    @property
    def plan(self) -> ProductPlan:
        return "p3" if self.host in BY_P3 else "auto"


@dataclass(frozen=True)
class Call:
    """What a layer is called with."""

    routing: Routing
    drops: bool = False
    is_masked: bool = False
    lengths: list[int] | None = None
    recompute: bool = False
    frozen: tuple[str, ...] = ()
    x_r_dtype: torch.dtype | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def leaves(layer: Layer, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values that dtype can hold, of the size that training has: A and B like nn.Linear's."""
    adapted, of = layer.adapted
    g, n = len(adapted), layer.d if layer.host == "adapter" else layer.n
    rows = (sum(call.lengths) + 2,) if call.lengths else (layer.S, layer.T)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    named = {
        "x_h": randn(*rows, layer.d),
        "x_r": randn(layer.S, layer.Nv, layer.d),
        "A": randn(g * layer.r, layer.d, scale=layer.d**-0.5),
        "B": randn(g * n, layer.r, scale=layer.r**-0.5),
    }
    if layer.host == "adapter" and layer.biases:
        named |= {"b_A": randn(layer.r), "b_B": randn(n)}
    if layer.host in (*FROZEN, *BY_P3):
        weight = randn(of * n, layer.d, scale=layer.d**-0.5)
        named["weight"] = weight.mT.contiguous().mT if layer.host == "qkv_p3" else weight
        if layer.biases:
            named["bias"] = randn(of * n)
    if layer.host in ("given", "given_qkv"):
        named["base_out"] = randn(*rows, of * n)
    return named


def routing_input(layer: Layer, call: Call, x_r: Tensor) -> RoutingInput:
    torch.manual_seed(1)
    mask = valid_tokens(layer.S, layer.Nv) if call.is_masked else None
    if call.lengths:
        return packed(call.lengths, x_r, mask)
    return RoutingInput(x_r, mask)


def oracle_dropout(layer: Layer, call: Call, t: dict[str, Tensor], seed: int) -> Dropout:
    """The masks that the kernels draw after `torch.manual_seed(seed)`."""
    if not call.drops:
        return NO_DROPOUT
    torch.manual_seed(seed)
    drawn = draw_seed(t["x_h"].device)
    keep_h = keep_mask(drawn, tuple(t["x_h"].shape), P)
    if call.routing.route.takes == "nothing":
        return Dropout(P, keep_h, None)
    if owns_image(call.routing, layer.Nv, is_masked=call.is_masked, drops=True):
        return Dropout(P, keep_h, keep_mask(drawn, tuple(t["x_r"].shape), P, "x_r"))
    keep_r = torch.empty(t["x_r"].shape, dtype=torch.bool).bernoulli_(1.0 - P)
    return Dropout(P, keep_h, keep_r)


def run(
    layer: Layer, call: Call, t: dict[str, Tensor], dropout: Dropout | float, impl: str
) -> Tensor:
    """y of the public function."""
    adapted, of = layer.adapted
    given: dict[str, Any] = {"route": call.routing, "dropout": dropout, "impl": impl}
    given |= {"recompute": call.recompute, **call.settings}
    x_r = routing_input(layer, call, t["x_r"])
    if isinstance(dropout, float):
        torch.manual_seed(7)
    if layer.host == "adapter":
        return routed_adapter(
            t["x_h"], t["A"], t["B"], x_r, b_A=t.get("b_A"), b_B=t.get("b_B"),
            activation=layer.activation, residual=layer.residual, **given,
        )  # fmt: skip
    return routed_linear(
        t["x_h"], t["A"], t["B"], x_r, weight=t.get("weight"), bias=t.get("bias"),
        base_out=t.get("base_out"), s=0.5, adapted=adapted, of=of, plan=layer.plan, **given,
    )  # fmt: skip


def compared(
    layer: Layer, call: Call, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and all gradients by (kernels, float64 truth, eager torch of the same dtype)."""
    torch.manual_seed(0)
    values = leaves(layer, call, dtype)
    dy = torch.randn(1)
    results = []
    for impl, kind in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        is_frozen = {"weight", "bias", *call.frozen}
        t = {k: v.to(kind, copy=True).requires_grad_(k not in is_frozen) for k, v in values.items()}
        dropout: Dropout | float = oracle_dropout(layer, call, t, 7)
        if impl == "triton":
            dropout = P if call.drops else 0.0
        y = run(layer, call, t, dropout, impl)
        if impl == "triton":
            dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
        y.backward(dy.to(y.dtype))
        results.append({"y": y.detach()} | {k: v.grad for k, v in t.items() if v.grad is not None})
    actual, truth, eager = results
    return actual, truth, eager


def gradients(y: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and all gradients for dy of ones to the eye, but not to a sum."""
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    wanted = {name: leaf for name, leaf in t.items() if leaf.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return {"y": y.detach()} | {
        name: g for name, g in zip(wanted, found, strict=True) if g is not None
    }


def trained(layer: Layer, call: Call, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(3)
    given = leaves(layer, call, dtype)
    return {k: v.requires_grad_(k not in ("weight", "bias")) for k, v in given.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def module_compared(
    layer: Bottleneck, x_h: Tensor, given: Tensor | RoutingInput, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """As `compared`, of a module: outputs, and gradients of its parameters, x_h and x_r."""
    given = given if isinstance(given, RoutingInput) else RoutingInput(given)
    layer = copy.deepcopy(layer).to(dtype)
    x_h, x_r = x_h.to(dtype), given.x_r.to(dtype)
    dy = torch.randn(1)
    results = []
    for impl, kind in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        one = copy.deepcopy(layer).to(kind)
        one.impl = impl  # type: ignore[assignment]
        t = {
            name: x.to(kind, copy=True).requires_grad_() for name, x in (("x_h", x_h), ("x_r", x_r))
        }
        with one.context.using(given.of(t["x_r"])):
            y = one(t["x_h"])
        if impl == "triton":
            dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
        y.backward(dy.to(y.dtype))
        t |= dict(one.named_parameters())
        results.append({"y": y.detach()} | {k: v.grad for k, v in t.items() if v.grad is not None})
    actual, truth, eager = results
    return actual, truth, eager
