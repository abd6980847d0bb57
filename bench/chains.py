"""Routed layers to compare: by hand in the fewest calls of eager torch, and by the library."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_route import RoutedAdapter, RoutedLinear, Routing, RoutingInput
from fused_route.functional import Impl, routed_adapter, routed_linear

S_SCALE = 2.0  # s = alpha / r


@dataclass(frozen=True)
class Layer:
    """What is compared.

    Args:
        host: "adapter"; "linear" or "qkv" (2 of 3 segments adapted) with a frozen base that the
            operation owns; "given" or "given_qkv" with the base's output given.
        route: "mul", or "gram", which is a matrix of the image where Nv > 1.
        Nv: visual tokens.
        dropout, recompute: as in `routed_linear`.
        trains_image: whether x_r wants a gradient.
    """

    host: str
    route: str = "mul"
    Nv: int = 1
    dropout: float = 0.0
    recompute: bool = False
    trains_image: bool = False


class Chain:
    """One layer with its tensors: S samples of T tokens, widths d → d, rank r.

    `eager` is what a user would write, `ours` the public function, `module` the layer as a module;
    each returns y, for `inputs` that live anyway.
    """

    def __init__(
        self, layer: Layer, S: int, T: int, d: int, r: int, dtype: torch.dtype = torch.float32
    ) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        self.layer = layer
        self.adapted: tuple[int, ...] = (0, 2) if layer.host.endswith("qkv") else (0,)
        self.of = 3 if layer.host.endswith("qkv") else 1
        g = len(self.adapted)
        self.x = randn(S, T, d).requires_grad_()
        self.x_r = randn(S, layer.Nv, d).requires_grad_(layer.trains_image)
        self.A, self.B = randn(g * r, d).requires_grad_(), randn(g * d, r).requires_grad_()
        self.inputs = [self.x, self.x_r, self.A, self.B]
        if layer.host == "adapter":
            self.b_A, self.b_B = randn(r).requires_grad_(), randn(d).requires_grad_()
            self.inputs += [self.b_A, self.b_B]
        else:
            self.weight, self.bias = randn(self.of * d, d), randn(self.of * d)
            self.inputs += [self.weight, self.bias]
        self.dy = randn(S, T, self.of * d)
        self._module = self._as_module(r)
        live = [*self.inputs, *self._module.parameters()]
        self._trained = [tensor for tensor in live if tensor.requires_grad]

    def forget_gradients(self) -> None:
        """As an optimizer's zero_grad does."""
        for tensor in self._trained:
            tensor.grad = None

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout as GPUs have it, one operation; on the CPU, F.dropout is three."""
        p = self.layer.dropout
        return torch.native_dropout(x, p, True)[0] if p > 0.0 else x

    def eager(self) -> Tensor:
        """y by hand."""
        layer = self.layer
        b_A = self.b_A if layer.host == "adapter" else None
        x_t = F.linear(self._drop(self.x), self.A, b_A)
        x_v = F.linear(self._drop(self.x_r), self.A, b_A)
        z = x_t * x_v if layer.route == "mul" else x_t @ (x_v.mT @ x_v)
        if layer.host == "adapter":
            return F.linear(F.gelu(z), self.B, self.b_B) + self.x
        base = F.linear(self.x, self.weight, self.bias)
        if self.of == 1:
            return base + S_SCALE * F.linear(z, self.B)
        query, key, value = base.chunk(3, -1)
        of_query, of_value = (
            F.linear(part, B) for part, B in zip(z.chunk(2, -1), self.B.chunk(2), strict=True)
        )
        return torch.cat([query + S_SCALE * of_query, key, value + S_SCALE * of_value], -1)

    def ours(self, impl: Impl = "triton") -> Tensor:
        """y by the public function."""
        layer = self.layer
        if layer.host == "adapter":
            return routed_adapter(
                self.x, self.A, self.B, self.x_r, b_A=self.b_A, b_B=self.b_B, route=layer.route,
                dropout=layer.dropout, recompute=layer.recompute, impl=impl,
            )  # fmt: skip
        base: dict[str, Any] = {"weight": self.weight, "bias": self.bias}
        if layer.host.startswith("given"):
            base = {"base_out": F.linear(self.x, self.weight, self.bias)}
        return routed_linear(
            self.x, self.A, self.B, self.x_r, **base, route=layer.route, s=S_SCALE,
            adapted=self.adapted, of=self.of, dropout=layer.dropout, recompute=layer.recompute,
            impl=impl,
        )  # fmt: skip

    def module(self) -> Tensor:
        """y by the module, which shares the tensors of the others."""
        y: Tensor = self._module(self.x)
        return y

    def _as_module(self, r: int) -> nn.Module:
        layer, d = self.layer, self.x.shape[-1]
        named: dict[str, Any] = {"route": Routing(layer.route), "dropout": layer.dropout}
        named |= {"recompute": layer.recompute, "impl": "triton"}
        if layer.host == "adapter":
            made: RoutedAdapter | RoutedLinear = RoutedAdapter(d, r, **named)
            made.b_A, made.b_B = nn.Parameter(self.b_A), nn.Parameter(self.b_B)
        else:
            base = nn.Linear(d, self.of * d).requires_grad_(False)
            base.weight.data, base.bias.data = self.weight, self.bias
            made = RoutedLinear(base, r, S_SCALE * r, adapted=self.adapted, of=self.of, **named)
        made.A, made.B = nn.Parameter(self.A), nn.Parameter(self.B)
        made.context.set(RoutingInput(self.x_r))
        return made
