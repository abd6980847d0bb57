"""The most bytes that are alive at once in a call; and the meta device as if it were a GPU.

    with LiveBytes(live) as memory:   # memory.peak
        call()

sees storages, which views share, on any device. `without_values` makes the meta device one that the
library's kernels and transformers run on: memory is allocated, given to launches and freed as on a
GPU, and nothing is computed.

What an operator takes inside of itself is not seen (workspaces of cuBLAS and of attention's
backward pass), nor what an allocator rounds up to.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_route import coverage, known, ops
from fused_route.kernels.launch import Launch


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made in this block and that still live.

    Args:
        live: tensors that exist anyway; they do not count.

    Attributes:
        now, peak: bytes alive at this moment, and the most so far.
    """

    def __init__(self, live: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = [tensor.untyped_storage() for tensor in live]
        self._seen = {storage._cdata for storage in self._before}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, freed).atexit = False


class _Answers(TorchDispatchMode):
    """Yes to what is asked of a meta tensor, which has no value to answer with.

    transformers asks whether the positions of a batch are those of one sequence a row.
    """

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As flash attention allocates and saves: q, k, v, the output and a number for each row.

    On the meta device torch would take the formula, with all scores. A GPU's saves besides only the
    state of the generator.
    """
    if attn_mask is not None or dropout_p or enable_gqa:
        raise NotImplementedError("counted without a mask, dropout and groups of heads alone")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return out


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As on a GPU, with a mask of bytes; elsewhere torch keeps one of x's dtype."""
    if p == 0.0 or not training:
        return x
    return torch.native_dropout(x, p, training)[0]


@contextmanager
def no_launches(major: int = 9) -> Iterator[None]:
    """Kernels run on every device, as far as their launches, which do nothing.

    Args:
        major: compute capability whose tiles decide the size of partial sums.
    """
    with (
        mock.patch.object(coverage, "device_obstacle", lambda device: None),
        mock.patch.object(ops, "major_of", lambda device: major),
        mock.patch.object(Launch, "__call__", lambda *given: None),
        mock.patch.dict(known._KNOWN, clear=True),
    ):
        yield


@contextmanager
def without_values(major: int = 9) -> Iterator[None]:
    """`no_launches`, and torch's operators on the meta device are those of a GPU."""
    with (
        no_launches(major),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(F, "dropout", _dropout),
        _Answers(),
    ):
        yield
