"""K2, from dy back through the bottleneck to dx."""

import triton
import triton.language as tl

from .mixes import activate, activation_slope, mix, mix_backward, u_gradient, w_gradient
from .parts import (
    LONGEST_ROW,
    base_tile,
    block_of_rows,
    bottleneck_tile,
    columns,
    is_idle,
    kept,
    plus_base,
    wait_for_previous,
    zero_beyond,
)


@triton.jit
def up_backward(
    dy_ptr, B_ptr, row, inside,
    N: tl.constexpr, LDY: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dy B (BM, R_PAD): each segment's columns of dy (·, LDY) through its rows of B."""
    c = tl.arange(0, R_PAD)
    RANK: tl.constexpr = R // len(SEGMENTS)
    acc = tl.zeros([BM, R_PAD], tl.float32)
    for i in tl.static_range(len(SEGMENTS)):
        own = (c >= i * RANK) & (c < (i + 1) * RANK)
        # This grid has no third axis, but the compiler does not know: ptxas unrolls all 12 steps of
        # d = 768 where it sees their number, and R = 128 spills.
        for n0 in range(0, N * tl.num_programs(2), BN):
            n = n0 + tl.arange(0, BN)
            dy = tl.load(
                dy_ptr + row[:, None] * LDY + (SEGMENTS[i] * N + n)[None, :],
                mask=inside[:, None] & (n < N)[None, :], other=0.0,
            )  # (BM, BN)  # fmt: skip
            B = tl.load(
                B_ptr + (i * N + n)[:, None] * RANK + (c - i * RANK)[None, :],
                mask=(n < N)[:, None] & own[None, :], other=0.0,
            )  # (BN, R_PAD), zero in the columns of other segments  # fmt: skip
            acc = tl.dot(dy.to(B.dtype), B, acc, input_precision=PRECISION)
    return zero_beyond(acc, R, R_PAD)


@triton.jit
def sum_by_sample(
    values, partial_ptr, sample, inside, routed, R: tl.constexpr, R_PAD: tl.constexpr
):  # fmt: skip
    """Stores Σ of values (BM, R_PAD) over this block's rows of each sample, without atomics.

    Blocks and samples both run along the rows, so the pairs (block, sample) that meet form a
    staircase, in which block + sample counts up without a gap: it is the pair's row in `partial`.
    """
    c = tl.arange(0, R_PAD)
    first = tl.min(tl.where(inside, sample, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(inside, sample, -1), 0)
    for b in range(first, last + 1):
        own = (sample == b) & routed
        total = tl.sum(tl.where(own[:, None], values, 0.0), 0)
        pair = (tl.program_id(0) + b).to(tl.int64)
        tl.store(partial_ptr + pair * R + c, total, mask=c < R)


@triton.jit
def operand_partials(
    dz, x_t_ptr, u_ptr, w_ptr, du_ptr, dw_ptr, row, inside, sample, routed,
    MIX: tl.constexpr, U: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Each (block, sample)'s part of dw and du; without du_ptr both are of x_v, and added.

    x_t is read a second time: kept in registers beside dz and dx_t it makes R = 128 spill.
    """
    x_t = bottleneck_tile(x_t_ptr, row, inside, R, R_PAD)
    if du_ptr is not None:
        du = u_gradient(dz, x_t, w_ptr, sample, routed, W, FIRST, G, R, R_PAD)
        sum_by_sample(du, du_ptr, sample, inside, routed, R, R_PAD)
        dw = w_gradient(dz, x_t, u_ptr, sample, routed, MIX, U, FIRST, G, R, R_PAD)
        sum_by_sample(dw, dw_ptr, sample, inside, routed, R, R_PAD)
    else:
        dx_v = tl.zeros_like(dz)
        if MIX == "rank1" and U != "one":
            dx_v = u_gradient(dz, x_t, w_ptr, sample, routed, W, FIRST, G, R, R_PAD)
            if U == "relu":
                x_v = bottleneck_tile(u_ptr, sample.to(tl.int64), routed, R, R_PAD)
                dx_v = tl.where(x_v <= 0.0, 0.0, dx_v)  # NaN passes, as in torch
        if W != "one":
            dx_v += w_gradient(dz, x_t, u_ptr, sample, routed, MIX, U, FIRST, G, R, R_PAD)
        sum_by_sample(dx_v, dw_ptr, sample, inside, routed, R, R_PAD)


@triton.jit
def down_backward(
    dx_t, A_ptr, base_ptr, dx_ptr, seed_ptr, row, inside, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, STREAM: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes dx (·, D) = base + keep ∘ (dx_t A) / (1 − p) for rows of dx_t (BM, R_PAD)."""
    SIZE: tl.constexpr = A_ptr.dtype.element_ty.primitive_bitwidth // 8
    STEP: tl.constexpr = R_PAD if R_PAD * SIZE <= LONGEST_ROW else 32
    for k0 in range(0, D, BN):
        k = k0 + tl.arange(0, BN)
        base = base_tile(base_ptr, row, inside, k0, 0, D, D, BM, BN)
        dx = tl.zeros([BM, BN], tl.float32)
        for c0 in range(0, R_PAD, STEP):
            c = c0 + tl.arange(0, STEP)
            A = tl.load(
                A_ptr + c[:, None] * D + k[None, :],
                mask=(c < R)[:, None] & (k < D)[None, :], other=0.0,
            )  # (STEP, BN)  # fmt: skip
            dx = tl.dot(columns(dx_t, c0, STEP), A, dx, input_precision=PRECISION)
        if seed_ptr is not None:
            keep = kept(seed_ptr, row, k0, threshold, STREAM, BM, BN)
            dx = tl.where(keep, dx * keep_scale, 0.0)
        dx = plus_base(dx, base, BASE, BN)
        place = row[:, None] * D + k[None, :]
        mask = inside[:, None] & (k < D)[None, :]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "T", "threshold"])
def routed_backward(
    dy_ptr, x_t_ptr, A_ptr, u_ptr, w_ptr, B_ptr, base_ptr, dx_ptr, dx_t_ptr, z_ptr, dz_ptr,
    du_ptr, dw_ptr, seed_ptr, row_sample_ptr, offsets_ptr, M, T, threshold, keep_scale, s,
    D: tl.constexpr, N: tl.constexpr, LDY: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    SEGMENTS: tl.constexpr, MIX: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    FIRST: tl.constexpr, G: tl.constexpr, ACTIVATION: tl.constexpr, BASE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """K2: dz = s · dy B through activation and mix to dx_t, then dx = base + dx_t A.

    Needs of the forward pass only x_t (M, R) and the operand. Writes, where the pointer is given:
    dx_t (M, R), for dA and b_A; z (M, R), the activated bottleneck, for dB; dz (M, R), for dK;
    each (block, sample)'s part of dw and du (`sum_by_sample`), or of dx_v in dw_ptr's place where
    both u and w are x_v; dx (M, D).

    base is dy (residual), dx itself in place (what the base layer's own gradient put there), or
    none. Grid as K1. Bytes: dy, x_t, base, dx, dx_t and z once; A and B once a program.
    """
    wait_for_previous(WAIT, "first")
    if is_idle(offsets_ptr, T, MIX, BM):
        return
    row, inside, sample, routed = block_of_rows(row_sample_ptr, offsets_ptr, M, T, MIX, BM)
    dz = up_backward(dy_ptr, B_ptr, row, inside, N, LDY, R, R_PAD, SEGMENTS, PRECISION, BM, BN) * s
    x_t = bottleneck_tile(x_t_ptr, row, inside, R, R_PAD)
    z = mix(x_t, None, u_ptr, w_ptr, sample, routed, MIX, U, W, FIRST, PRECISION, G, R, R_PAD, 128)

    c = tl.arange(0, R_PAD)
    place = row[:, None] * R + c[None, :]
    mask = inside[:, None] & (c < R)[None, :]
    if z_ptr is not None:
        h = activate(z, ACTIVATION)
        tl.store(z_ptr + place, h.to(z_ptr.dtype.element_ty), mask=mask)
    dz = dz * activation_slope(z, ACTIVATION)
    if dz_ptr is not None:
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    dx_t = mix_backward(
        dz, x_t, u_ptr, w_ptr, sample, routed, MIX, U, W, FIRST, PRECISION, G, R, R_PAD
    ).to(A_ptr.dtype.element_ty)
    if dx_t_ptr is not None:
        tl.store(dx_t_ptr + place, dx_t, mask=mask)
    if dw_ptr is not None:
        operand_partials(
            dz, x_t_ptr, u_ptr, w_ptr, du_ptr, dw_ptr, row, inside, sample, routed,
            MIX, U, W, FIRST, G, R, R_PAD,
        )  # fmt: skip
    if dx_ptr is not None:
        down_backward(
            dx_t, A_ptr, base_ptr, dx_ptr, seed_ptr, row, inside, threshold, keep_scale,
            D, R, R_PAD, 0, BASE, PRECISION, BM, BN,
        )  # fmt: skip
