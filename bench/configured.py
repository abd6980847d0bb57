"""The library with other entries in the table of its tuning, for trials and for tests."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

from fused_route import known, ops
from fused_route.kernels import config


@contextmanager
def configured(**entries: Any) -> Iterator[None]:
    """Within it names of `fused_route.kernels.config` mean these, and plans are made anew.

    Plans hold tiles and grids; those of outside stay as they were.
    """
    with (
        mock.patch.multiple(config, **entries) if entries else nullcontext(),
        mock.patch.object(ops, "_plan", cache(ops._plan.__wrapped__)),
        mock.patch.object(known, "_KNOWN", {}),
    ):
        yield


def wherever_it_can(major: int | None) -> bool:
    """In place of `config.overlaps`: kernels start early on every GPU that has it.

    The gates compile that for compute capability 9 and 10 (docs/decisions.md, 58).
    """
    return major is not None and major >= 9


def along_with_few_rows(major: int | None, size: int, many: bool) -> str:
    """In place of `config.image`: K1 makes x_v in 16 bits wherever rows are few, on any GPU.

    The gates compile that for compute capability 9 (docs/decisions.md, 54).
    """
    return "along" if size == 2 and not many else "apart"
