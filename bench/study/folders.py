"""Folders that are made once, whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fused_route.checks import shown


def made_once(folder: Path, last: str, fill: Callable[[Path], None]) -> Path:
    """A folder that `fill` has filled: made if it is not there, by one process at a time.

    What a killed process left is taken away by the next.

    Args:
        folder: its place.
        last: a file that it has when it is finished.
        fill: writes what belongs in it into the folder that it is given.

    Raises:
        ValueError: `folder` is there without `last`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and not (folder / last).is_file():
            raise ValueError(
                f"folder={shown(str(folder))} is there without {last}; accepted: one that is "
                "finished, or a name that nothing has yet"
            )
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
    return folder
