"""Launch Triton kernels without a GPU: the whole host path runs, on CPU tensors, and nothing else.

After `use_null_driver()` a launch compiles the kernel for the chip named, loads nothing and
launches nothing. That gives the host's cost of a launch, to be compared with that of the eager
operations it replaces, timed in the same process (an absolute time of a shared machine means
nothing), and the launches that a call makes. Not in a process with TRITON_INTERPRET=1.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.offline.ahead_of_time import AMD, NVIDIA


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]


_recordings: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches through the null driver in this block, in order."""
    launches: list[Launch] = []
    _recordings.append(launches)
    try:
        yield launches
    finally:
        # By identity: an outer recording that holds the same launches is equal.
        _recordings[:] = [other for other in _recordings if other is not launches]


class _Utils:
    """Stands for the driver's C module."""

    def __init__(self, shared: int, warp_size: int) -> None:
        self.properties = {
            "max_shared_mem": shared,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": warp_size,
        }

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, threads at most)."""
        return 1, 1, 32, 0, 1024

    def unload_module(self, *_: object) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return self.properties


class _Launcher:
    """Stands for what `CompiledKernel.run` is; called like it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, *_: object) -> None:
        for launches in _recordings:
            launches.append(Launch(self.name, (x, y, z)))


class NullDriver:
    """What Triton asks of a driver on the way to a launch."""

    launcher_cls = _Launcher

    def __init__(self, arch: int | str) -> None:
        if arch in AMD:
            self.target, shared = GPUTarget("hip", arch, 64), 65536
        else:
            assert isinstance(arch, int)
            self.target, shared = GPUTarget("cuda", arch, 32), (NVIDIA[arch].shared - 1) * 1024
        self.utils = _Utils(shared, self.target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    @staticmethod
    def is_active() -> bool:
        return True


def use_null_driver(arch: int | str = 90) -> None:
    """Makes the null driver of one chip that of this process. Before any launch, and once.

    Kernels keep what they compiled for the first chip.
    """
    driver.set_active(NullDriver(arch))


def microseconds(call: Callable[[], object], repeats: int = 3000, rounds: int = 7) -> float:
    """Host time of a call: the best round's mean, since interruptions only ever add."""
    for _ in range(max(1, repeats // 15)):
        call()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, time.perf_counter() - start)
    return best / repeats * 1e6
