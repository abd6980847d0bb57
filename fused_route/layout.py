"""How tensors lie in memory, and how kernels read them."""

import torch
from torch import Tensor


def layout_of(weight: Tensor) -> str | None:
    """How a weight (o, d) lies in memory, for P3: its "rows" or its "columns" whole; None: else.

    None too where loads of 16 bytes or offsets of 32 bits do not reach all of it.
    """
    if weight.data_ptr() & 15 or weight.numel() >> 31:
        return None
    if weight.is_contiguous():
        return "rows"
    return "columns" if weight.mT.is_contiguous() else None


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous, at an address that loads of 16 bytes take."""
    return tensor.is_contiguous() and not tensor.data_ptr() & 15


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is not readable."""
    if is_readable(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
