"""Kernels for the tests of the tools in bench/: each does one thing that a tool must see."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself and knows none for tiles.

import triton
import triton.language as tl

from fused_route.kernels.parts import kept


@triton.jit
def product(x, w, bias, y, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """y (M, N) = x (M, K) wᵀ + bias, BM rows a program: matrix instructions and wide loads."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns, inner = tl.arange(0, N), tl.arange(0, BK)
    inside = (rows < M)[:, None]
    total = tl.zeros((BM, N), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(x + rows[:, None] * K + (k + inner)[None, :], mask=inside, other=0.0)
        b = tl.load(w + columns[None, :] * K + (k + inner)[:, None])
        total = tl.dot(a, b, total)
    if bias is not None:
        total += tl.load(bias + columns)[None, :]
    tl.store(y + rows[:, None] * N + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_up(x, y, M, BLOCK: tl.constexpr):
    """y (BLOCK,) += x (M,), block by block: an atomic."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + column
    tl.atomic_add(y + column, tl.load(x + row, mask=row < M, other=0.0), sem="relaxed")


@triton.jit
def every_other(x, y, M, BLOCK: tl.constexpr):
    """y (M,) = x[::2]: narrow loads."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row, tl.load(x + 2 * row, mask=row < M), mask=row < M)


@triton.jit
def store_mask(seed_ptr, out_ptr, threshold, D, BM: tl.constexpr, BK: tl.constexpr):
    """out (·, D) bool = which elements dropout keeps, drawn as kernels draw them, stream 1."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    keep = kept(seed_ptr, row, tl.program_id(1) * BK, threshold, 1, BM, BK)
    tl.store(out_ptr + row[:, None] * D + k[None, :], keep)


@triton.jit
def waits_in_its_loop(x, w, y, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """y (BM, BM) = x (BM, K) wᵀ (BM, K), waiting for the kernel before it in every step."""
    rows, inner = tl.arange(0, BM), tl.arange(0, BK)
    total = tl.zeros((BM, BM), tl.float32)
    for k in range(0, K, BK):
        tl.extra.cuda.gdc_wait()
        a = tl.load(x + rows[:, None] * K + (k + inner)[None, :])
        b = tl.load(w + rows[None, :] * K + (k + inner)[:, None])
        total = tl.dot(a, b, total)
    tl.store(y + rows[:, None] * BM + rows[None, :], total.to(y.dtype.element_ty))
