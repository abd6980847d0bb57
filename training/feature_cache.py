"""Features of a frozen vision tower, encoded once and read from disk instead of running it."""

import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fused_route.checks import one_of, shown, whole
from fused_route.training.encoders import Encoder, encoded
from fused_route.training.feature_shards import DTYPES, Shard, Unusable, Writer
from fused_route.training.files import FileDigests, place, set_aside

BROKEN = ("refuse", "skip")
# How far features computed twice may be apart, relative to their norm: 4 units in the last place
# of what computes or keeps them, and of TF32 (2⁻¹⁰), which GPUs take for convolutions in float32.
UNITS, LEAST_PRECISE = 4, 2.0**-10


@dataclass(frozen=True)
class Encoded:
    """What one process has done in `FeatureCache.encode`.

    Attributes:
        new: how many images it has encoded; the same contents count once.
        skipped: those of its paths that have no features.
    """

    new: int
    skipped: tuple[Path, ...]


@dataclass(frozen=True)
class Verified:
    """What `FeatureCache.verify` has found.

    Attributes:
        images, shards: what the cache holds, without what is damaged.
        damaged: shards that were set aside, their features not those that were written.
        compared: how many images were encoded again.
        furthest: the largest ‖again − kept‖ / ‖kept‖ among them.
        tolerance: what rounding explains of it.
    """

    images: int
    shards: int
    damaged: tuple[Path, ...]
    compared: int
    furthest: float
    tolerance: float

    @property
    def is_sound(self) -> bool:
        """Whether nothing was damaged, and all that was compared agrees."""
        return not self.damaged and self.furthest <= self.tolerance

    def __str__(self) -> str:
        """One line."""
        said = f"{self.images} images in {self.shards} shards as they were written"
        if self.damaged:
            said += f", {len(self.damaged)} damaged shards set aside: encode again"
        if self.compared:
            agree = "agree" if self.furthest <= self.tolerance else "DO NOT agree"
            said += (
                f"; {self.compared} encoded again {agree}: {self.furthest:.1e} apart, rounding "
                f"explains {self.tolerance:.1e}"
            )
        return said


class FeatureCache:
    """Features (Nv, width) of image files, in memory-mapped safetensors in the folder `folder/key`.

    An image is known by the contents of its file: it may be moved, or be there twice. Any number
    of processes may read and write at once. In float32 pooled features of a ViT-B take 3 kB an
    image, all its 197 tokens 605 kB: of the 123,287 images of COCO 0.4 and 75 GB; half of that in
    float16 and bfloat16.

    A cache can be sent to workers of a DataLoader, by fork and by spawn.

    Args:
        folder: may hold the caches of several encoders.
        key: of the encoder.
        width: of the features; None: whatever they have.

    Raises:
        ValueError: the folder is a file, a key that cannot name a folder, or whole shards that
            differ in shape.
    """

    def __init__(self, folder: Path, key: str, width: int | None = None) -> None:
        if not isinstance(key, str) or not re.fullmatch(r"[\w-][\w.-]{0,199}", key):
            raise ValueError(f"key must be the key of an encoder, got {shown(key)}")
        self.key, self.width = key, None if width is None else whole("width", width)
        self.folder = Path(folder) / key
        for path in (Path(folder), self.folder):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is a file where the feature cache has a folder")
        self._files = FileDigests(Path(folder))
        self._digests: dict[str, bytes] = {}  # by absolute path, of images that were asked for
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in vars(self).items() if n not in ("_shards", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        """Number of images with features; what other processes write is seen when it is needed."""
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(Nv, width); None while there are no features."""
        return tuple(self._shards[0].features.shape[1:]) if self._shards else None

    @property
    def dtypes(self) -> list[str]:
        """How features are kept, names of DTYPES; several where two processes were told so."""
        return _names({shard.features.dtype for shard in self._shards})

    def dtypes_of(self, paths: Sequence[Path]) -> list[str]:
        """How the features of these images are kept, of those that have any."""
        rows = (self._rows.get(seen) for seen in self._looked_at(paths) if isinstance(seen, bytes))
        return _names({self._shards[row[0]].features.dtype for row in rows if row is not None})

    def missing(self, paths: Sequence[Path], broken: str = "refuse") -> list[Path]:
        """Those of `paths` without features, as their files are now, in their order.

        Args:
            broken: "refuse" files that cannot be read; "skip": they have no features either.

        Raises:
            ValueError: one of them cannot be read.
        """
        one_of("broken", broken, BROKEN)
        digests = self._looked_at(paths)
        for digest in digests:
            if isinstance(digest, str) and broken == "refuse":
                raise ValueError(digest)
        return [p for p, digest in zip(paths, digests, strict=True) if digest not in self._rows]

    def encode(
        self,
        encoder: Encoder,
        paths: Sequence[Path],
        *,
        batch_size: int = 64,
        workers: int = 0,
        dtype: str | None = None,
        broken: str = "refuse",
    ) -> Encoded:
        """Encodes those of `paths` that are missing.

        Shards are written when they are full and when something goes wrong: a run that is killed
        loses one at most, and goes on from there when it is started again. Of processes that
        torchrun has started each takes its part of `paths`, so all have to call this with the same
        ones; who reads all of them afterwards has to wait for the others.

        Args:
            batch_size: images that the encoder takes at once.
            workers: processes that decode and preprocess beside this one; 0: this one does.
            dtype: in which features are kept: float32, float16 or bfloat16; None: as the cache
                keeps them, float32 in a new one.
            broken: what to do with a file that holds no readable image: "refuse", a ValueError
                that names it; "skip", a line in the end that says how many have no features.

        Raises:
            ValueError: another encoder than the cache's; features that are not finite, or not of
                the shape that the others have.
        """
        one_of("broken", broken, BROKEN)
        batch_size, workers = whole("batch_size", batch_size), whole("workers", workers, least=0)
        self._check(encoder)
        rank, world = place()
        mine = list(paths)[rank::world]
        digests = self._looked_at(mine)
        lines = [line for line in digests if isinstance(line, str)]
        if lines and broken == "refuse":
            raise ValueError(lines[0])
        files, new = self._to_encode(mine, digests), 0
        shape = self.shape or (None, self.width)
        writer = Writer(self.folder, self.key, self._dtype(dtype), shape)
        bar = tqdm(
            total=len(files), desc=f"encoding {len(files)} images", unit="image",
            disable=rank != 0 or not files,
        )  # fmt: skip
        with bar, self._flushed(writer):
            for batch in encoded(encoder, files, batch_size, workers):
                if batch.values is not None:
                    for path in writer.add(batch.files, batch.values):
                        self._add(path)
                lines += [line for _, line in batch.broken]
                if lines and broken == "refuse":
                    raise ValueError(lines[0])
                new += len(batch.files)
                bar.update(len(batch.files) + len(batch.broken))
        skipped = [path for path, d in zip(mine, digests, strict=True) if d not in self._rows]
        if skipped:
            print(f"{len(skipped)} of {len(mine)} images skipped: {lines[0]}", file=sys.stderr)
        return Encoded(new, tuple(skipped))

    @contextmanager
    def _flushed(self, writer: Writer) -> Iterator[None]:
        """Writes what is left at the end of a block, also where it raises."""
        try:
            yield
        finally:
            for path in writer.flush():
                self._add(path)

    def __getitem__(self, path: Path) -> Tensor:
        """Features (Nv, width) of an image; raises what `batch` does."""
        return self.batch([path])[0]

    def batch(self, paths: Sequence[Path]) -> Tensor:
        """Features (B, Nv, width) of images, a copy in the dtype in which they are kept.

        A file is looked at when it is first asked for, not again: `missing` and `encode` do.

        Raises:
            ValueError: no paths; one that cannot be read, or that has no features.
        """
        if not paths:
            raise ValueError("paths is empty: no features to read")
        names = [os.path.abspath(path) for path in paths]
        self._look_at_new(names)
        rows = [self._rows.get(self._digests[name]) for name in names]
        if None in rows:
            self._refresh()  # another process may have encoded it meanwhile
            rows = [self._rows.get(self._digests[name]) for name in names]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            raise ValueError(
                f"{paths[rows.index(None)]} has no features in {self.folder}: encode it with "
                "`fused-route encode`"
            )
        return self._read(found)

    def verify(
        self, encoder: Encoder | None = None, paths: Sequence[Path] | None = None, images: int = 8
    ) -> Verified:
        """Reads the whole cache and sets aside what is not as it was written.

        Args:
            encoder: the cache's, to encode some images again; None: none.
            paths: of images to choose from; None: all that are known here.
            images: how many of them, drawn anew at each call.

        Raises:
            ValueError: another encoder than the cache's.
        """
        images = whole("images", images, least=0)
        if encoder is not None:
            self._check(encoder)
        self._refresh()
        damaged = [shard for shard in self._shards if not shard.is_sound()]
        for shard in damaged:
            set_aside(shard.path, "has features that are not those it was written with")
        self._drop(damaged)
        compared, furthest, tolerance = 0, 0.0, 0.0
        for batch in () if encoder is None else encoded(encoder, self._drawn(paths, images), 8, 0):
            if batch.values is not None:  # None: the files are others by now
                kept = self._read([self._rows[digest] for _, digest in batch.files])
                compared += len(kept)
                furthest = max(furthest, _apart(batch.values.cpu(), kept))
                tolerance = max(tolerance, _explained(batch.values.dtype, kept.dtype))
        aside = tuple(shard.path for shard in damaged)
        return Verified(len(self), len(self._shards), aside, compared, furthest, tolerance)

    def _open(self) -> None:
        self._shards: list[Shard] = []
        self._seen: set[Path] = set()  # shards, and what was found to be none
        self._rows: dict[bytes, tuple[int, int]] = {}  # number of the shard, row in it
        self._refresh()

    def _refresh(self) -> None:
        """Maps the shards that have come since the last look."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._seen):
            try:
                self._add(path)
            except FileNotFoundError:
                continue  # set aside by another process
            except Unusable as error:
                set_aside(path, error.why)

    def _add(self, path: Path) -> None:
        self._seen.add(path)
        shard = Shard.opened(path, self.key, self.width)
        shape = tuple(shard.features.shape[1:])
        if self.shape not in (None, shape):
            raise ValueError(
                f"{path} has features {shape} of an image, {self._shards[0].path} "
                f"{self.shape}: move the wrong one out of the folder"
            )
        self._hold(shard)

    def _hold(self, shard: Shard) -> None:
        self._shards.append(shard)
        for row, digest in enumerate(shard.digests):
            self._rows.setdefault(digest, (len(self._shards) - 1, row))

    def _drop(self, damaged: Sequence[Shard]) -> None:
        sound = [shard for shard in self._shards if shard not in damaged]
        self._shards, self._rows = [], {}
        for shard in sound:
            self._hold(shard)

    def _looked_at(self, paths: Sequence[Path]) -> list[bytes | str]:
        """Digest of each file as it is now, or why it has none; and other processes' shards."""
        names = [os.path.abspath(path) for path in paths]
        digests = self._files.of(names)
        for name, digest in zip(names, digests, strict=True):
            if isinstance(digest, bytes):
                self._digests[name] = digest
        self._refresh()
        return digests

    def _look_at_new(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._digests]
        for name, digest in zip(new, self._files.of(new), strict=True):
            if isinstance(digest, str):
                raise ValueError(digest)
            self._digests[name] = digest

    def _to_encode(
        self, paths: Sequence[Path], digests: Sequence[bytes | str]
    ) -> list[tuple[Path, bytes]]:
        """The first path of each contents that has no features."""
        first: dict[bytes, Path] = {}
        for path, digest in zip(paths, digests, strict=True):
            if isinstance(digest, bytes) and digest not in self._rows:
                first.setdefault(digest, path)
        return [(path, digest) for digest, path in first.items()]

    def _check(self, encoder: Encoder) -> None:
        if encoder.key != self.key:
            raise ValueError(
                f"encoder has key={encoder.key!r}, the cache {self.key!r}: take "
                "FeatureCache(folder, encoder.key)"
            )

    def _dtype(self, dtype: str | None) -> str:
        """The name of the dtype in which features are kept."""
        held = self.dtypes
        if dtype is None:
            return held[0] if held else "float32"
        one_of("dtype", dtype, DTYPES)
        if held and dtype not in held:
            raise ValueError(
                f"dtype={dtype!r}, but {self.folder} keeps features in {held[0]}: give that, or "
                "another folder"
            )
        return dtype

    def _read(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Features (B, Nv, width) at (number of the shard, row in it); float32 of mixed dtypes."""
        # Row by row: of 512 images over 121 shards 0.8 ms, shard by shard 6 ms and more.
        return torch.stack([self._shards[number].features[row] for number, row in rows])

    def _drawn(self, paths: Sequence[Path] | None, images: int) -> list[tuple[Path, bytes]]:
        """Image files with features, drawn without a seed of ours or of the caller's."""
        if paths is None:
            names = list(self._files.known() | self._digests)
        else:
            self._looked_at(paths)
            names = [os.path.abspath(path) for path in paths]
        known = self._files.known() | self._digests
        files = [(Path(name), known[name]) for name in names if known.get(name) in self._rows]
        return random.Random().sample(files, min(images, len(files)))


def _names(held: set[torch.dtype]) -> list[str]:
    return [name for name, dtype in DTYPES.items() if dtype in held]


def _apart(again: Tensor, kept: Tensor) -> float:
    """The largest ‖again − kept‖ / ‖kept‖ among images (B, Nv, width); NaN counts as infinite."""
    again, kept = again.double().flatten(1), kept.double().flatten(1)
    norms = kept.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((again - kept).norm(dim=1) / norms).nan_to_num(nan=torch.inf).max())


def _explained(*dtypes: torch.dtype) -> float:
    return UNITS * max(LEAST_PRECISE, *(torch.finfo(dtype).eps for dtype in dtypes))
