"""Dropout by counter: the mask of an element follows from a seed and its place, and nothing else.

The kernels draw it anew in every pass instead of storing it. `keep_mask` is the same function in
torch, for the oracle.
"""

import torch
from torch import Tensor

STREAMS = {"x_h": 0, "x_r": 1}
LEVELS = 1 << 16

_LOW = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """An element is kept where its 16 bits are at least this: p in steps of 2⁻¹⁶, never all."""
    return min(round(p * LEVELS), LEVELS - 1)


def draw_seed(device: torch.device) -> Tensor:
    """A seed (1,) int64 from torch's generator of the device, kept there: no synchronisation."""
    return torch.randint(0, 1 << 62, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, stream: str = "x_h") -> Tensor:
    """True where an element survives dropout with probability p: bool, of `shape` (…, d).

    The bits of row m (of all rows, flattened) and column k are 16 of the 128 that Philox-4x32-10
    gives for key `seed` and counter (k // 8, m, stream, 0): half h of word 2j + i for k mod 8 =
    4i + 2j + h.

    Args:
        seed: (1,) int64.
        stream: "x_h" or "x_r": an independent mask for each input of A.
    """
    *rows, d = shape
    M = int(torch.Size(rows).numel())
    group = torch.arange((d + 7) // 8, device=seed.device).expand(M, -1)
    row = torch.arange(M, device=seed.device)[:, None].expand_as(group)
    zero = torch.zeros_like(group)
    words = _philox(seed, (group, row, zero + STREAMS[stream], zero))
    word = torch.stack([words[2 * j + i] for i in (0, 1) for j in (0, 1)], -1)  # (M, ·, 4)
    bits = torch.stack([word & 0xFFFF, word >> 16], -1).flatten(1)
    return (bits[:, :d] >= threshold(p)).reshape(shape)


def _philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox-4x32 with 10 rounds (Salmon et al., SC 2011) in int64 arithmetic."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _product(_ROUND[0], c0)
        high1, low1 = _product(_ROUND[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY[0]) & _LOW, (k1 + _KEY[1]) & _LOW
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a · b, both below 2³²: the 64-bit product would overflow int64."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
