"""A second opinion: the formulas of routed low-rank layers, written out token by token.

The formulas are those of arXiv 2403.09377 (figure of the four routing functions) and of the code
published with it. Nothing here is batched or fast, nothing is shared with the library, and every
result is differentiable by autograd; call it with small float64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """Which routing function is meant, and how the points left open by the formula are settled."""

    route: str
    transpose: str  # "exact", or "eccv24": the row-major reshape of the published code
    pool: str  # how exact add, mul and expand make one vector x'_v: "mean" or "first"
    normalize: str  # "none", or "unit": z keeps the mean square of x_t

    def __post_init__(self) -> None:
        for value, known in (
            (self.transpose, ("exact", "eccv24")),
            (self.pool, ("mean", "first")),
            (self.normalize, ("none", "unit")),
        ):
            if value not in known:
                raise ValueError(f"{value!r} is none of {known}")


def _down(x: Tensor, keep: Tensor | None, p: float, A: Tensor, b_A: Tensor | None) -> Tensor:
    """x̂ Aᵀ + b_A row by row, x̂ = keep∘x/(1−p): one A for both inputs (arXiv 2403.09377, figure)."""
    rows = []
    for i in range(x.shape[0]):
        x_hat = x[i] if keep is None else x[i] * keep[i].to(x.dtype) / (1.0 - p)
        rows.append(A @ x_hat if b_A is None else A @ x_hat + b_A)
    return _stacked(rows, A[:, 0])


def _stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    """The rows as a matrix; with no row at all, a matrix of no rows as wide as `like`."""
    return torch.stack(rows) if rows else like.new_zeros(0, like.shape[0])


def _gain(K: Tensor, *, relu: bool = False) -> Tensor:
    """(1/C) Σ_c E[z_c²]/σ² of z = x K with x_t ~ N(0, σ²I); with `relu` the mix sees x = relu(x_t).

    E[xᵀx]/σ² is I, or for a rectified Gaussian 1/2 on the diagonal and 1/(2π) off it.
    """
    C = K.shape[0]
    moment = torch.eye(C, dtype=K.dtype, device=K.device)
    if relu:
        moment = (0.5 - 0.5 / math.pi) * moment + 0.5 / math.pi * torch.ones_like(moment)
    return torch.trace(K.T @ moment @ K) / C


def _over_root(x: Tensor, gain: Tensor) -> Tensor:
    """x/√gain; what has no gain is zero and stays so."""
    return x if bool(gain == 0) else x / torch.sqrt(gain)


def _columns_of_transpose(x: Tensor, transpose: str) -> list[Tensor]:
    """The N columns of "xᵀ" for x (N, C).

    Exactly they are the rows of x; the published code reshapes (N, C) to (C, N) in row-major
    order instead, so that entry i of column n is number i·N + n of the flattened x.
    """
    N, C = x.shape
    if transpose == "exact":
        return [x[n] for n in range(N)]
    flat = [x[k // C, k % C] for k in range(N * C)]
    return [torch.stack([flat[i * N + n] for i in range(C)]) for n in range(N)]


def _pooled(x_v: Tensor, valid: Sequence[bool], pool: str) -> Tensor:
    """x'_v: the mean of the valid visual tokens or the first of them; zero where none is valid."""
    rows = [x_v[n] for n in range(x_v.shape[0]) if valid[n]]
    if not rows:
        return x_v.new_zeros(x_v.shape[1])
    return rows[0] if pool == "first" else torch.stack(rows).sum(0) / len(rows)


def _elementwise(x_t: Tensor, x_v: Tensor, valid: Sequence[bool], rules: Rules) -> Tensor:
    """x_t + x'_v and x_t ∘ x'_v (arXiv 2403.09377, figure, functions 1 and 2).

    The published code broadcasts one visual token, and pairs token t with visual token t if there
    are as many.
    """
    T, Nv = x_t.shape[0], x_v.shape[0]
    if rules.transpose == "exact":
        partners = [_pooled(x_v, valid, rules.pool)] * T
    elif Nv in (1, T):
        partners = [x_v[0 if Nv == 1 else t] for t in range(T)]
    else:
        raise ValueError(f"{rules.route}: {Nv} visual tokens for {T} tokens")
    z = []
    for t, w in enumerate(partners):
        unit = _over_root(w, _gain(torch.diag(w))) if rules.normalize == "unit" else w
        z.append(x_t[t] + unit if rules.route == "add" else x_t[t] * unit)
    return _stacked(z, x_t[0])


def _expand(x_t: Tensor, x_v: Tensor, valid: Sequence[bool], rules: Rules) -> Tensor:
    """x_t x''_v (arXiv 2403.09377, figure, function 4): x''_v has C rows.

    All of them are x'_v when it stands alone, so z_t = (Σ_i x_t[i]) x'_v; the published code also
    takes C visual tokens as the rows themselves.
    """
    Nv, C = x_v.shape
    if rules.transpose == "exact":
        x_rows = [_pooled(x_v, valid, rules.pool)] * C
    elif Nv in (1, C):
        x_rows = [x_v[0 if Nv == 1 else i] for i in range(C)]
    else:
        raise ValueError(f"expand: {Nv} visual tokens for {C} channels")
    z = x_t.new_zeros(x_t.shape)
    for i in range(C):
        z = z + torch.outer(x_t[:, i], x_rows[i])
    return _over_root(z, _gain(torch.stack(x_rows))) if rules.normalize == "unit" else z


def _scored(x_t: Tensor, x_v: Tensor, rules: Rules) -> Tensor:
    """z_t = Σ_n ⟨x_t, x_v,n⟩ x_v,n (arXiv 2403.09377, figure, function 3) and its relatives.

    From the published code: with relu, relu(x_t) and relu(x_v) make the score and the value is
    plain; "ones" puts a vector of ones in the place of the value.
    """
    relu = rules.route.endswith("_relu")
    C = x_t.shape[1]
    keys = _columns_of_transpose(x_v, rules.transpose)
    K = x_v.new_zeros(C, C)
    z = [x_v.new_zeros(C) for _ in range(x_t.shape[0])]
    for n, column in enumerate(keys):
        key = torch.relu(column) if relu else column
        value = x_v[n] if rules.route.startswith("gram") else torch.ones_like(x_v[n])
        K = K + torch.outer(key, value)
        for t in range(x_t.shape[0]):
            query = torch.relu(x_t[t]) if relu else x_t[t]
            z[t] = z[t] + torch.dot(query, key) * value
    out = _stacked(z, K[0])
    return _over_root(out, _gain(K, relu=relu)) if rules.normalize == "unit" else out


def _self_gram(x_t: Tensor, x_v: Tensor, rules: Rules) -> Tensor:
    """z_t = Σ_m ⟨x_t, x_m⟩ x_v over all tokens m of the sample: x_t x_tᵀ x_v ("routing_xt" of the
    published code, whose reshape acts on x_t).
    """
    if x_v.shape[0] != 1:
        raise ValueError(f"self_gram: {x_v.shape[0]} visual tokens, not one")
    w = x_v[0]
    if rules.normalize == "unit":
        w = _over_root(w, _gain(torch.outer(torch.ones_like(w), w)))
    z = []
    for t in range(x_t.shape[0]):
        score = x_t.new_zeros(())
        for x_m in _columns_of_transpose(x_t, rules.transpose):
            score = score + torch.dot(x_t[t], x_m)
        z.append(score * w)
    return _stacked(z, w)


def _phi(x_t: Tensor, x_v: Tensor, valid: Sequence[bool], rules: Rules) -> Tensor:
    """The routing function of one sample and one segment: x_t (T, C), x_v (Nv, C) -> z (T, C)."""
    if rules.route in ("add", "mul"):
        return _elementwise(x_t, x_v, valid, rules)
    if rules.route == "expand":
        return _expand(x_t, x_v, valid, rules)
    if rules.route in ("gram", "gram_relu", "ones", "ones_relu"):
        return _scored(x_t, x_v, rules)
    if rules.route == "self_gram":
        return _self_gram(x_t, x_v, rules)
    raise ValueError(f"unknown route {rules.route!r}")


def _flat(x: Tensor) -> Tensor:
    """x (Bsz, T, ·) or (M, ·) as one row per token."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Inputs:
    """The two inputs of a layer, and what says how to read them."""

    x_h: Tensor
    x_r: Tensor | None
    mask: Tensor | None
    sample_index: Tensor | None
    keep_h: Tensor | None
    keep_r: Tensor | None
    p: float

    def owners(self) -> list[int]:
        """The sample of each row of x_h; −1 for a row of none."""
        if self.sample_index is not None:
            return [int(b) for b in self.sample_index]
        return [b for b in range(self.x_h.shape[0]) for _ in range(self.x_h.shape[1])]


def _x_v(inputs: Inputs, b: int, A: Tensor, b_A: Tensor | None) -> tuple[Tensor, list[bool]]:
    """x_v of sample b, zero where the mask says that the token is padding, and which are valid."""
    assert inputs.x_r is not None
    x_b = inputs.x_r[b]
    valid = [True] * x_b.shape[0] if inputs.mask is None else [bool(v) for v in inputs.mask[b]]
    rows = []
    for n, ok in enumerate(valid):
        keep = None if inputs.keep_r is None else inputs.keep_r[b, n : n + 1]
        down = _down(x_b[n : n + 1], keep, inputs.p, A, b_A) if ok else A.new_zeros(1, A.shape[0])
        rows.append(down[0])
    return _stacked(rows, A[:, 0]), valid


def _bottleneck(
    inputs: Inputs, A: Tensor, b_A: Tensor | None, spans: Sequence[slice], rules: Rules
) -> Tensor:
    """Z (M, R): x_t and x_v through one A, then φ on each span of columns of each sample."""
    keep = None if inputs.keep_h is None else _flat(inputs.keep_h)
    x_t = _down(_flat(inputs.x_h), keep, inputs.p, A, b_A)
    if rules.route == "none":
        return x_t
    if inputs.x_r is None:
        raise ValueError(f"{rules.route} needs x_r")
    Bsz, Nv, _ = inputs.x_r.shape
    if rules.transpose == "eccv24" and inputs.mask is not None and Nv > 1:
        raise ValueError("the published code has no mask")
    z = [x_t[m] for m in range(x_t.shape[0])]
    owners = inputs.owners()
    for b in range(Bsz):
        x_v, valid = _x_v(inputs, b, A, b_A)
        mine = [m for m, owner in enumerate(owners) if owner == b]
        if not mine:
            continue
        x_b = torch.stack([x_t[m] for m in mine])
        mixed = torch.cat([_phi(x_b[:, c], x_v[:, c], valid, rules) for c in spans], dim=1)
        for m, z_m in zip(mine, mixed, strict=True):
            z[m] = z_m
    return _stacked(z, A[:, 0])


def routed_linear(
    x_h: Tensor,
    x_r: Tensor | None,
    *,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    route: str,
    s: float,
    adapted: Sequence[int] = (0,),
    of: int = 1,
    transpose: str = "exact",
    segments: str = "per_group",
    pool: str = "mean",
    normalize: str = "none",
    mask: Tensor | None = None,
    sample_index: Tensor | None = None,
    keep_h: Tensor | None = None,
    keep_r: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """x_h Wᵀ + b, plus s·Z_g B_gᵀ in the output block adapted[g] (arXiv 2403.09377, LoRA).

    The base sees x_h without dropout. "joint" segments are those of the published fused layer:
    routing over the columns of all groups at once.
    """
    rules = Rules(route, transpose, pool, normalize)
    inputs = Inputs(x_h, x_r, mask, sample_index, keep_h, keep_r, p)
    r, n = B.shape[1], weight.shape[0] // of
    groups = [slice(g * r, (g + 1) * r) for g in range(len(adapted))]
    if segments not in ("per_group", "joint"):
        raise ValueError(f"unknown segments {segments!r}")
    spans = groups if segments == "per_group" else [slice(0, len(adapted) * r)]
    Z = _bottleneck(inputs, A, None, spans, rules)
    y = []
    for x_m, z_m in zip(_flat(x_h), Z, strict=True):
        base = weight @ x_m if bias is None else weight @ x_m + bias
        blocks = [base[i * n : (i + 1) * n] for i in range(of)]
        for g, i in enumerate(adapted):
            blocks[i] = blocks[i] + s * (B[g * n : (g + 1) * n] @ z_m[groups[g]])
        y.append(torch.cat(blocks))
    return _stacked(y, weight[:, 0]).reshape(*x_h.shape[:-1], weight.shape[0])


def _act(z: Tensor, name: str) -> Tensor:
    """The activation between φ and the up-projection of the adapter."""
    if name == "none":
        return z
    if name == "relu":
        return torch.relu(z)
    if name == "gelu":
        return 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0)))
    if name == "gelu_tanh":
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
    if name == "silu":
        return z * torch.sigmoid(z)
    raise ValueError(f"unknown activation {name!r}")


def routed_adapter(
    x_h: Tensor,
    x_r: Tensor | None,
    *,
    A: Tensor,
    b_A: Tensor | None,
    B: Tensor,
    b_B: Tensor | None,
    route: str,
    activation: str,
    residual: bool,
    transpose: str = "exact",
    pool: str = "mean",
    normalize: str = "none",
    mask: Tensor | None = None,
    sample_index: Tensor | None = None,
    keep_h: Tensor | None = None,
    keep_r: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """act(Z) Bᵀ + b_B, plus x_h with the residual (arXiv 2403.09377, Adapter).

    As in the published code the bias b_A of the down-projection is in x_t and in x_v.
    """
    rules = Rules(route, transpose, pool, normalize)
    inputs = Inputs(x_h, x_r, mask, sample_index, keep_h, keep_r, p)
    Z = _bottleneck(inputs, A, b_A, [slice(0, A.shape[0])], rules)
    y = []
    for x_m, z_m in zip(_flat(x_h), Z, strict=True):
        up = B @ _act(z_m, activation)
        if b_B is not None:
            up = up + b_B
        y.append(up + x_m if residual else up)
    return _stacked(y, B[:, 0]).reshape(*x_h.shape[:-1], B.shape[0])
