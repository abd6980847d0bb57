"""K0, the down-projection alone, and K1, the whole forward pass."""

import triton
import triton.language as tl

from .mixes import activate, mix
from .parts import (
    LONGEST_ROW,
    base_tile,
    block_of_rows,
    columns,
    down,
    is_idle,
    plus_base,
    wait_for_previous,
)


@triton.jit(do_not_specialize=["M", "threshold"])
def project(
    x_ptr, A_ptr, b_A_ptr, seed_ptr, out_ptr, M, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, STREAM: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """out (M, R) = x̂ Aᵀ + b_A for x (M, D): x_v of the image, or x_t anew for the backward pass.

    Grid (blocks of BM rows,). Reads x once and A once a program; writes M·R.
    """
    wait_for_previous(WAIT, "first")
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = row < M
    x_t, _ = down(
        x_ptr, None, A_ptr, b_A_ptr, seed_ptr, row, row, inside, threshold, keep_scale,
        D, R, R_PAD, STREAM, PRECISION, BM, BN,
    )  # fmt: skip
    c = tl.arange(0, R_PAD)
    mask = inside[:, None] & (c < R)[None, :]
    tl.store(out_ptr + row[:, None] * R + c[None, :], x_t.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bottleneck(
    x_ptr, x_r_ptr, A_ptr, b_A_ptr, u_ptr, w_ptr, x_t_ptr, x_v_ptr, seed_ptr, row, inside, stored,
    sample, routed, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, MIX: tl.constexpr, U: tl.constexpr,
    W: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """z = act(mix(x̂ Aᵀ + b_A)) (BM, R_PAD); stores the rows `stored` of x_t (·, R), if any.

    A kernel that waits "late" does it here, before the operand is read.

    Where x_r is given, x_v is made here too, and each row of `stored` stores that of its sample, if
    any: the same for all rows of one.
    """
    c = tl.arange(0, R_PAD)
    x_t, x_v = down(
        x_ptr, x_r_ptr, A_ptr, b_A_ptr, seed_ptr, row, sample, inside, threshold, keep_scale,
        D, R, R_PAD, 0, PRECISION, BM, BN,
    )  # fmt: skip
    fits = stored[:, None] & (c < R)[None, :]
    x_t = x_t.to(A_ptr.dtype.element_ty)  # what the backward pass will read
    if x_t_ptr is not None:
        tl.store(x_t_ptr + row[:, None] * R + c[None, :], x_t, mask=fits)
    if x_r_ptr is not None:
        x_v = x_v.to(A_ptr.dtype.element_ty)
        if x_v_ptr is not None:
            place = sample.to(tl.int64)[:, None] * R + c[None, :]
            tl.store(x_v_ptr + place, x_v, mask=fits)
        x_v = x_v.to(tl.float32)
    else:
        x_v = None
    wait_for_previous(WAIT, "late")
    z = mix(
        x_t.to(tl.float32), x_v, u_ptr, w_ptr, sample, routed,
        MIX, U, W, FIRST, PRECISION, G, R, R_PAD, 256,
    )  # fmt: skip
    return activate(z, ACTIVATION)


@triton.jit(do_not_specialize=["M", "T", "threshold"])
def routed_bottleneck(
    x_ptr, A_ptr, b_A_ptr, u_ptr, w_ptr, x_t_ptr, z_ptr, seed_ptr, row_sample_ptr, offsets_ptr,
    M, T, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, MIX: tl.constexpr, U: tl.constexpr,
    W: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """K1 up to the bottleneck, for P3: z (M, R) = act(mix(x̂ Aᵀ + b_A)).

    Grid as K1. Bytes: x once, z and x_t (where it is given) once; A once a program.
    """
    wait_for_previous(WAIT, "first")
    if is_idle(offsets_ptr, T, MIX, BM):
        return
    row, inside, sample, routed = block_of_rows(row_sample_ptr, offsets_ptr, M, T, MIX, BM)
    z = bottleneck(
        x_ptr, None, A_ptr, b_A_ptr, u_ptr, w_ptr, x_t_ptr, None, seed_ptr, row, inside, inside,
        sample, routed, threshold, keep_scale,
        D, R, R_PAD, MIX, U, W, FIRST, G, ACTIVATION, PRECISION, BM, BN, WAIT,
    )  # fmt: skip
    c = tl.arange(0, R_PAD)
    mask = inside[:, None] & (c < R)[None, :]
    tl.store(z_ptr + row[:, None] * R + c[None, :], z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "T", "threshold"])
def routed_forward(
    x_ptr, x_r_ptr, A_ptr, b_A_ptr, u_ptr, w_ptr, B_ptr, b_B_ptr, base_ptr, y_ptr, x_t_ptr,
    x_v_ptr, seed_ptr, row_sample_ptr, offsets_ptr, M, T, threshold, keep_scale, s,
    D: tl.constexpr, N: tl.constexpr, LDY: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    SEGMENTS: tl.constexpr, MIX: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    FIRST: tl.constexpr, G: tl.constexpr, ACTIVATION: tl.constexpr, BASE: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """K1: y = base + b_B + s · act(mix(x̂ Aᵀ + b_A)) Bᵀ, for BM rows of x (M, D) a program.

    x_t stays in registers from the down-projection to the up-projection; it is stored (M, R) where
    x_t_ptr is given, for the backward pass. Where x_r (S, D) is given, x_v of the rows' samples is
    made from it, and stored (S, R) where x_v_ptr is given, of samples that have rows; else u and w
    are read. The N columns of B's segment i are added to columns SEGMENTS[i]·N … of base, and
    written to the same columns of y (rows of LDY). For an adapter base is x itself; for a linear
    layer it is y, in place.

    Grid: see `block_of_rows`; where COLUMNS are in "parts", programs of a third axis share those of
    each segment, and each makes z anew. Bytes: x, base and y once, x_t once; A and B once a
    program; in parts x and A once a part.
    """
    wait_for_previous(WAIT, "first")
    if is_idle(offsets_ptr, T, MIX, BM):
        return
    row, inside, sample, routed = block_of_rows(row_sample_ptr, offsets_ptr, M, T, MIX, BM)
    start, stop, stored = 0, N, inside
    if COLUMNS == "parts":
        part, parts = tl.program_id(2), tl.num_programs(2)
        STEPS: tl.constexpr = (N + BN - 1) // BN
        start, stop = part * STEPS // parts * BN, (part + 1) * STEPS // parts * BN
        stored = inside & (part == 0)
    z = bottleneck(
        x_ptr, x_r_ptr, A_ptr, b_A_ptr, u_ptr, w_ptr, x_t_ptr, x_v_ptr, seed_ptr, row, inside,
        stored, sample, routed, threshold, keep_scale,
        D, R, R_PAD, MIX, U, W, FIRST, G, ACTIVATION, PRECISION, BM, BN, WAIT,
    ).to(B_ptr.dtype.element_ty)  # fmt: skip

    c = tl.arange(0, R_PAD)
    RANK: tl.constexpr = R // len(SEGMENTS)
    SIZE: tl.constexpr = B_ptr.dtype.element_ty.primitive_bitwidth // 8
    STEP: tl.constexpr = R_PAD if R_PAD * SIZE <= LONGEST_ROW else 32
    for i in tl.static_range(len(SEGMENTS)):
        own_z = z
        if len(SEGMENTS) > 1:  # an infinity of another segment times its zero in B_T would be NaN
            own_z = tl.where(((c >= i * RANK) & (c < (i + 1) * RANK))[None, :], z, 0.0).to(z.dtype)
        for n0 in range(start, stop, BN):
            n = n0 + tl.arange(0, BN)
            base = base_tile(base_ptr, row, inside, n0, SEGMENTS[i] * N, N, LDY, BM, BN)
            y = tl.zeros([BM, BN], tl.float32)
            for c0 in range(0, R_PAD, STEP):
                k = c0 + tl.arange(0, STEP) - i * RANK
                B_T = tl.load(
                    B_ptr + (i * N + n)[None, :] * RANK + k[:, None],
                    mask=((k >= 0) & (k < RANK))[:, None] & (n < N)[None, :], other=0.0,
                )  # (STEP, BN), zero in the rows of other segments  # fmt: skip
                y = tl.dot(columns(own_z, c0, STEP), B_T, y, input_precision=PRECISION)
            y = y * s
            if b_B_ptr is not None:
                y += tl.load(b_B_ptr + i * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            y = plus_base(y, base, BASE, BN)
            place = row[:, None] * LDY + (SEGMENTS[i] * N + n)[None, :]
            mask = inside[:, None] & (n < N)[None, :]
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)
