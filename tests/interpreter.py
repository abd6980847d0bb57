"""Triton's interpreter (TRITON_INTERPRET=1): its bfloat16 and its truth values made right, its
traffic counted.

The interpreter holds bfloat16 as its bits in uint16 and computes with those integers. Without the
repair, dot, arithmetic, comparison, sum and conversion from integers give garbage without a word,
and float32 is cut off instead of rounded (triton 3.6 to 3.9). What a comparison gives is typed as
what it compares, so that a mask made of a scalar one becomes int32, which 3.9 refuses.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from types import TracebackType
from typing import Any, NamedTuple, Self
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)

LINE = 64  # bytes that DRAM delivers at least
NOBODY, SEVERAL = -1, -2  # beside the number of the one program that loaded or stored an element

Method = Callable[..., Any]


@cache
def repair() -> None:
    """Let InterpreterBuilder compute as GPUs do: bfloat16 in float32, each result rounded.

    What comparisons give is int1. Reductions and scans over bfloat16 raise: in what order a GPU
    rounds there is not defined.
    """
    for name in ("unary_op", "binary_op", "create_fma"):
        in_float32 = _widened(getattr(InterpreterBuilder, name))
        setattr(InterpreterBuilder, name, _true_or_false(_narrowed(in_float32)))
    InterpreterBuilder.create_dot = _widened(InterpreterBuilder.create_dot)
    InterpreterBuilder.cast_impl = _rounding_cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.get_bf16 = lambda self, value: _from_float32(np.array([value], np.float32))
    ReduceScanOpInterface.check_tensor = _refusing(ReduceScanOpInterface.check_tensor)


def _is_bfloat16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _to_float32(x: Any) -> Any:
    """The float32 handle of a bfloat16 one; anything else as it is."""
    if not _is_bfloat16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _from_float32(values: NDArray[np.float32]) -> Any:
    """The bfloat16 handle nearest to the values, ties to even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nearest = np.where(np.isnan(values), 0x7FC0, nearest)
    return TensorHandle(nearest.astype(np.uint16), tl.bfloat16)


def _widened(method: Method) -> Method:
    """The method, given the values of bfloat16 handles."""

    @wraps(method)
    def on_values(self: Any, *args: Any) -> Any:
        return method(self, *map(_to_float32, args))

    return on_values


def _narrowed(method: Method) -> Method:
    """The method with its result rounded where an operand is bfloat16."""

    @wraps(method)
    def with_rounding(self: Any, *args: Any) -> Any:
        result = method(self, *args)
        is_number = result.data.dtype == np.float32
        return _from_float32(result.data) if is_number and any(map(_is_bfloat16, args)) else result

    return with_rounding


def _true_or_false(method: Method) -> Method:
    """The method, whose truth values are typed as such."""

    @wraps(method)
    def with_type(self: Any, *args: Any) -> Any:
        result = method(self, *args)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    return with_type


def _rounding_cast(cast: Method) -> Method:
    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16:
            return _from_float32(source.data.astype(np.float32))
        return cast(self, source, to)

    return cast_impl


def _refusing(check: Method) -> Method:
    def check_tensor(self: Any, inputs: Any) -> None:
        check(self, inputs)
        if any(x.dtype == tl.bfloat16 for x in inputs):
            raise TypeError("a reduction or scan over bfloat16: convert it to float32 first")

    return check_tensor


class Moved(NamedTuple):
    """Bytes of one tensor that kernels move in one way."""

    requested: int  # by every program: at most this passes between L2 and the SMs
    distinct: int  # each byte once
    lines: int  # every 64-byte line touched, whole: at least this passes between DRAM and L2


class Traffic:
    """What kernels run in the interpreter move, multiply and launch, while this is open.

        with Traffic() as traffic:
            traffic.watch("x", x)
            kernel[grid](...)
        traffic.table()["x:ld"].distinct

    Attributes:
        launches: kernels launched.
        flops: 2 M N K for each tl.dot.
        atomics: elements updated atomically.
        loads_after_stores: names of watched tensors of which an element was, or could have been,
            loaded after the same launch had stored it. Programs run in any order, so the load of
            another program counts on either side of the store.
    """

    def __init__(self) -> None:
        self.watched: dict[str, _Watched] = {}
        self.reset()

    def watch(self, name: str, tensor: Tensor) -> None:
        """Attribute the elements of a CPU tensor, strided views included, to a name."""
        self.watched[name] = _Watched(tensor)

    def reset(self) -> None:
        """Forget what was counted, not what is watched."""
        self.launches, self.flops, self.atomics = 0, 0, 0
        self.loads_after_stores: set[str] = set()
        self._requested: dict[str, int] = defaultdict(int)
        self._touched: dict[str, list[NDArray[np.int64]]] = defaultdict(list)

    def table(self) -> dict[str, Moved]:
        """Bytes by "name:ld", "name:st" and "name:atomic"; what no name is watched for, too.

        That is under "unwatched"; memory which a later tensor took over counts once there.
        """
        found: dict[str, Moved] = {}
        for key, requested in sorted(self._requested.items()):
            touched = np.unique(np.concatenate(self._touched[key]))
            found[key] = Moved(requested, touched.size, LINE * np.unique(touched // LINE).size)
        return found

    def __enter__(self) -> Self:
        self._patches = ExitStack()
        self._before(GridExecutor, "__call__", lambda *_: self._launch())
        notes: dict[str, Method] = {
            "create_masked_load": lambda b, at, mask, *_: self._move("ld", b, at, mask),
            "create_masked_store": lambda b, at, value, mask, *_: self._move("st", b, at, mask),
            "create_atomic_rmw": lambda b, _, at, value, mask, *__: self._move(
                "atomic", b, at, mask
            ),
            "create_atomic_cas": lambda b, at, *_: self._move("atomic", b, at, None),
            "create_dot": lambda _, x, y, *__: self._multiply(x, y),
        }
        for method, note in notes.items():
            self._before(InterpreterBuilder, method, note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._patches.close()

    def _before(self, owner: Any, name: str, note: Method) -> None:
        original = getattr(owner, name)

        def noted(this: Any, *args: Any, **kwargs: Any) -> Any:
            note(this, *args)
            return original(this, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, noted))

    def _launch(self) -> None:
        self.launches += 1
        for watched in self.watched.values():
            watched.forget()

    def _multiply(self, a: Any, b: Any) -> None:
        self.flops += 2 * a.data.size * b.data.shape[-1]

    def _move(self, way: str, builder: Any, pointers: Any, mask: Any) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data.reshape(-1).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.asarray(mask.data).reshape(-1).astype(bool)]
        self.atomics += addresses.size if way == "atomic" else 0
        program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        unclaimed = np.ones(addresses.size, bool)
        for name, watched in self.watched.items():
            inside = watched.holds(addresses)
            unclaimed &= ~inside
            if inside.any():
                self._count(f"{name}:{way}", addresses[inside], width)
                if watched.follows_a_store(way, addresses[inside], program):
                    self.loads_after_stores.add(name)
        if unclaimed.any():
            self._count(f"unwatched:{way}", addresses[unclaimed], width)

    def _count(self, key: str, addresses: NDArray[np.int64], width: int) -> None:
        self._requested[key] += width * addresses.size
        self._touched[key].append((np.unique(addresses)[:, None] + np.arange(width)).reshape(-1))


class _Watched:
    """The addresses of a tensor's elements, and which program loaded or stored each."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # keeps its memory from going to another
        steps = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        span = sum(steps) + 1 if tensor.numel() else 0
        self.inside = np.zeros(span, bool)
        self.inside[torch.arange(span).as_strided(tensor.shape, tensor.stride()).numpy()] = True
        self.loaded_by, self.stored_by = np.empty((2, span), np.int64)
        self.forget()

    def forget(self) -> None:
        self.loaded_by[:] = self.stored_by[:] = NOBODY

    def _index(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        return (addresses - self.tensor.data_ptr()) // self.tensor.element_size()

    def holds(self, addresses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which addresses lie in the tensor's elements."""
        index = self._index(addresses)
        within = (index >= 0) & (index < self.inside.size)
        within[within] = self.inside[index[within]]
        return within

    def follows_a_store(self, way: str, addresses: NDArray[np.int64], program: int) -> bool:
        """Whether this move makes a load follow a store in some order of the programs."""
        index = self._index(addresses)
        loader = self.loaded_by[index]
        by_others = (loader != NOBODY) & (loader != program)
        if way == "ld":
            self.loaded_by[index] = np.where(by_others, SEVERAL, program)
            return bool((self.stored_by[index] != NOBODY).any())
        self.stored_by[index] = program
        return bool(by_others.any())
