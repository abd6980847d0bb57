"""The parts that kernels are built from: tiles in, tiles out.

A program owns a block of BM rows of the hidden states, with all R bottleneck columns in registers,
padded to R_PAD, a power of two of at least 16. Shapes stand beside each tile. What is known when
a kernel is compiled is upper case; a pointer that is not given is None, and its code vanishes.

All arithmetic is fp32; operands of products are rounded to the dtype of the weights.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(WAIT: tl.constexpr, HERE: tl.constexpr):
    """Waits, where WAIT is HERE, until the kernel launched before this one has ended, and lets the
    next one start.

    WAIT is "none" where the launch itself waits, as launches do. Else this kernel is launched
    while that one still runs, and waits "first" of all, or "late": behind what it can do without
    what that one writes. Every program waits, so that a kernel ends after all that came before it.

    A late kernel reads, unasked, what was written before the previous one, and writes memory that
    was given out before the previous one was launched; so that one must have waited before it lets
    this one start. "first" kernels do, late ones do not: a late kernel never follows a late one.
    """
    if WAIT == HERE:
        tl.extra.cuda.gdc_wait()
    if WAIT != "none":
        if HERE == "first":
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rows_of_sample(offsets_ptr, sample, T):
    """Where the rows of a sample start and stop."""
    start, stop = sample * T, sample * T + T
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + sample).to(tl.int32)
        stop = tl.load(offsets_ptr + sample + 1).to(tl.int32)
    return start, stop


@triton.jit
def is_idle(offsets_ptr, T, MIX: tl.constexpr, BM: tl.constexpr):
    """Whether this program of packed rows has none: with one long sample nearly all have none.

    The rows of all others begin before M, which fits 32 bits.
    """
    idle = False
    if MIX == "matrix":
        if offsets_ptr is not None:
            start, stop = rows_of_sample(offsets_ptr, tl.program_id(0), T)
            idle = tl.program_id(1) * BM >= stop - start
    return idle


@triton.jit
def block_of_rows(row_sample_ptr, offsets_ptr, M, T, MIX: tl.constexpr, BM: tl.constexpr):
    """The rows of this program, and the sample of each.

    For "matrix", a grid (S, blocks of the longest sample): one program never holds rows of two
    samples, and of packed ones many hold none (`is_idle`). Else a grid (blocks,) over all rows.
    Dense rows belong to sample row // T; packed rows have a code each: the sample, or −1 − sample
    for padding, which passes unrouted.

    Returns:
        row (BM,) int64, inside (BM,), sample (BM,) int32, routed (BM,).
    """
    if MIX == "matrix":
        start, stop = rows_of_sample(offsets_ptr, tl.program_id(0), T)
        row = start + tl.program_id(1) * BM + tl.arange(0, BM)
        inside = row < stop
        sample = tl.zeros([BM], tl.int32) + tl.program_id(0).to(tl.int32)
        routed = inside
        if row_sample_ptr is not None:
            routed = tl.load(row_sample_ptr + row, mask=inside, other=-1) >= 0
    else:
        row = tl.program_id(0) * BM + tl.arange(0, BM)
        inside = row < M
        if row_sample_ptr is not None:
            code = tl.load(row_sample_ptr + row, mask=inside, other=-1)
            routed = code >= 0
            sample = tl.where(routed, code, -1 - code)
        else:
            routed = inside
            sample = row // T
    return row.to(tl.int64), inside, sample, routed


@triton.jit
def kept(seed_ptr, row, k0, threshold, STREAM: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Which elements of rows `row` (BM,) and columns k0 … k0 + BK survive dropout: (BM, BK).

    One Philox call at counter (column // 8, row, STREAM, 0) serves 8 columns with 16 bits each;
    an element is kept where its bits are at least `threshold` = p · 2¹⁶. The result depends on
    seed, row, column and stream alone, so every tiling and every pass sees the same mask.
    `fused_route.dropout.keep_mask` is this function in torch.
    """
    group = k0 // 8 + tl.arange(0, BK // 8)
    c0 = (group[None, :] + tl.zeros([BM, 1], tl.int32)).to(tl.uint32)
    c1 = (row.to(tl.int32)[:, None] + tl.zeros([1, BK // 8], tl.int32)).to(tl.uint32)
    zero = c0 * 0
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), c0, c1, zero + STREAM, zero)
    word = tl.join(tl.join(r0, r1), tl.join(r2, r3))  # (BM, BK/8, 2, 2): word 2j + i at (i, j)
    bits = tl.join(word & 0xFFFF, word >> 16)  # (BM, BK/8, 2, 2, 2)
    return tl.reshape(bits, [BM, BK]).to(tl.int32) >= threshold


@triton.jit
def kept_tile(
    x_ptr, seed_ptr, row, inside, k0, threshold, D: tl.constexpr, STREAM: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns k0 … k0 + BK of rows of x (·, D): (BM, BK), zero where dropout drops it."""
    k = k0 + tl.arange(0, BK)
    x = tl.load(
        x_ptr + row[:, None] * D + k[None, :],
        mask=inside[:, None] & (k < D)[None, :], other=0.0,
    )  # (BM, BK)  # fmt: skip
    if seed_ptr is not None:
        x = tl.where(kept(seed_ptr, row, k0, threshold, STREAM, BM, BK), x, 0.0)
    return x


@triton.jit
def zero_beyond(sums, R: tl.constexpr, R_PAD: tl.constexpr):
    """sums (BM, R_PAD) with zeros beyond column R: an infinity times zeros there is NaN."""
    if R != R_PAD:
        sums = tl.where((tl.arange(0, R_PAD) < R)[None, :], sums, 0.0)
    return sums


@triton.jit
def plus_bias(
    sums, b_A_ptr, seed_ptr, keep_scale, R: tl.constexpr, R_PAD: tl.constexpr
):  # fmt: skip
    """sums / (1 − p) + b_A (BM, R_PAD), with the factor where there is dropout; zero beyond R."""
    c = tl.arange(0, R_PAD)
    sums = zero_beyond(sums, R, R_PAD)
    if seed_ptr is not None:
        sums = sums * keep_scale
    if b_A_ptr is not None:
        sums += tl.load(b_A_ptr + c, mask=c < R, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def down(
    x_ptr, x_r_ptr, A_ptr, b_A_ptr, seed_ptr, row, sample, inside, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, STREAM: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x̂ Aᵀ + b_A (BM, R_PAD) for rows of x (·, D); x̂ = keep ∘ x / (1 − p) where there is a seed.

    And the same of each row's own image, where x_r (S, D) is given: x_v (BM, R_PAD), from the tiles
    of A that pass by anyway. Rows of one sample repeat it; 16 rows are the fewest of a product.

    The factor 1 / (1 − p) is applied to the sum: products are linear in it, and x is not rounded
    again.

    Returns:
        x_t, x_v; without x_r_ptr x_v is nothing of use.
    """
    c = tl.arange(0, R_PAD)
    x_t = tl.zeros([BM, R_PAD], tl.float32)
    x_v = tl.zeros([BM, R_PAD], tl.float32)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        x = kept_tile(x_ptr, seed_ptr, row, inside, k0, threshold, D, STREAM, BM, BK)
        A_T = tl.load(
            A_ptr + c[None, :] * D + k[:, None], mask=(c < R)[None, :] & (k < D)[:, None], other=0.0
        )  # (BK, R_PAD)
        x_t = tl.dot(x.to(A_T.dtype), A_T, x_t, input_precision=PRECISION)
        if x_r_ptr is not None:
            own = sample.to(tl.int64)
            x_r = kept_tile(x_r_ptr, seed_ptr, own, inside, k0, threshold, D, 1, BM, BK)
            x_v = tl.dot(x_r.to(A_T.dtype), A_T, x_v, input_precision=PRECISION)
    x_t = plus_bias(x_t, b_A_ptr, seed_ptr, keep_scale, R, R_PAD)
    x_v = plus_bias(x_v, b_A_ptr, seed_ptr, keep_scale, R, R_PAD)
    return x_t, x_v


@triton.jit
def bottleneck_tile(
    ptr, row, inside, R: tl.constexpr, R_PAD: tl.constexpr
):  # fmt: skip
    """Rows of a tensor (·, R) as fp32 (BM, R_PAD), zero beyond R and where not inside."""
    c = tl.arange(0, R_PAD)
    mask = inside[:, None] & (c < R)[None, :]
    return tl.load(ptr + row[:, None] * R + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def base_tile(
    base_ptr, row, inside, first, column, N: tl.constexpr, LD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns `first` … first + BN (BM, BN) of the N that begin at `column` of base; zero if none.

    Loaded before the step's product, which hides a part of the wait: the compiler pipelines
    operands of products alone. Behind it, K1 took up to 5 % longer on an H200 in the tiles chosen.
    """
    if base_ptr is None:
        base = tl.zeros([BM, BN], tl.float32)
    else:
        n = first + tl.arange(0, BN)
        base = tl.load(
            base_ptr + row[:, None] * LD + (column + n)[None, :],
            mask=inside[:, None] & (n < N)[None, :], other=0.0,
        )  # fmt: skip
    return base


@triton.jit
def plus_base(values, base, BASE: tl.constexpr, BN: tl.constexpr):
    """values + base (BM, BN), in fp32. BASE says how the base is "added", or "multiplied".

    Multiplied with the unit matrix it is an operand of a product, which the compiler copies to
    shared memory steps ahead, and no layout is converted. In 16 bits each product is exact, but an
    infinity becomes NaN in all of a step's columns: for a residual without dropout, whose infinity
    the bottleneck spreads over the row anyway.
    """
    if BASE == "multiplied":
        n = tl.arange(0, BN)
        unit = (n[:, None] == n[None, :]).to(base.dtype)
        total = tl.dot(base, unit, values)
    else:
        tl.static_assert(BASE == "added", "unknown way to the base")
        total = values + base.to(tl.float32)
    return total


# Bytes of a bottleneck row up to which its products with B and A are made whole. Beyond, which is
# fp32 at R = 256, 32 columns at a time: an IEEE product holds both its operands in registers, and
# spilled 1,800 times.
LONGEST_ROW = tl.constexpr(512)


@triton.jit
def columns(x, first, WIDTH: tl.constexpr):
    """Columns first … first + WIDTH of a tile (BM, ·) in registers: all of them, or by shuffles."""
    part = x
    if x.shape[1] > WIDTH:
        index = tl.zeros([x.shape[0], 1], tl.int32) + (first + tl.arange(0, WIDTH))[None, :]
        part = tl.gather(x, index, 1)
    return part
