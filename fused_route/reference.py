"""The routed linear and the routed adapter in plain torch: the specification of both.

Forward only, autograd differentiates it; any device and floating dtype. Every test and benchmark
holds other implementations to this file, and it runs where kernels cannot. Arguments are those of
`functional`, which checks them.

    x_t = x̂_h Aᵀ + b_A,  x_v = x̂_r Aᵀ + b_A,  z = φ(x_t, x_v)            (arXiv 2403.09377)
    routed linear    y = base(x_h) + s · up(z), segment by segment
    routed adapter   y = act(z) Bᵀ + b_B (+ x_h)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import probability, shown
from .routes import Operand
from .routing import Routing
from .routing_input import RoutingInput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@dataclass(frozen=True)
class Dropout:
    """Dropout on the inputs of A, by given masks: x̂ = keep ∘ x / (1 − p). The base path has none.

    keep_h has the shape of x_h, keep_r that of x_r (B, Nv, d) or, as x_r may, (B, d); both are
    bool; None keeps everything.

    Raises:
        ValueError: p outside [0, 1), or masks that are not bool.
    """

    p: float
    keep_h: Tensor | None
    keep_r: Tensor | None

    def __post_init__(self) -> None:
        probability("p", self.p)
        for name in ("keep_h", "keep_r"):
            keep = getattr(self, name)
            if keep is not None and (not isinstance(keep, Tensor) or keep.dtype != torch.bool):
                raise ValueError(f"{name} must be a bool tensor or None, got {shown(keep)}")
        if self.keep_r is not None and self.keep_r.dim() == 2:
            object.__setattr__(self, "keep_r", self.keep_r.unsqueeze(1))

    def down(self, x: Tensor, keep: Tensor | None, A: Tensor, b_A: Tensor | None) -> Tensor:
        """x̂ Aᵀ + b_A. A, which is small, is divided by 1 − p in place of x."""
        if keep is None:
            return F.linear(x, A, b_A)
        return F.linear(torch.where(keep, x, 0.0), A / (1.0 - self.p), b_A)


NO_DROPOUT = Dropout(0.0, None, None)


def grouped(x: Tensor, G: int) -> Tensor:
    """(B, N, G·C) to (B, G, N, C)."""
    if G == 1:
        return x.unsqueeze(1)
    return x.unflatten(-1, (G, -1)).transpose(1, 2)


def ungrouped(x: Tensor) -> Tensor:
    """(B, G, N, C) to (B, N, G·C)."""
    if x.shape[1] == 1:
        return x.squeeze(1)
    return x.transpose(1, 2).flatten(-2)


def bottleneck(
    x_h: Tensor,
    routing_input: RoutingInput | None,
    A: Tensor,
    b_A: Tensor | None,
    *,
    routing: Routing,
    groups: int,
    dropout: Dropout,
) -> Tensor:
    """z, of the shape of x_h with d replaced by R; x_h is (B, …, d), or (…, d) in packed rows."""
    x_t = dropout.down(x_h, dropout.keep_h, A, b_A)
    if routing_input is None or routing.route.takes == "nothing":
        return x_t
    G = 1 if routing.segments == "joint" else groups
    operand = image_operand(routing_input, A, b_A, routing=routing, G=G, dropout=dropout)
    if routing_input.sample_index is None:
        B, *between, R = x_t.shape
        rows = x_t.reshape(B, math.prod(between), R)
        return ungrouped(routing.mix(grouped(rows, G), operand)).view_as(x_t)

    rows = x_t.reshape(-1, x_t.shape[-1])
    padded, sample, position = unpacked(rows, routing_input)
    routed = ungrouped(routing.mix(grouped(padded, G), operand))[sample, position]
    is_padding = (routing_input.sample_index < 0).unsqueeze(-1)
    return torch.where(is_padding, rows, routed).view_as(x_t)


def image_operand(
    given: RoutingInput,
    A: Tensor,
    b_A: Tensor | None,
    *,
    routing: Routing,
    G: int,
    dropout: Dropout,
) -> Operand:
    """What the image becomes for G groups of columns, from as far as it has come already."""
    if given.operand is not None:
        return given.operand
    x_v = given.x_v
    if x_v is None:
        x_v = dropout.down(given.x_r.to(A.dtype), dropout.keep_r, A, b_A)
    return routing.operand(grouped(x_v, G), given.mask)


def unpacked(rows: Tensor, routing_input: RoutingInput) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows (M, R) as a batch (B, longest, R) with zeros, and each row's place in it.

    Padding rows have no place of their own: theirs is (0, 0), and nothing is written there.
    """
    sample_index, offsets = routing_input.sample_index, routing_input.offsets
    assert sample_index is not None and offsets is not None
    is_padding = sample_index < 0
    sample = sample_index.long().clamp_min(0)
    position = torch.arange(rows.shape[0], device=rows.device) - offsets[sample]
    position = position.masked_fill(is_padding, 0)
    longest = max(routing_input.longest, 1)
    padded = rows.new_zeros(routing_input.batch_size, longest, rows.shape[-1])
    valid = ~is_padding
    return padded.index_put((sample[valid], position[valid]), rows[valid]), sample, position


def routed_linear(
    x_h: Tensor,
    base_out: Tensor,
    routing_input: RoutingInput | None,
    A: Tensor,
    B: Tensor,
    *,
    routing: Routing,
    s: float,
    adapted: tuple[int, ...],
    of: int,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """y = base_out, plus s · z_g B_gᵀ in the column block of each adapted segment.

    base_out (…, of·n); A (R, d) with R = g·r; B (g·n, r). Blocks that are not adapted are not
    computed, only copied.
    """
    g = len(adapted)
    z = bottleneck(x_h, routing_input, A, None, routing=routing, groups=g, dropout=dropout)
    if of == 1:  # no views, whose gradients would be gathered
        return torch.add(base_out, F.linear(z, B).to(base_out.dtype), alpha=s)
    blocks = list(base_out.chunk(of, -1))
    for segment, z_g, B_g in zip(adapted, z.chunk(g, -1), B.chunk(g), strict=True):
        update = F.linear(z_g, B_g).to(base_out.dtype)
        blocks[segment] = torch.add(blocks[segment], update, alpha=s)
    return torch.cat(blocks, -1)


def routed_adapter(
    x_h: Tensor,
    routing_input: RoutingInput | None,
    A: Tensor,
    b_A: Tensor | None,
    B: Tensor,
    b_B: Tensor | None,
    *,
    routing: Routing,
    activation: str,
    residual: bool,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """y = act(z) Bᵀ + b_B, plus x_h where residual; A (r, d), b_A (r,), B (d, r), b_B (d,)."""
    z = bottleneck(x_h, routing_input, A, b_A, routing=routing, groups=1, dropout=dropout)
    y = F.linear(ACTIVATIONS[activation](z), B, b_B)
    return y + x_h if residual else y
