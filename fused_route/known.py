"""What earlier calls were found to be: checking a call costs the host more than launching it."""

from typing import Any

import torch
from torch import Tensor

from .checks import autocasts
from .coverage import is_long, takes_derivatives
from .fused import Prepared, product_dtype, products
from .reference import Dropout
from .routing_input import RoutingInput

# Emptied when full, which batches of ever new lengths bring about.
MOST = 4096
# Settings that hold memory, or equal, by their address, what they must not: never remembered.
UNSIGNED = (Dropout, Tensor)
_KNOWN: dict[Any, Prepared] = {}


def signature(
    tensors: tuple[Tensor | None, ...], given: RoutingInput | None, settings: tuple[Any, ...]
) -> Any:
    """All that decides whether a call is sound and how it runs; None where nothing is kept.

    Nothing is while a compiler traces, which keeps what it found itself, under torch.func and in
    forward mode, nor of masks for dropout, which hold memory. What is not of the types it should be
    gets no signature, but its checks.
    """
    if torch.compiler.is_compiling() or takes_derivatives():
        return None
    try:
        device: torch.device = tensors[0].device  # type: ignore[union-attr]
        casts = autocasts(device)
        dtype = product_dtype(tensors[0]) if casts else tensors[0].dtype  # type: ignore[union-attr,arg-type]
        key: list[Any] = [settings, casts, dtype]
        if dtype is torch.float32:
            key.append(products(dtype, device))
        for t in tensors:
            if t is None:
                key.append(None)
            else:
                key += t.__class__, t.shape, t.dtype, t.device
        if given is not None:
            x_r, index = given.x_r, given.sample_index
            rows = None if index is None else (index.shape, is_long(given))
            key += x_r.__class__, x_r.shape, x_r.dtype, x_r.device, given.mask is None, rows
            if given.x_v is not None:
                x_v = given.x_v
                key += x_v.__class__, x_v.shape, x_v.dtype, x_v.device
            if given.operand is not None:
                key.append(given.operand.mix)
                for t in given.operand.tensors:
                    key += t.__class__, t.shape, t.dtype, t.device
        signature = tuple(key)
        hash(signature)
    except (AttributeError, RuntimeError, TypeError):  # the second: a nested tensor has no shape
        return None
    return signature


def prepared(signature: Any) -> Prepared | None:
    """What a call with this signature was found to be, if there was one."""
    return None if signature is None else _KNOWN.get(signature)


def remember(signature: Any, prepared: Prepared) -> None:
    """Keeps what a sound call was found to be."""
    if signature is None or any(isinstance(value, UNSIGNED) for value in signature[0]):
        return
    if len(_KNOWN) >= MOST:
        _KNOWN.clear()
    _KNOWN[signature] = prepared
