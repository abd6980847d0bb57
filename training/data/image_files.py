"""The image files that rows name: which are missing, and which cannot be read."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from fused_route.training.data.images import load_image
from fused_route.training.files import atomic_file, place

MISSING, UNREADABLE = "missing image", "unreadable image"
BATCH = 1024  # images, between two steps of the bar
Stamp = tuple[int, int]  # size and time of change of a file
NOWHERE: Stamp = -1, -1  # of a file that is not there
# Of broken images by name: what is wrong, with the file's stamp from before it was looked at, so
# that one mended meanwhile is looked at again.
Found = dict[str, tuple[str, Stamp]]


def listed(names: Sequence[str], folder: Path) -> Found:
    """`MISSING` for each name that is no file in the folder.

    Folders are listed, once each: to ask for every file takes seconds for COCO's 80,000 images,
    and minutes over a network.
    """
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[_parent(name)].append(name)
    missing = []
    for parent, within in by_folder.items():
        there = _files(folder / parent)
        missing += [name for name in within if name.rpartition("/")[2] not in there]
    return dict.fromkeys(missing, (MISSING, NOWHERE))


def decoded(names: Sequence[str], folder: Path) -> Found:
    """`MISSING` or `UNREADABLE` for each name that `load_image` cannot read.

    By threads: Pillow decodes without Python's lock, so that two read 640 × 480 JPEGs 1.8 times as
    fast as one; and they work where a process that has threads or a GPU must not fork.
    """
    bad = listed(names, folder)
    there = [name for name in names if name not in bad]

    def read(name: str) -> tuple[str, Stamp]:
        stamp = _stamp(folder / name)
        try:
            load_image(folder / name)
        except ValueError:
            return UNREADABLE, stamp
        return "", stamp

    silent = place()[0] != 0 or not there
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(there), desc="reading images", unit="image", disable=silent) as bar,
    ):
        for start in range(0, len(there), BATCH):
            batch = there[start : start + BATCH]
            looked = zip(batch, pool.map(read, batch), strict=True)
            bad |= {name: (why, stamp) for name, (why, stamp) in looked if why}
            bar.update(len(batch))
    return bad


CHECKS: dict[str, Callable[[Sequence[str], Path], Found]] = {
    "listed": listed,
    "decoded": decoded,
}


def broken_images(
    names: Callable[[], Sequence[str]], folder: Path, record: Path, check: str
) -> dict[str, str]:
    """What is wrong with images, by name; nothing of those that are sound.

    Args:
        names: gives the distinct names, relative to `folder`.
        record: file of what was found, used again while the folders that hold the images are as
            they were; broken images that changed since are looked at again. A sound one that is
            overwritten in place changes neither: whoever reads it finds out.
        check: one of `CHECKS`.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{record}.lock"):
        known = _recorded(record, folder)
        if known is None:
            given = names()
            # before the look, so that what changes meanwhile counts
            folders = {parent: _changed(folder / parent) for parent in set(map(_parent, given))}
            found: Found = {}
        else:
            folders, found = known
            given = [name for name, (_, stamp) in found.items() if _stamp(folder / name) != stamp]
        if given:
            looked = CHECKS[check](given, folder)
            found = {name: of for name, of in found.items() if name not in given} | looked
            with atomic_file(record) as file:
                file.write(json.dumps({"folders": folders, "broken": found}).encode())
    return {name: why for name, (why, _) in found.items()}


def absence(missing: Sequence[str], folder: Path, fixes: Mapping[str, str]) -> str:
    """What to say of missing images: the first, how many, what to do.

    Args:
        fixes: by the folder that an image is in or below, relative to `folder`.
    """
    fix = next((fixes[parent] for parent in _above(missing[0]) if parent in fixes), "put it there")
    number = "1 image is" if len(missing) == 1 else f"{len(missing)} images are"
    return f"{folder / missing[0]} does not exist, {number} missing: {fix}"


def _recorded(record: Path, folder: Path) -> tuple[dict[str, int], Found] | None:
    """(folders, what was found), None where that is not known or folders have changed."""
    try:
        held = json.loads(record.read_bytes())
        folders = dict(held["folders"])
        broken = {
            name: (str(why), (int(size), int(time)))
            for name, (why, (size, time)) in held["broken"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # or of an earlier form
    unchanged = all(_changed(folder / name) == time for name, time in folders.items())
    return (folders, broken) if unchanged else None


def _stamp(file: Path) -> Stamp:
    try:
        status = file.stat()
    except OSError:
        return NOWHERE
    return status.st_size, status.st_mtime_ns


def _changed(folder: Path) -> int:
    """When files were added to a folder or taken away, in ns; −1 where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _files(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as found:
            return {entry.name for entry in found if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _above(name: str) -> Iterator[str]:
    """The folders that a name is in, from the inside; "" is the last."""
    while name:
        name = _parent(name)
        yield name
