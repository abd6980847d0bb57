"""Launching a kernel again at the cost of a dictionary look-up.

`kernel[grid](…)` inspects, binds and hashes every argument on every call: 10 to 15 µs of Python for
a kernel of 20 arguments, more than it runs at small sizes. A `Launch` is one kernel with all its
constants; it keeps what Triton compiled and calls that with plain integers: about 2 µs.
"""

from collections.abc import Callable, Hashable
from typing import Any

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .config import Tile, compiler_options


class Launch:
    """A kernel with its constants and the dtypes of its pointers; any pointer may be absent.

    Args:
        kernel: a jitted function whose parameters are pointers, then numbers, then constants.
        tile: warps, stages and registers.
        constants: values of the constants, in the order of the signature.
    """

    def __init__(self, kernel: Any, tile: Tile, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.constants = constants
        self.tile = tile
        self._is_compiled = isinstance(kernel, JITFunction)  # not so in the interpreter
        self._again: dict[tuple[int, Hashable], Callable[..., None]] = {}

    def __call__(
        self,
        absent: Hashable,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        numbers: tuple[Any, ...],
    ) -> None:
        """Launches on the current device and stream.

        Args:
            absent: which pointers are None, said in any way that tells the cases apart.
            tensors: all at multiples of 16 bytes.
        """
        if not self._is_compiled:
            if 0 not in grid:
                self.kernel[grid](*tensors, *numbers, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        again = self._again.get((device, absent))
        if again is None:
            again = self._again[device, absent] = self._compile(tensors, numbers)
        again(grid, active.get_current_stream(device), tensors, numbers)

    def _compile(self, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Callable[..., None]:
        """Compiles for these types; returns how to launch the result.

        On AMD code also depends on whether a tensor is larger than 2 GB: there Triton decides anew
        in every call, as it does where its internals are not those we know.
        """
        backend = driver.active.get_current_target().backend
        options = compiler_options(self.tile, backend, self.constants["WAIT"])
        chosen = {**self.constants, **options}

        def slowly(grid: Any, stream: int, tensors: Any, numbers: Any) -> None:
            self.kernel[grid](*tensors, *numbers, **chosen)

        if backend != "cuda":
            return slowly
        types = [None if tensor is None else tensor.dtype for tensor in tensors]
        compiled = self.kernel.warmup(*types, *numbers, grid=(1,), **chosen)
        try:
            run, packed = compiled.run, compiled.packed_metadata  # run loads: before function
            function = compiled.function
        except AttributeError:
            return slowly
        rest = (None,) * len(self.constants)  # Triton 3.6 wants a place for each constant

        def again(grid: Any, stream: int, tensors: Any, numbers: Any) -> None:
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            run(*grid, stream, function, packed, None, None, None, *addresses, *numbers, *rest)

        return again
