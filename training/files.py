"""Files: written whole or not at all, set aside, never deleted, known again by their contents."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO
from uuid import uuid4

from tqdm import tqdm

PARTIAL = ".partial"  # ends the names of files that are not whole
FORMAT = 1  # of the files that remember digests
# A file as young as this may change again within one tick of its file system's clock, 2 s on FAT
# and up to that over networks: its digest is not remembered for another process.
YOUNG = 2_000_000_000
BLOCK = 64  # files a thread takes at a time: a task costs 30 µs, to look at a file 2 µs
SHOWN = 1024  # files: fewer have no bar
SAVED_EVERY = 16_384  # files: what a killed process has to read again

Stamp = tuple[int, int, int]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and vanishes if the block raises.

    Makes the folder. Whoever reads `path` sees the old contents or the new ones, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:32]}-{uuid4().hex}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def set_aside(path: Path, why: str) -> None:
    """Adds `.damaged` to the name of a file that cannot be used; says so on standard error.

    Another process may have done it already; where files may not be renamed it stays as it is.
    """
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        aside = path.with_name(f"{path.name}-{uuid4().hex[:8]}.damaged")
    said = f"set aside as {aside.name}"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        said = f"ignored, and not set aside: {error.strerror}"
    print(f"{path} {' '.join(why.split())}; {said}", file=sys.stderr)


def place() -> tuple[int, int]:
    """(rank, number) of this process among those that torchrun started; (0, 1) for one alone.

    Raises:
        ValueError: the variables RANK and WORLD_SIZE are no such numbers.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} must be whole numbers, RANK from 0 to "
            "WORLD_SIZE − 1: set both, as torchrun does, or neither"
        )
    return int(rank), int(world)


def content_digest(path: str | Path) -> bytes:
    """SHA-256 of a file's contents, 32 bytes; OSError where it cannot be read."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


class FileDigests:
    """SHA-256 of files, remembered by path, size and times of change in `folder`/files.*.json.

    So a start looks at files (2 µs each) rather than reading them. Besides the time of the last
    change of contents (mtime), which a copy may keep, the time of the last change of anything
    (ctime) counts, which nobody can set: contents that were replaced by others of the same size
    and mtime are read again. So are files whose times are younger than two seconds.

    Each process writes a file of its own, with what it had read from others', and removes those:
    a set of files that are each complete needs no lock, which over network file systems cannot be
    relied on (SQLite's write-ahead log does not work there at all). What two processes lose to
    each other is read again, no more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[Stamp, bytes]] | None = None
        self._merged: set[Path] = set()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_known": None, "_merged": set()}

    def known(self) -> dict[str, bytes]:
        """Digests by absolute path, as remembered: the files may be others by now."""
        return {path: digest for path, (_, digest) in self._remembered().items()}

    def of(self, paths: Sequence[str]) -> list[bytes | str]:
        """For each absolute path its digest, 32 bytes, or the line that says why it has none."""
        self._remembered()  # before threads ask for it
        found: dict[str, bytes | str] = {}
        distinct = list(dict.fromkeys(paths))
        rank, _ = place()
        with (
            tqdm(
                total=len(distinct), desc="reading files", unit="file", delay=2, leave=False,
                disable=rank != 0 or len(distinct) < SHOWN,
            ) as bar,
            ThreadPoolExecutor() as pool,
        ):  # fmt: skip
            for start in range(0, len(distinct), SAVED_EVERY):
                part = distinct[start : start + SAVED_EVERY]
                blocks = [part[i : i + BLOCK] for i in range(0, len(part), BLOCK)]
                new: dict[str, tuple[Stamp, bytes]] = {}
                for block, digests in zip(blocks, pool.map(self._read, blocks), strict=True):
                    for path, (stamp, digest) in zip(block, digests, strict=True):
                        found[path] = digest
                        if stamp is not None and isinstance(digest, bytes):
                            new[path] = stamp, digest
                    bar.update(len(block))
                self._save(new)
        return [found[path] for path in paths]

    def _read(self, paths: Sequence[str]) -> list[tuple[Stamp | None, bytes | str]]:
        """Each file's digest, with its stamp where it is new and worth remembering."""
        remembered = self._remembered()
        read: list[tuple[Stamp | None, bytes | str]] = []
        for path in paths:
            now = time.time_ns()
            try:
                status = os.stat(path)
                if not S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    raise OSError("it is no file")
                stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                before, digest = remembered.get(path, (None, b""))
                if before == stamp:
                    read.append((None, digest))
                    continue
                is_young = now - max(stamp[1:]) < YOUNG
                read.append((None if is_young else stamp, content_digest(path)))
            except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
                why = getattr(error, "strerror", None) or str(error)
                read.append((None, f"{path} cannot be read: {why}"))
        return read

    def _remembered(self) -> dict[str, tuple[Stamp, bytes]]:
        if self._known is None:
            known: dict[str, tuple[Stamp, bytes]] = {}
            for file in sorted(self.folder.glob("files.*.json")):
                try:
                    known |= _parsed(file.read_bytes())
                except FileNotFoundError:
                    continue  # merged into another meanwhile
                except (OSError, ValueError, TypeError, KeyError, AttributeError):
                    set_aside(file, f"holds no digests of files in format {FORMAT}")
                    continue
                self._merged.add(file)
            self._known = known
        return self._known

    def _save(self, new: dict[str, tuple[Stamp, bytes]]) -> None:
        if not new:
            return
        remembered = self._remembered()
        remembered |= new
        files = {path: [*stamp, digest.hex()] for path, (stamp, digest) in remembered.items()}
        path = self.folder / f"files.{uuid4().hex}.json"
        try:
            with atomic_file(path) as file:
                file.write(json.dumps({"format": FORMAT, "files": files}).encode())
            for merged in self._merged:
                merged.unlink(missing_ok=True)
            self._merged = {path}
        except OSError as error:
            print(
                f"{self.folder} cannot be written, so images are read again at the next start: "
                f"{error.strerror}",
                file=sys.stderr,
            )


def _parsed(text: bytes) -> dict[str, tuple[Stamp, bytes]]:
    """What a file of digests holds; ValueError and the like where it holds something else."""
    held = json.loads(text)
    if held["format"] != FORMAT:
        raise ValueError(f"format {held['format']}")
    known: dict[str, tuple[Stamp, bytes]] = {}
    for path, (size, mtime, ctime, digest) in held["files"].items():
        known[path] = (int(size), int(mtime), int(ctime)), bytes.fromhex(digest)
    return known
