"""The strongest order of plain matrix products, with routing between them.

As Unsloth and axolotl order a LoRA: s is folded into the product that adds to the base's output in
place; only x is saved and x_t computed anew; dy B is computed once; dx is one chain of products
that add in place. They have no routing; here it stands between the products, for the mixes with
vectors and with a matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operands import S_SCALE, Operands


class Mixed(NamedTuple):
    """z of x_t and x_v, and from dz: dx_t and dx_v."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _gram(x_t: Tensor, x_v: Tensor) -> Tensor:
    if x_v.shape[-2] == 1:
        return (x_t * x_v).sum(-1, keepdim=True) * x_v
    return x_t @ (x_v.mT @ x_v)


def _gram_backward(dz: Tensor, x_t: Tensor, x_v: Tensor) -> tuple[Tensor, Tensor]:
    if x_v.shape[-2] > 1:
        K = x_v.mT @ x_v
        dK = x_t.mT @ dz
        return dz @ K, x_v @ (dK + dK.mT)
    scores = (x_t * x_v).sum(-1, keepdim=True)
    dscores = (dz * x_v).sum(-1, keepdim=True)
    return dscores * x_v, (scores * dz + dscores * x_t).sum(-2, keepdim=True)


# x_t, dz (B, G, T, C), x_v (B, G, Nv, C)
MIXED = {
    "none": Mixed(lambda x_t, x_v: x_t, lambda dz, x_t, x_v: (dz, None)),
    "add": Mixed(lambda x_t, x_v: x_t + x_v, lambda dz, x_t, x_v: (dz, dz.sum(-2, keepdim=True))),
    "mul": Mixed(
        lambda x_t, x_v: x_t * x_v,
        lambda dz, x_t, x_v: (dz * x_v, (dz * x_t).sum(-2, keepdim=True)),
    ),
    "gram": Mixed(_gram, _gram_backward),
    "expand": Mixed(
        lambda x_t, x_v: x_t.sum(-1, keepdim=True) * x_v,
        lambda dz, x_t, x_v: (
            (dz * x_v).sum(-1, keepdim=True).expand_as(dz),
            (x_t.sum(-1, keepdim=True) * dz).sum(-2, keepdim=True),
        ),
    ),
}


def _grouped(x: Tensor, S: int, g: int) -> Tensor:
    """(S·N, g·r) to (S, g, N, r)."""
    return x.view(S, -1, g, x.shape[-1] // g).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(S, g, N, r) to (S·N, g·r)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


class Routed(torch.autograd.Function):
    """y (M, of·n) of x (M, d), x_r (S·Nv, d), A, b_A, B, b_B, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_r: Tensor, A: Tensor, b_A: Tensor | None, B: Tensor,
        b_B: Tensor | None, weight: Tensor | None, bias: Tensor | None, S: int, route: str,
        adapted: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        g, mixed = len(adapted), MIXED[route]
        x_t, x_v = F.linear(x, A, b_A), F.linear(x_r, A, b_A)
        z = _rows(mixed.forward(_grouped(x_t, S, g), _grouped(x_v, S, g)))
        ctx.save_for_backward(x, x_r, A, b_A, B, weight)
        ctx.S, ctx.mixed, ctx.adapted = S, mixed, adapted
        if weight is None:
            assert b_B is not None
            return (x + b_B).addmm_(F.gelu(z), B.T)
        y = F.linear(x, weight, bias)
        n = B.shape[0] // g
        for i, segment in enumerate(adapted):
            z_g = z[:, i * B.shape[1] : (i + 1) * B.shape[1]]
            y[:, segment * n : (segment + 1) * n].addmm_(
                z_g, B[i * n : (i + 1) * n].T, alpha=S_SCALE
            )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, x_r, A, b_A, B, weight = ctx.saved_tensors
        S, mixed, adapted = ctx.S, ctx.mixed, ctx.adapted
        g, n, r = len(adapted), B.shape[0] // len(adapted), B.shape[1]
        x_t, x_v = (_grouped(F.linear(rows, A, b_A), S, g) for rows in (x, x_r))
        z = _rows(mixed.forward(x_t, x_v))
        if weight is None:
            h, dz, dx = F.gelu(z), dy @ B, dy.clone()
            dB, db_B = dy.T @ h, dy.sum(0)
            dz = torch.ops.aten.gelu_backward(dz, z)
        else:
            parts = [dy[:, i * n : (i + 1) * n] for i in adapted]
            scaled = zip(parts, B.chunk(g), strict=True)
            dz = torch.cat([(dy_g @ B_g).mul_(S_SCALE) for dy_g, B_g in scaled], -1)
            dB = torch.cat([
                (dy_g.T @ z[:, i * r : (i + 1) * r]).mul_(S_SCALE) for i, dy_g in enumerate(parts)
            ])  # fmt: skip
            db_B, dx = None, dy @ weight
        dx_t, dx_v = mixed.backward(_grouped(dz, S, g), x_t, x_v)
        dx_t = _rows(dx_t)
        dA, db_A = dx_t.T @ x, None if b_A is None else dx_t.sum(0)
        if dx_v is not None:
            dx_v = _rows(dx_v)
            dA.addmm_(dx_v.T, x_r)
            db_A = None if db_A is None else db_A + dx_v.sum(0)
        dx.addmm_(dx_t, A)
        return dx, None, dA, db_A, dB, db_B, *(None,) * 5


def matmul_order(o: Operands) -> Tensor:
    """y; dropout is applied outside, as axolotl does."""
    p = o.layer.dropout
    rows, S = o.x.flatten(0, 1), o.x.shape[0]
    if p > 0.0:
        raise ValueError("matmul-order has no dropout: the base's product would see the mask")
    y: Tensor = Routed.apply(
        rows, o.x_r.flatten(0, 1), o.A, o.b_A, o.B, o.b_B, o.weight, o.bias, S, o.layer.route,
        o.adapted,
    )  # fmt: skip
    return y.view(S, -1, y.shape[-1])
