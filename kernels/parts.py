"""The parts that kernels are built from: tiles in, tiles out.

A program owns a block of BM rows of the hidden states, with all R bottleneck columns in registers,
padded to R_PAD, a power of two of at least 16. Shapes stand beside each tile. What is known when
a kernel is compiled is upper case; a pointer that is not given is None, and its code vanishes.

All arithmetic is fp32; operands of products are rounded to the dtype of the weights.
"""

import triton
import triton.language as tl


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
def relu(x):
    """max(x, 0) that keeps NaN, as torch.relu does and tl.maximum does not."""
    return tl.where(x < 0.0, 0.0, x)


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
