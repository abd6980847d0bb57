"""LoRA with cross-attention from the text to the image in its bottleneck: a baseline of routing."""

import math
import warnings
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_route import RoutingContext, RoutingInput
from fused_route.arguments import check_segments, check_tensors
from fused_route.bases import base_features, weight_kind
from fused_route.bottleneck import NO_REPLICAS
from fused_route.checks import finite, probability, whole

_warned: WeakSet[RoutingContext] = WeakSet()  # contexts whose layers were found to see one token


class CrossAttentionLinear(nn.Module):
    """A linear layer with LoRA whose bottleneck is cross-attention from the text to the image.

        x_t = x̂_h A_textᵀ,  x_v = x̂_r A_imgᵀ                                      k·g columns
        Q = x_t W_qᵀ,  K = x_v W_kᵀ,  V = x_v W_vᵀ                      h heads of k·g/h columns
        O = softmax(Q Kᵀ / √(k·g/h)) V                                     head by head
        z = O W_oᵀ Uᵀ                                                               r·g columns
        y = base(x_h) + (alpha/r) · z Bᵀ             segment i: columns i·r to (i+1)·r through B_i

    The cross-attention variant of the published code (arXiv 2403.09377), with dropout on x_h and
    x_r alone. A masked visual token gets no weight; where none is valid, z is zero. With one
    visual token the softmax is 1 whatever the text says, so that every text token gets the same
    update: a warning says so, once for each context.

    Args:
        base: nn.Linear, Hugging Face Conv1D, or a module that tells in_features and out_features;
            it is kept. The parameters get its weight's device and dtype.
        rank: r, per adapted segment.
        inner_rank: k, per adapted segment.
        heads: h; divides k·g.
        alpha, adapted, of, dropout, context: as in `RoutedLinear`.

    Shapes: (B, …, d) to (B, …, of·n). Parameters: A_text and A_img (k·g, d); W_q, W_k, W_v and W_o
    (k·g, k·g); U (r·g, k·g); B (g·n, r), which starts at zero.

    Raises:
        ValueError: widths, segments, ranks or heads that do not fit.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        inner_rank: int,
        alpha: float | None = None,
        *,
        heads: int = 4,
        adapted: tuple[int, ...] = (0,),
        of: int = 1,
        dropout: float = 0.0,
        context: RoutingContext | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise ValueError(f"base must be a module, got {type(base).__name__}")
        d, width = base_features(base)
        check_segments(adapted, of, width)
        self.base, self.d = base, d
        self.in_features, self.out_features = d, width
        self.rank, self.inner_rank = whole("rank", rank), whole("inner_rank", inner_rank)
        self.heads, self.adapted, self.of = whole("heads", heads), tuple(adapted), of
        self.alpha = finite("alpha", rank if alpha is None else alpha)
        self.dropout = probability("dropout", dropout)
        if not isinstance(context, (RoutingContext, type(None))):
            raise ValueError(f"context must be a RoutingContext, got {type(context).__name__}")
        self.context = RoutingContext() if context is None else context
        self.label = type(self).__name__
        g = len(adapted)
        kg, rg = g * self.inner_rank, g * self.rank
        if kg % heads:
            raise ValueError(f"heads must divide inner_rank · g = {kg}, got {heads}")
        kind = weight_kind(base)
        self.A_text, self.A_img = _uniform(kg, d, kind), _uniform(kg, d, kind)
        self.W_q, self.W_k = _uniform(kg, kg, kind), _uniform(kg, kg, kind)
        self.W_v, self.W_o = _uniform(kg, kg, kind), _uniform(kg, kg, kind)
        self.U = _uniform(rg, kg, kind)
        self.B = nn.Parameter(torch.zeros(g * (width // of), self.rank, **kind))

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x_h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_tensors(x_h, {"A_text": self.A_text, "B": self.B}, {})
        z = self._attend(x_h, self._routing_input(x_h))
        base_out = self.base(x_h, *args, **kwargs)
        blocks, g = list(base_out.chunk(self.of, -1)), len(self.adapted)
        for segment, z_g, B_g in zip(self.adapted, z.chunk(g, -1), self.B.chunk(g), strict=True):
            update = F.linear(z_g, B_g).to(base_out.dtype)
            blocks[segment] = torch.add(blocks[segment], update, alpha=self.alpha / self.rank)
        return torch.cat(blocks, -1)

    def _replicate_for_data_parallel(self) -> "CrossAttentionLinear":
        raise ValueError(NO_REPLICAS)

    def _routing_input(self, x_h: Tensor) -> RoutingInput:
        given = self.context.get(self.d, self.label, getattr(x_h, "device", None))
        if given.sample_index is not None:
            raise ValueError("sample_index is given: cross-attention takes no packed sequences")
        if given.batch_size != x_h.shape[0] or x_h.shape[-1] != self.d:
            raise ValueError(
                f"x_h must be (B, …, d) with B = {given.batch_size}, as x_r has, and d = {self.d}; "
                f"got {tuple(x_h.shape)}"
            )
        if given.x_r.shape[1] == 1 and self.context not in _warned:
            _warned.add(self.context)
            warnings.warn(
                "x_r has one visual token: cross-attention to it adds the same update to every "
                "text token, whatever the text says; give it several to compare with",
                stacklevel=3,
            )
        return given

    def _attend(self, x_h: Tensor, given: RoutingInput) -> Tensor:
        """z (B, …, r·g)."""
        x_r = given.x_r.to(x_h.dtype)
        x_t = F.linear(F.dropout(x_h, self.dropout, self.training), self.A_text)
        x_v = F.linear(F.dropout(x_r, self.dropout, self.training), self.A_img)
        seen = None
        if given.mask is not None:
            # Where no token is valid all are seen, each as zero: a softmax over none is NaN.
            x_v = x_v.masked_fill(~given.mask.unsqueeze(-1), 0.0)
            seen = (given.mask | ~given.mask.any(-1, keepdim=True))[:, None, None]
        B, *between, kg = x_t.shape
        rows = x_t.reshape(B, math.prod(between), kg)
        Q, K, V = (
            F.linear(x, W).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, W in ((rows, self.W_q), (x_v, self.W_k), (x_v, self.W_v))
        )
        O = F.scaled_dot_product_attention(Q, K, V, attn_mask=seen)  # noqa: E741
        z = F.linear(F.linear(O.transpose(1, 2).flatten(-2), self.W_o), self.U)
        return z.view(*x_h.shape[:-1], z.shape[-1])

    def extra_repr(self) -> str:
        segments = "" if self.of == 1 else f", adapted={self.adapted}, of={self.of}"
        ranks = f"rank={self.rank}, inner_rank={self.inner_rank}, heads={self.heads}, d={self.d}"
        return f"{ranks}, alpha={self.alpha:g}{segments}"


def _uniform(out_features: int, in_features: int, kind: dict[str, Any]) -> nn.Parameter:
    """As nn.Linear starts: uniform in ±1/√in_features."""
    bound = 1.0 / math.sqrt(in_features)
    return nn.Parameter(torch.empty(out_features, in_features, **kind).uniform_(-bound, bound))
