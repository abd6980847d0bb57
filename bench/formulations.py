"""Ways to write a routed operation in torch, each a function from `Operands` to y."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operands import S_SCALE, Operands
from fused_route import Routing, reference
from fused_route.functional import Impl, routed_adapter, routed_linear
from fused_route.reference import NO_DROPOUT
from fused_route.routing_input import RoutingInput


def library(o: Operands, impl: Impl = "triton", **modes: Any) -> Tensor:
    """By the public function; `modes` are those of `Routing`."""
    layer = o.layer
    shared: dict[str, Any] = {
        "route": Routing(layer.route, **modes) if modes else layer.route, "dropout": layer.dropout,
        "recompute": layer.recompute, "impl": impl,
    }  # fmt: skip
    if layer.host == "adapter":
        return routed_adapter(o.x, o.A, o.B, o.x_r, b_A=o.b_A, b_B=o.b_B, **shared)
    base: dict[str, Any] = {"weight": o.weight, "bias": o.bias}
    if layer.host.startswith("given"):
        assert o.weight is not None
        base = {"base_out": F.linear(o.x, o.weight, o.bias)}
    return routed_linear(
        o.x, o.A, o.B, o.x_r, **base, s=S_SCALE, adapted=o.adapted, of=o.of, plan=layer.plan,
        **shared,
    )  # fmt: skip


def clean(o: Operands) -> Tensor:
    """The library's own eager torch: what every other way is measured against."""
    return library(o, "reference")


def dropped(o: Operands, x: Tensor) -> Tensor:
    """Dropout as GPUs have it, one operation; on the CPU, F.dropout is three."""
    p = o.layer.dropout
    return torch.native_dropout(x, p, True)[0] if p > 0.0 else x


def by_hand(o: Operands) -> Tensor:
    """`mul` and `gram` in the fewest calls of torch, as a user would write them."""
    layer = o.layer
    x_t = F.linear(dropped(o, o.x), o.A, o.b_A)
    x_v = F.linear(dropped(o, o.x_r), o.A, o.b_A)
    z = x_t * x_v if layer.route == "mul" else x_t @ (x_v.mT @ x_v)
    if layer.host == "adapter":
        return F.linear(F.gelu(z), o.B, o.b_B) + o.x
    assert o.weight is not None
    base = F.linear(o.x, o.weight, o.bias)
    if o.of == 1:
        return base + S_SCALE * F.linear(z, o.B)
    query, key, value = base.chunk(3, -1)
    of_query, of_value = (
        F.linear(part, B) for part, B in zip(z.chunk(2, -1), o.B.chunk(2), strict=True)
    )
    return torch.cat([query + S_SCALE * of_query, key, value + S_SCALE * of_value], -1)


def folded(o: Operands) -> Tensor:
    """With s folded into z, so that a compiler finds one product that adds to the base's output.

    The other order, s · (z Bᵀ), keeps a product and an elementwise pass apart: compiled, that one
    would be a straw man.
    """
    layer = o.layer
    g = len(o.adapted)
    z = reference.bottleneck(
        dropped(o, o.x), RoutingInput(dropped(o, o.x_r)), o.A, o.b_A,
        routing=Routing(layer.route), groups=g, dropout=NO_DROPOUT,
    ).flatten(0, 1)  # (M, R)  # fmt: skip
    x = o.x.flatten(0, 1)
    if layer.host == "adapter":
        assert o.b_B is not None
        return torch.addmm(x + o.b_B, F.gelu(z), o.B.T).view_as(o.x)
    assert o.weight is not None
    base = F.linear(x, o.weight, o.bias)
    blocks = list(base.chunk(o.of, -1))
    parts = zip(o.adapted, (S_SCALE * z).chunk(g, -1), o.B.chunk(g), strict=True)
    for segment, z_g, B_g in parts:
        blocks[segment] = torch.addmm(blocks[segment], z_g, B_g.T)
    y = blocks[0] if o.of == 1 else torch.cat(blocks, -1)
    return y.view(*o.x.shape[:-1], -1)


def frozen(o: Operands) -> Tensor:
    """The base alone: what there is to pay anyway."""
    assert o.weight is not None
    return F.linear(o.x, o.weight, o.bias)
