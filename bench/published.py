"""The published formulation of arXiv 2403.09377, in our own words: what a user runs today.

Differs from the clean one in what is computed (`compat="eccv24"`: the transpose is a reshape, all
segments are routed together) and in how: the up-projection is a grouped 1×1 convolution, its
columns are scattered into a tensor of zeros by a boolean mask, and that is scaled and added whole.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operands import S_SCALE, Operands


def _scores(x_t: Tensor, x_v: Tensor) -> Tensor:
    """x_t times the reshape of x_v (B, Nv, R) to (B, R, Nv)."""
    B, Nv, R = x_v.shape
    return torch.matmul(x_t, x_v.reshape(B, R, Nv))


def _relu_scores(x_t: Tensor, x_v: Tensor) -> Tensor:
    B, Nv, R = x_v.shape
    return torch.matmul(F.relu(x_t), F.relu(x_v.reshape(B, R, Nv)))


# (x_t (B, T, R), x_v (B, Nv, R)) to z; `add`, `mul` and `expand` with one visual token.
ROUTING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda x_t, x_v: x_t,
    "add": lambda x_t, x_v: x_t + x_v.expand_as(x_t),
    "mul": lambda x_t, x_v: x_t * x_v,
    "gram": lambda x_t, x_v: torch.matmul(_scores(x_t, x_v), x_v),
    "expand": lambda x_t, x_v: torch.matmul(x_t, x_v.expand(-1, x_t.shape[-1], -1)),
    "gram_relu": lambda x_t, x_v: torch.matmul(_relu_scores(x_t, x_v), x_v),
    "ones": lambda x_t, x_v: torch.matmul(_scores(x_t, x_v), torch.ones_like(x_v)),
    "ones_relu": lambda x_t, x_v: torch.matmul(_relu_scores(x_t, x_v), torch.ones_like(x_v)),
}


@cache
def adapted_columns(adapted: tuple[int, ...], of: int, n: int, device: torch.device) -> Tensor:
    """Which of the of·n columns are adapted, bool: a buffer of the published layer."""
    columns = torch.zeros(of, n, dtype=torch.bool, device=device)
    columns[list(adapted)] = True
    return columns.flatten()


def published(o: Operands) -> Tensor:
    """y as the published code computes it."""
    layer, p = o.layer, o.layer.dropout
    x, x_r = F.dropout(o.x, p), F.dropout(o.x_r, p)
    x_t, x_v = F.linear(x, o.A, o.b_A), F.linear(x_r, o.A, o.b_A)
    z = ROUTING[layer.route](x_t, x_v)
    if layer.host == "adapter":
        return F.linear(F.gelu(z), o.B, o.b_B) + o.x
    assert o.weight is not None
    base = F.linear(o.x, o.weight, o.bias)
    g = len(o.adapted)
    update = F.conv1d(z.transpose(-2, -1), o.B.unsqueeze(-1), groups=g).transpose(-2, -1)
    columns = adapted_columns(o.adapted, o.of, base.shape[-1] // o.of, base.device)
    padded = base.new_zeros(base.shape).view(-1, base.shape[-1])
    padded[:, columns] = update.reshape(-1, update.shape[-1])
    base += padded.view_as(base) * S_SCALE
    return base
