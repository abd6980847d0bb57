"""Gradients of what the image became: of vector operands (and through them x_r), and of K."""

import triton
import triton.language as tl

from .backward import down_backward
from .mixes import relu
from .parts import rows_of_sample, wait_for_previous


@triton.jit
def pairs_of(offsets_ptr, sample, inside, T, ROW_BLOCK: tl.constexpr):
    """The first pair of each sample, as `backward.sum_by_sample` counts them, and how many it has.

    ROW_BLOCK is the BM of the kernel that wrote them.
    """
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + sample, mask=inside, other=0).to(tl.int32)
        stop = tl.load(offsets_ptr + sample + 1, mask=inside, other=0).to(tl.int32)
    else:
        start, stop = sample * T, sample * T + T
    first = start // ROW_BLOCK
    count = tl.where(inside & (stop > start), (stop - 1) // ROW_BLOCK - first + 1, 0)
    return (first + sample).to(tl.int64), count


@triton.jit
def sample_sums(
    partial_ptr, offsets_ptr, sample, inside, first_pair, T,
    R: tl.constexpr, R_PAD: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ of each sample's partial sums (·, R), in the order of the row blocks: (BM, R_PAD) in fp32.

    They begin at row first_pair of `partial`.
    """
    c = tl.arange(0, R_PAD)
    pair, count = pairs_of(offsets_ptr, sample, inside, T, ROW_BLOCK)
    pair += first_pair
    acc = tl.zeros([sample.shape[0], R_PAD], tl.float32)
    for i in range(0, tl.max(count, 0)):
        mask = (i < count)[:, None] & (c < R)[None, :]
        acc += tl.load(partial_ptr + (pair + i)[:, None] * R + c[None, :], mask=mask, other=0.0)
    return acc


@triton.jit
def sums_of_one(
    partial_ptr, offsets_ptr, sample, first_pair, T,
    R: tl.constexpr, R_PAD: tl.constexpr, ROW_BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """`sample_sums` of one sample that has many partial sums, PAIRS of them at once: (R_PAD,)."""
    c = tl.arange(0, R_PAD)
    pair, count = pairs_of(offsets_ptr, sample, sample >= 0, T, ROW_BLOCK)
    pair += first_pair
    acc = tl.zeros([PAIRS, R_PAD], tl.float32)
    for i0 in range(0, count, PAIRS):
        i = i0 + tl.arange(0, PAIRS)
        mask = (i < count)[:, None] & (c < R)[None, :]
        acc += tl.load(partial_ptr + (pair + i)[:, None] * R + c[None, :], mask=mask, other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["T", "pairs", "S", "threshold"])
def vector_gradient(
    partial_ptr, out_ptr, A_ptr, dx_r_ptr, seed_ptr, offsets_ptr, S, T, pairs, threshold,
    keep_scale,
    D: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, ROW_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """out (·, S, R): Σ of each sample's partial sums (·, pairs, R), as of `sample_sums`.

    Where dx_r_ptr is given also dx_r (S, D) = keep ∘ (out A) / (1 − p): out is then dx_v.
    Grid (blocks of BM samples, operands); where PAIRS is more than 1 (samples, operands): a program
    has one sample, whose partial sums it reads so many at once, in the first of BM rows.
    """
    wait_for_previous(WAIT, "first")
    which = tl.program_id(1)
    c = tl.arange(0, R_PAD)
    first_pair = which.to(tl.int64) * pairs
    if PAIRS == 1:
        sample = tl.program_id(0) * BM + tl.arange(0, BM)
        inside = sample < S
        acc = sample_sums(
            partial_ptr, offsets_ptr, sample, inside, first_pair, T, R, R_PAD, ROW_BLOCK
        )  # fmt: skip
    else:
        sample = tl.program_id(0) + tl.zeros([BM], tl.int32)
        inside = tl.arange(0, BM) == 0
        acc = sums_of_one(
            partial_ptr, offsets_ptr, tl.program_id(0), first_pair, T, R, R_PAD, ROW_BLOCK, PAIRS
        )[None, :] + tl.zeros([BM, R_PAD], tl.float32)  # fmt: skip
    row = sample.to(tl.int64)
    rounded = acc.to(out_ptr.dtype.element_ty)
    place = (row + which.to(tl.int64) * S)[:, None] * R + c[None, :]
    tl.store(out_ptr + place, rounded, mask=inside[:, None] & (c < R)[None, :])
    if dx_r_ptr is not None:
        down_backward(
            rounded, A_ptr, None, dx_r_ptr, seed_ptr, row, inside, threshold, keep_scale,
            D, R, R_PAD, 1, "added", PRECISION, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "rows_per_split", "splits"])
def matrix_gradient(
    x_t_ptr, dz_ptr, dK_ptr, row_sample_ptr, offsets_ptr, T, rows_per_split, splits,
    G: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """dK (splits, S, G, C, C) = Σ over a split of a sample's rows of first(x_t)ᵀ dz, from x_t and
    dz (M, R).

    Grid (S · splits, G, tiles of BN × BN of the C × C). Rows that are not routed count for nothing.
    """
    wait_for_previous(WAIT, "first")
    C: tl.constexpr = R // G
    TILES: tl.constexpr = tl.cdiv(C, BN)
    b, g, tile = tl.program_id(0) // splits, tl.program_id(1), tl.program_id(2)
    split, S = tl.program_id(0) % splits, tl.num_programs(0) // splits
    i = tile // TILES * BN + tl.arange(0, BN)
    j = tile % TILES * BN + tl.arange(0, BN)
    start, stop = rows_of_sample(offsets_ptr, b, T)
    start += tl.minimum(split * rows_per_split, stop - start)
    stop = start + tl.minimum(rows_per_split, stop - start)
    acc = tl.zeros([BN, BN], tl.float32)
    STAGES: tl.constexpr = 1 if PRECISION == "tf32" else None  # as in K3, for 16-byte loads
    for m0 in tl.range(start, stop, BM, num_stages=STAGES):
        m = m0 + tl.arange(0, BM)
        routed = m < stop
        if row_sample_ptr is not None:
            routed = tl.load(row_sample_ptr + m, mask=routed, other=-1) >= 0
        row = m.to(tl.int64)
        mask = routed[:, None] & (i < C)[None, :]
        x = tl.load(x_t_ptr + row[:, None] * R + (g * C + i)[None, :], mask=mask, other=0.0)
        if FIRST == "relu":
            x = relu(x.to(tl.float32)).to(x_t_ptr.dtype.element_ty)
        mask = routed[:, None] & (j < C)[None, :]
        dz = tl.load(dz_ptr + row[:, None] * R + (g * C + j)[None, :], mask=mask, other=0.0)
        acc = tl.dot(tl.trans(x), dz, acc, input_precision=PRECISION)
    place = ((split.to(tl.int64) * S + b) * G + g) * C * C + i[:, None] * C + j[None, :]
    mask = (i < C)[:, None] & (j < C)[None, :]
    tl.store(dK_ptr + place, acc.to(dK_ptr.dtype.element_ty), mask=mask)
