"""Count the kernels that a call would launch on a GPU, and the bytes it saves for backward.

    count(lambda: op(x).backward(dy))   # Launches(aten=('mm', …), kernels=('forward', …))
    saved_bytes(lambda: op(x), exclude=[x, *parameters])

Runs on CPU tensors: aten operations are seen by a dispatch mode, Triton kernels by the null driver
(`null_driver.use_null_driver()`) or in Triton's interpreter (TRITON_INTERPRET=1). On a real driver
of Triton's kernels the library's own are seen.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Operations that launch nothing although their schema does not say so. Views do say so.
WITHOUT_KERNEL = {
    # memory without values
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
    # views that hide it from autograd
    "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
    # the same memory under another shape, in place
    "as_strided_", "detach_", "resize_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_",
    "transpose_", "unsqueeze_",
    # questions to the host
    "_has_compatible_shallow_copy_type", "is_pinned", "is_same_size", "record_stream", "sym_numel",
    "sym_size", "sym_storage_offset", "sym_stride",
}  # fmt: skip


@dataclass(frozen=True)
class Launches:
    """Names of what was launched, in order: aten operations and Triton kernels."""

    aten: tuple[str, ...]
    kernels: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        return {"aten": len(self.aten), "kernels": len(self.kernels)}


class _Aten(TorchDispatchMode):
    """Notes the aten operations of a block, those of the backward pass included.

    Autograd runs the backward of CPU tensors in the calling thread; for other devices it carries
    the modes of the caller to its threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            # An operation of torch.library: what counts is what its implementation does, and
            # modes are off in here unless turned on again.
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **kwargs)
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in WITHOUT_KERNEL:
            self.names.append(name)
        return func(*args, **kwargs)


@contextmanager
def _triton() -> Iterator[list[str]]:
    """The Triton kernels launched in this block."""
    names: list[str] = []
    if importlib.util.find_spec("triton") is None:
        yield names
    elif os.environ.get("TRITON_INTERPRET") == "1":
        with _interpreted(names):
            yield names
    elif torch.cuda.is_available():
        with _launched(names):
            yield names
    else:
        from bench.offline import null_driver

        with null_driver.recorded() as recording:
            yield names
        names.extend(launch.kernel for launch in recording)


@contextmanager
def _launched(names: list[str]) -> Iterator[None]:
    """Adds the kernels that the library launches in this block to `names`."""
    from fused_route.kernels.launch import Launch

    launch = Launch.__call__

    def noted(self: Launch, *args: Any) -> None:
        names.append(self.kernel.fn.__name__)
        launch(self, *args)

    with mock.patch.object(Launch, "__call__", noted):
        yield


@contextmanager
def _interpreted(names: list[str]) -> Iterator[None]:
    """Adds the kernels that Triton's interpreter runs in this block to `names`."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter copies its arguments by aten operations
            return run(self, *args, **kwargs)

    GridExecutor.__call__ = noted
    try:
        yield
    finally:
        GridExecutor.__call__ = run


def count(call: Callable[[], object]) -> Launches:
    """What `call` would launch on a GPU. An aten operation counts once, whatever it is made of."""
    with _triton() as kernels, _Aten() as aten:
        call()
    return Launches(tuple(aten.names), tuple(kernels))


class Saved(NamedTuple):
    """Bytes saved for the backward pass: by the given layers alone, and by anything else too."""

    layers: int
    rest: int


def saved_bytes(call: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of memory that the forward in `call` keeps alive for its backward: `saved` in all."""
    return sum(saved(call, exclude))


def saved(
    call: Callable[[], object], exclude: Iterable[Tensor] = (), layers: Iterable[nn.Module] = ()
) -> Saved:
    """Bytes of memory that the forward in `call` keeps alive for its backward, by whom.

    A storage counts once and whole, also where only a view of it is saved; those of `exclude`,
    which live anyway, do not count. Sees what autograd saves (`ctx.save_for_backward` included)
    and not tensors set as attributes of a ctx.
    """
    others = [tensor.untyped_storage() for tensor in exclude]
    known = {storage._cdata for storage in others}
    found: dict[int, torch.UntypedStorage] = {}  # holding them keeps their identities from reuse
    by_rest: set[int] = set()
    inside: list[object] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage
            if not inside:
                by_rest.add(storage._cdata)
        return tensor

    with ExitStack() as watched:
        for layer in layers:
            enter = layer.register_forward_pre_hook(lambda *_: inside.append(None))
            leave = layer.register_forward_hook(lambda *_: inside.pop())
            watched.callback(enter.remove)
            watched.callback(leave.remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call()
    del result
    rest = sum(found[key].nbytes() for key in by_rest)
    return Saved(sum(storage.nbytes() for storage in found.values()) - rest, rest)
