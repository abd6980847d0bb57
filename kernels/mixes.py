"""The routing itself, on tiles in registers: the five mixes, their gradients, activations.

A mix takes x_t (BM, R_PAD) and the operands of each row's sample; it knows no route by name
(`fused_route.routes` says which mix a route is). All arithmetic is fp32, but for the product with
K, whose dtype x_t is rounded to.
"""

import triton
import triton.language as tl

from .parts import bottleneck_tile, columns, zero_beyond


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as torch.relu does and tl.maximum does not."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def vector_operand(
    ptr, x_v, sample, routed, KIND: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr
):  # fmt: skip
    """u or w (BM, R_PAD) of each row's sample, from x_v or an operand (S, R).

    x_v: where this program has made it, each row's own (BM, R_PAD); None: it is read.
    KIND: "plain", "relu" of it, or "one", which reads nothing.
    """
    if KIND == "one":
        operand = tl.full([routed.shape[0], R_PAD], 1.0, tl.float32)
    else:
        if x_v is not None:
            operand = x_v
        else:
            operand = bottleneck_tile(ptr, sample.to(tl.int64), routed, R, R_PAD)
        if KIND == "relu":
            operand = relu(operand)
    return operand


@triton.jit
def group_sums(values, G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr):
    """Σ of values (BM, R_PAD) over the columns of each of G groups, in every column of the group.

    Columns beyond R are zero in `values` and get the last group's sum or zero.
    """
    if G == 1:
        sums = tl.sum(values, 1)[:, None] + tl.zeros_like(values)
    else:
        group = tl.arange(0, R_PAD) // (R // G)
        sums = tl.zeros_like(values)
        for g in tl.static_range(G):
            own = (group == g)[None, :]
            sums = tl.where(own, tl.sum(tl.where(own, values, 0.0), 1)[:, None], sums)
    return sums


@triton.jit
def matrix_mix(
    x, K_ptr, sample, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x K, or x Kᵀ (BM, R_PAD), with the K (S, G, C, C) of the one sample these rows belong to.

    K, block-diagonal from (G, C, C), is taken whole where its rows have at most WHOLE bytes, else
    32 rows at a time: what a thread holds of it and of x then does not grow with R. Whole it made
    IEEE products of fp32 spill 450 times at R = 64, and fp32 at R = 256 take 256 KB of shared
    memory. Columns of x are gathered by shuffles, 130 a step at R = 128: no gain where K fits.
    """
    C: tl.constexpr = R // G
    SIZE: tl.constexpr = K_ptr.dtype.element_ty.primitive_bitwidth // 8
    ROWS: tl.constexpr = R_PAD if R_PAD * SIZE <= WHOLE else 32
    own_K_ptr = K_ptr + tl.max(sample, 0).to(tl.int64) * (R * C)
    j = tl.arange(0, R_PAD)[None, :]
    z = tl.zeros_like(x)
    for i0 in range(0, R_PAD, ROWS):
        i = (i0 + tl.arange(0, ROWS))[:, None]
        mask = (i // C == j // C) & (i < R) & (j < R)
        if TRANSPOSED:
            place = (i // C) * C * C + (j % C) * C + i % C
        else:
            place = (i // C) * C * C + (i % C) * C + j % C
        K = tl.load(own_K_ptr + place, mask=mask, other=0.0)  # (ROWS, R_PAD)
        z = tl.dot(columns(x, i0, ROWS).to(K.dtype), K, z, input_precision=PRECISION)
    return z


@triton.jit
def mix(
    x_t, x_v, u_ptr, w_ptr, sample, routed,
    MIX: tl.constexpr, U: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr,
    PRECISION: tl.constexpr, G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """z (BM, R_PAD) = mix(first(x_t), operand); rows that are not routed keep x_t.

    identity x, shift x + w, scale x ∘ w, rank1 ⟨x, u⟩ w by group, matrix x K (w_ptr holds K).
    x_v: as of `vector_operand`.
    """
    x = relu(x_t) if FIRST == "relu" else x_t
    if MIX == "identity":
        z = x
    elif MIX == "matrix":
        z = matrix_mix(x, w_ptr, sample, False, PRECISION, G, R, R_PAD, WHOLE)
    else:
        w = vector_operand(w_ptr, x_v, sample, routed, W, R, R_PAD)
        if MIX == "shift":
            z = x + w
        elif MIX == "scale":
            z = x * w
        else:
            u = vector_operand(u_ptr, x_v, sample, routed, U, R, R_PAD)
            z = group_sums(x * u, G, R, R_PAD) * w
    return zero_beyond(tl.where(routed[:, None], z, x_t), R, R_PAD)


@triton.jit
def mix_backward(
    dz, x_t, u_ptr, w_ptr, sample, routed,
    MIX: tl.constexpr, U: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr,
    PRECISION: tl.constexpr, G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """dx_t (BM, R_PAD) from dz: through the mix, then through `first` (relu'(0) = 0, as in torch).

    shift dz, scale dz ∘ w, rank1 ⟨dz, w⟩ u, matrix dz Kᵀ.
    """
    if MIX == "matrix":
        dx = matrix_mix(dz, w_ptr, sample, True, PRECISION, G, R, R_PAD, 128)
    elif MIX == "scale":
        dx = dz * vector_operand(w_ptr, None, sample, routed, W, R, R_PAD)
    elif MIX == "rank1":
        w = vector_operand(w_ptr, None, sample, routed, W, R, R_PAD)
        u = vector_operand(u_ptr, None, sample, routed, U, R, R_PAD)
        dx = group_sums(dz * w, G, R, R_PAD) * u
    else:
        dx = dz
    if FIRST == "relu":
        dx = tl.where(x_t <= 0.0, 0.0, dx)  # NaN passes, as in torch
    return zero_beyond(tl.where(routed[:, None], dx, dz), R, R_PAD)


@triton.jit
def w_gradient(
    dz, x_t, u_ptr, sample, routed, MIX: tl.constexpr, U: tl.constexpr, FIRST: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Each row's part of dw (BM, R_PAD): shift dz, scale dz ∘ x, rank1 ⟨x, u⟩ dz."""
    dw = dz
    if MIX != "shift":
        x = relu(x_t) if FIRST == "relu" else x_t
        if MIX == "scale":
            dw = dz * x
        else:
            u = vector_operand(u_ptr, None, sample, routed, U, R, R_PAD)
            dw = group_sums(x * u, G, R, R_PAD) * dz
    return dw


@triton.jit
def u_gradient(
    dz, x_t, w_ptr, sample, routed, W: tl.constexpr, FIRST: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Each row's part of du (BM, R_PAD) for rank1: ⟨dz, w⟩ x."""
    x = relu(x_t) if FIRST == "relu" else x_t
    w = vector_operand(w_ptr, None, sample, routed, W, R, R_PAD)
    return group_sums(dz * w, G, R, R_PAD) * x


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z): none, relu, gelu (exact), gelu_tanh, silu."""
    if ACTIVATION == "none":
        h = z
    elif ACTIVATION == "relu":
        h = relu(z)
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        h = z * tl.sigmoid(z)
    return h


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """act'(z); relu'(0) = 0."""
    if ACTIVATION == "none":
        slope = tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        slope = gate + z * gate * (1.0 - gate) * inner
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        gate = tl.sigmoid(z)
        slope = gate * (1.0 + z * (1.0 - gate))
    return slope
