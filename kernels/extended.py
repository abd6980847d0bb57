"""P3: the frozen layer's own product, whose sums also run over the bottleneck.

y = [x | z] [W | B]ᵀ: the update costs the product r/d more, and y is written once, not read and
written again. Backward, dx = [dy | dx_t] [W ; A] likewise.
"""

import triton
import triton.language as tl

from .parts import kept, wait_for_previous


@triton.jit
def product(
    a_ptr, b_ptr, acc, row, inside, n, n_inside,
    K: tl.constexpr, LDA: tl.constexpr, SBK: tl.constexpr, SBN: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc (BM, BN) + a b, for rows of a (·, K) that begin LDA apart and columns n of b (K, ·).

    b[k, n] is at k·SBK + n·SBN.
    """
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(
            a_ptr + row[:, None] * LDA + k[None, :],
            mask=inside[:, None] & (k < K)[None, :], other=0.0,
        )  # (BM, BK)  # fmt: skip
        b = tl.load(
            b_ptr + k[:, None] * SBK + n[None, :] * SBN,
            mask=(k < K)[:, None] & n_inside[None, :], other=0.0,
        )  # (BK, BN)  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def extended_product(
    wide_ptr, weight_ptr, bias_ptr, narrow_ptr, factor_ptr, out_ptr, seed_ptr,
    M, threshold, scale,
    K: tl.constexpr, N: tl.constexpr, OF: tl.constexpr, SEGMENTS: tl.constexpr,
    RANK: tl.constexpr, LDN: tl.constexpr, RANK_STEP: tl.constexpr,
    SWK: tl.constexpr, SWN: tl.constexpr, SFC: tl.constexpr, SFN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """out (M, OF·N) = wide (M, K) W + bias + scale · keep ∘ (narrow factor).

    The low-rank term is of segment SEGMENTS[i]'s N columns, from columns i·RANK … of narrow
    (rows of LDN) and rows i·N … of factor. It comes first: scale, which is s or dropout's
    1 / (1 − p), and dropout, which the backward pass has here, are of it alone. W[k, n] is at
    k·SWK + n·SWN, in whichever layout the frozen layer keeps it; factor[c, n] at c·SFC + n·SFN.

    Grid (blocks of BM rows × column tiles of BN,), columns fastest: a block of wide is read from
    memory once. Bytes: wide, narrow and out once; W and factor once a block of rows, from a cache.
    """
    wait_for_previous(WAIT, "first")
    TILES: tl.constexpr = (N + BN - 1) // BN
    block = tl.program_id(0) // (OF * TILES)
    tile = tl.program_id(0) % (OF * TILES)
    row = (block * BM + tl.arange(0, BM)).to(tl.int64)
    inside = row < M
    n = tile % TILES * BN + tl.arange(0, BN)
    n_inside = n < N
    segment = tile // TILES
    acc = tl.zeros([BM, BN], tl.float32)
    for i in tl.static_range(len(SEGMENTS)):
        if segment == SEGMENTS[i]:
            acc = product(
                narrow_ptr + i * RANK, factor_ptr + i * N * SFN, acc, row, inside, n, n_inside,
                RANK, LDN, SFC, SFN, PRECISION, RANK_STEP,
            )  # fmt: skip
    acc = acc * scale
    if seed_ptr is not None:
        acc = tl.where(kept(seed_ptr, row, tile * BN, threshold, 0, BM, BN), acc, 0.0)
    column = segment * N + n
    acc = product(
        wide_ptr, weight_ptr + segment * N * SWN, acc, row, inside, n, n_inside,
        K, K, SWK, SWN, PRECISION, BK,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * (OF * N) + column[None, :]
    tl.store(
        out_ptr + place, acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & n_inside[None, :],
    )  # fmt: skip
