"""K3, the gradients of A, B and their biases as partial sums, and K4, which adds those up.

A workspace of fp32 holds the partial sums of each split of the rows, section after section:
dA (splits + visual, R·D), dB (splits, g·N·r), db_A (splits + visual, R), db_B (splits, g·N). The
`visual` splits are those of the rows of x_r, which meet A too.
"""

import triton
import triton.language as tl

from .operands import sample_sums
from .parts import kept, kept_tile, wait_for_previous


@triton.jit
def transposed_product(
    wide_ptr, narrow_ptr, seed_ptr, start, stop, threshold, first, column, c0,
    WIDTH: tl.constexpr, LDW: tl.constexpr, C: tl.constexpr, LDC: tl.constexpr,
    C_PAD: tl.constexpr, SUMS: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Σ over rows start … stop of wideᵀ narrow (BN, C_PAD); with SUMS, of wide too (BN,).

    wide: columns `first` … first + BN of the WIDTH that begin at `column` in rows of LDW (x, x_r or
    dy); narrow: the C columns from c0 on in rows of LDC (dx_t, dx_v or z), or None for the sums
    alone.

    In 16 bits the sums are a product with ones. Added up in registers, they would share a load with
    the product, and of a load with such a second use Triton (3.6 to 3.8) keeps one slot too few on
    sm_90: the next step's copy overwrites what the asynchronous product still reads, seen as wrong
    tiles of dB on an H200. In fp32, whose products are not asynchronous, TF32 would round them.
    """
    n = first + tl.arange(0, BN)
    c = tl.arange(0, C_PAD)
    acc = tl.zeros([BN, C_PAD], tl.float32)
    BY_PRODUCT: tl.constexpr = narrow_ptr is not None and wide_ptr.dtype.element_ty != tl.float32
    by_product = tl.zeros([BN, 16], tl.float32)  # 16 equal columns, the fewest of a product
    # Pipelined, 4-byte elements of a transposed operand are copied one by one: in TF32, and where
    # autocast leaves x in fp32 beside weights in 16 bits. In one stage each thread reads 16 bytes,
    # and the other programs of a multiprocessor hide the wait. So too where x is in the other 16
    # bits than the weights, which makes a second use of its load. Of 4 bytes beside 2, half as
    # many rows a step hold as much: whole steps spilled 160 times at R = 128 on sm_80.
    MIXED: tl.constexpr = (
        narrow_ptr is not None and wide_ptr.dtype.element_ty != narrow_ptr.dtype.element_ty
    )
    IS_WIDER: tl.constexpr = MIXED and wide_ptr.dtype.element_ty == tl.float32
    STAGES: tl.constexpr = 1 if PRECISION == "tf32" or MIXED else None
    ROWS: tl.constexpr = BM // 2 if IS_WIDER and BM > 16 else BM
    sums = tl.zeros([ROWS, BN], tl.float32)
    for m0 in tl.range(start, stop, ROWS, num_stages=STAGES):
        row = (m0 + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < stop
        wide = tl.load(
            wide_ptr + row[:, None] * LDW + (column + n)[None, :],
            mask=inside[:, None] & (n < WIDTH)[None, :], other=0.0,
        )  # (ROWS, BN)  # fmt: skip
        if seed_ptr is not None:
            wide = tl.where(kept(seed_ptr, row, first, threshold, STREAM, ROWS, BN), wide, 0.0)
        if SUMS:
            if BY_PRODUCT:
                ones = tl.full([ROWS, 16], 1.0, wide.dtype)
                by_product = tl.dot(tl.trans(wide), ones, by_product)
            else:
                sums += wide.to(tl.float32)
        if narrow_ptr is not None:
            narrow = tl.load(
                narrow_ptr + row[:, None] * LDC + (c0 + c)[None, :],
                mask=inside[:, None] & (c < C)[None, :], other=0.0,
            )  # (ROWS, C_PAD)  # fmt: skip
            acc = tl.dot(tl.trans(wide.to(narrow.dtype)), narrow, acc, input_precision=PRECISION)
    if BY_PRODUCT:
        is_first = (tl.arange(0, 16) == 0)[None, :]
        return acc, tl.sum(tl.where(is_first, by_product, 0.0), 1)
    return acc, tl.sum(sums, 0)


@triton.jit
def row_sums(ptr, start, stop, C: tl.constexpr, C_PAD: tl.constexpr, BM: tl.constexpr):
    """Σ over rows start … stop of a tensor (·, C), in fp32: (C_PAD,)."""
    c = tl.arange(0, C_PAD)
    acc = tl.zeros([BM, C_PAD], tl.float32)
    for m0 in range(start, stop, BM):
        row = (m0 + tl.arange(0, BM)).to(tl.int64)
        mask = (row < stop)[:, None] & (c < C)[None, :]
        acc += tl.load(ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def down_weights(
    x_ptr, dx_t_ptr, seed_ptr, dA_ptr, db_A_ptr, start, stop, threshold, keep_scale, block,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, WANT_A: tl.constexpr,
    WANT_b_A: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Stores dx_tᵀ x̂ (columns of one block) and, in the first block, Σ dx_t of some rows."""
    c = tl.arange(0, R_PAD)
    if WANT_A:
        acc, _ = transposed_product(
            x_ptr, dx_t_ptr, seed_ptr, start, stop, threshold, block * BN, 0, 0,
            D, D, R, R, R_PAD, False, STREAM, PRECISION, BM, BN,
        )  # fmt: skip
        if seed_ptr is not None:
            acc = acc * keep_scale
        k = block * BN + tl.arange(0, BN)
        mask = (k < D)[:, None] & (c < R)[None, :]
        tl.store(dA_ptr + c[None, :] * D + k[:, None], acc, mask=mask)
    if WANT_b_A:
        if block == 0:
            tl.store(db_A_ptr + c, row_sums(dx_t_ptr, start, stop, R, R_PAD, BM), mask=c < R)


# Samples whose partial sums `image_weights` holds at once, in fp32 beside dA.
MOST_SAMPLES = tl.constexpr(32)


@triton.jit
def image_weights(
    x_r_ptr, pairs_ptr, A_ptr, dx_r_ptr, seed_ptr, offsets_ptr, dA_ptr, db_A_ptr, start, stop, T,
    threshold, keep_scale, block,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, ROW_BLOCK: tl.constexpr,
    WANT_b_A: tl.constexpr, PRECISION: tl.constexpr, SAMPLES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`down_weights` of samples start … stop, whose dx_v (·, R) is only now summed up, and dx_r.

    Stores columns of one block of dx_vᵀ x̂_r; where it is given of dx_r (S, D) =
    keep ∘ (dx_v A) / (1 − p); and, in the first block, Σ dx_v. Every column block sums dx_v anew,
    from the second-level cache. The loop within keeps this one from being pipelined, so that x_r
    is read 16 bytes a thread in any dtype.
    """
    c = tl.arange(0, R_PAD)
    n = block * BN + tl.arange(0, BN)
    dA = tl.zeros([BN, R_PAD], tl.float32)
    db_A = tl.zeros([R_PAD], tl.float32)
    for s0 in range(start, stop, SAMPLES):
        sample = s0 + tl.arange(0, SAMPLES)
        inside = sample < stop
        row = sample.to(tl.int64)
        x_r = kept_tile(x_r_ptr, seed_ptr, row, inside, block * BN, threshold, D, 1, SAMPLES, BN)
        dx_v = sample_sums(
            pairs_ptr, offsets_ptr, sample, inside, 0, T, R, R_PAD, ROW_BLOCK
        ).to(A_ptr.dtype.element_ty)  # (SAMPLES, R_PAD)  # fmt: skip
        dA = tl.dot(tl.trans(x_r.to(dx_v.dtype)), dx_v, dA, input_precision=PRECISION)
        if WANT_b_A:
            db_A += tl.sum(dx_v.to(tl.float32), 0)
        if dx_r_ptr is not None:
            A = tl.load(
                A_ptr + c[:, None] * D + n[None, :],
                mask=(c < R)[:, None] & (n < D)[None, :], other=0.0,
            )  # (R_PAD, BN)  # fmt: skip
            dx_r = tl.dot(dx_v, A, input_precision=PRECISION)
            if seed_ptr is not None:
                keep = kept(seed_ptr, row, block * BN, threshold, 1, SAMPLES, BN)
                dx_r = tl.where(keep, dx_r * keep_scale, 0.0)
            place = row[:, None] * D + n[None, :]
            mask = inside[:, None] & (n < D)[None, :]
            tl.store(dx_r_ptr + place, dx_r.to(dx_r_ptr.dtype.element_ty), mask=mask)
    if seed_ptr is not None:
        dA = dA * keep_scale
    tl.store(dA_ptr + c[None, :] * D + n[:, None], dA, mask=(n < D)[:, None] & (c < R)[None, :])
    if WANT_b_A:
        if block == 0:
            tl.store(db_A_ptr + c, db_A, mask=c < R)


@triton.jit(do_not_specialize=["M", "S", "T", "rows_per_split", "splits", "visual", "threshold"])
def weight_partials(
    x_ptr, dx_t_ptr, x_r_ptr, dx_v_ptr, pairs_ptr, A_ptr, dx_r_ptr, dy_ptr, z_ptr, seed_ptr,
    offsets_ptr, partial_ptr, M, S, T, rows_per_split, splits, visual, threshold, keep_scale,
    D: tl.constexpr, N: tl.constexpr, LDY: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    RANK_PAD: tl.constexpr, SEGMENTS: tl.constexpr, ROW_BLOCK: tl.constexpr,
    WANT_A: tl.constexpr, WANT_b_A: tl.constexpr, WANT_B: tl.constexpr, WANT_b_B: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """K3: one split's part of dA = dx_tᵀ x̂ + dx_vᵀ x̂_r, dB = dyᵀ z and the bias gradients.

    Grid (column blocks, splits + visual). The first column blocks are those of x (and x_r, for the
    visual splits), then those of each adapted segment of dy. Bytes: x and dy once, dx_t and z once
    a column block; the workspace once.

    The visual splits read dx_v, or, where `pairs` is given, sum it up from K2's partial sums
    (pairs, R), and make dx_r from it where that is wanted. They alone need the kernel that made
    dx_v, so where this one waits "late" the others wait at their ends.
    """
    wait_for_previous(WAIT, "first")
    RANK: tl.constexpr = R // len(SEGMENTS)
    A_BLOCKS: tl.constexpr = tl.cdiv(D, BN) if WANT_A else (1 if WANT_b_A else 0)
    B_BLOCKS: tl.constexpr = tl.cdiv(N, BN)
    A_SIZE: tl.constexpr = R * D if WANT_A else 0
    B_SIZE: tl.constexpr = len(SEGMENTS) * N * RANK if WANT_B else 0
    SAMPLES: tl.constexpr = BM if BM < MOST_SAMPLES else MOST_SAMPLES
    block, split = tl.program_id(0), tl.program_id(1)
    all_splits = (splits + visual).to(tl.int64)
    dB_ptr = partial_ptr + all_splits * A_SIZE
    db_A_ptr = dB_ptr + splits.to(tl.int64) * B_SIZE
    db_B_ptr = db_A_ptr + all_splits * (R if WANT_b_A else 0)

    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)
    if block < A_BLOCKS:
        dA_ptr = partial_ptr + split.to(tl.int64) * A_SIZE
        db_A_ptr += split * R
        if split < splits:
            down_weights(
                x_ptr, dx_t_ptr, seed_ptr, dA_ptr, db_A_ptr, start, stop, threshold, keep_scale,
                block, D, R, R_PAD, WANT_A, WANT_b_A, 0, PRECISION, BM, BN,
            )  # fmt: skip
        elif x_r_ptr is not None:
            wait_for_previous(WAIT, "late")
            start = (split - splits) * rows_per_split
            stop = tl.minimum(start + rows_per_split, S)
            if pairs_ptr is not None:
                image_weights(
                    x_r_ptr, pairs_ptr, A_ptr, dx_r_ptr, seed_ptr, offsets_ptr, dA_ptr, db_A_ptr,
                    start, stop, T, threshold, keep_scale, block,
                    D, R, R_PAD, ROW_BLOCK, WANT_b_A, PRECISION, SAMPLES, BN,
                )  # fmt: skip
            else:
                down_weights(
                    x_r_ptr, dx_v_ptr, seed_ptr, dA_ptr, db_A_ptr, start, stop, threshold,
                    keep_scale, block, D, R, R_PAD, WANT_A, WANT_b_A, 1, PRECISION, BM, BN,
                )  # fmt: skip
    elif WANT_B or WANT_b_B:
        if split < splits:
            i = (block - A_BLOCKS) // B_BLOCKS
            first = (block - A_BLOCKS) % B_BLOCKS * BN
            segment = 0
            for j in tl.static_range(len(SEGMENTS)):
                segment = tl.where(i == j, SEGMENTS[j], segment)
            acc, sums = transposed_product(
                dy_ptr, z_ptr, None, start, stop, 0, first, segment * N, i * RANK,
                N, LDY, RANK, R, RANK_PAD, WANT_b_B, 0, PRECISION, BM, BN,
            )  # fmt: skip
            n = first + tl.arange(0, BN)
            c = tl.arange(0, RANK_PAD)
            if WANT_B:
                place = split.to(tl.int64) * B_SIZE + (i * N + n)[:, None] * RANK + c[None, :]
                tl.store(dB_ptr + place, acc, mask=(n < N)[:, None] & (c < RANK)[None, :])
            if WANT_b_B:
                place = split * (len(SEGMENTS) * N) + i * N + n
                tl.store(db_B_ptr + place, sums, mask=n < N)
    wait_for_previous(WAIT, "late")


@triton.jit
def add_up(
    partial_ptr, out_ptr, splits, block, factor, LENGTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (LENGTH,) = factor · Σ over splits of partial (splits, LENGTH), one block of it."""
    e = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    place = partial_ptr + e
    for _ in range(0, splits):
        acc += tl.load(place, mask=e < LENGTH, other=0.0)
        place += LENGTH
    tl.store(out_ptr + e, (acc * factor).to(out_ptr.dtype.element_ty), mask=e < LENGTH)


@triton.jit(do_not_specialize=["splits", "visual"])
def add_partials(
    partial_ptr, dA_ptr, db_A_ptr, dB_ptr, db_B_ptr, splits, visual, s,
    A_SIZE: tl.constexpr, B_SIZE: tl.constexpr, b_A_SIZE: tl.constexpr, b_B_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """K4: dA, db_A, db_B and s · dB from the workspace, added in the order of the splits, cast.

    Grid (blocks of dA, then dB, db_A, db_B). Sizes of sections that are not there are 0. The
    workspace once, each gradient once.
    """
    wait_for_previous(WAIT, "first")
    # Triton 3.6 cannot add what tl.cdiv returns.
    A_BLOCKS: tl.constexpr = (A_SIZE + BLOCK - 1) // BLOCK
    B_BLOCKS: tl.constexpr = (B_SIZE + BLOCK - 1) // BLOCK
    b_A_BLOCKS: tl.constexpr = (b_A_SIZE + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    all_splits = splits + visual
    dB_partial_ptr = partial_ptr + all_splits.to(tl.int64) * A_SIZE
    db_A_partial_ptr = dB_partial_ptr + splits.to(tl.int64) * B_SIZE
    db_B_partial_ptr = db_A_partial_ptr + all_splits.to(tl.int64) * b_A_SIZE
    if block < A_BLOCKS:
        if A_SIZE > 0:
            add_up(partial_ptr, dA_ptr, all_splits, block, 1.0, A_SIZE, BLOCK)
    elif block < A_BLOCKS + B_BLOCKS:
        if B_SIZE > 0:
            add_up(dB_partial_ptr, dB_ptr, splits, block - A_BLOCKS, s, B_SIZE, BLOCK)
    elif block < A_BLOCKS + B_BLOCKS + b_A_BLOCKS:
        if b_A_SIZE > 0:
            place = block - A_BLOCKS - B_BLOCKS
            add_up(db_A_partial_ptr, db_A_ptr, all_splits, place, 1.0, b_A_SIZE, BLOCK)
    else:
        if b_B_SIZE > 0:
            place = block - A_BLOCKS - B_BLOCKS - b_A_BLOCKS
            add_up(db_B_partial_ptr, db_B_ptr, splits, place, 1.0, b_B_SIZE, BLOCK)
