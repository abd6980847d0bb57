"""Image features, encoded once and cached in a memory-mapped file."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fused_route.training.data.images import load_image
from fused_route.training.demo.vision import VisionTower

CACHE_DIR = Path(".cache", "features")


def encode_images(
    tower: VisionTower,
    paths: Sequence[Path],
    cache_dir: Path = CACHE_DIR,
    *,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Features of images (N, tower.width), float32, in the order of `paths`.

    The array maps the cache file copy-on-write: writing into it leaves the file alone. A cache is
    used where the contents of all images and the tower's name are those it was made from; one
    that cannot be read is made again. One line on standard error says which of these happened.

    Raises:
        ValueError: `paths` is empty, one of them is no readable image, or the tower returns
            features of another shape or that are not finite.
    """
    if not paths:
        raise ValueError("paths is empty: no images to encode")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    path = cache_path(tower, paths, cache_dir)
    shape = (len(paths), tower.width)
    cached = _open(path, shape)
    if cached is not None:
        print(f"features of {len(paths)} images: cached in {path}", file=sys.stderr)
        return cached
    again = "cache is unreadable, encoding again" if path.exists() else "not cached yet, encoding"
    print(f"features of {len(paths)} images: {again} into {path}", file=sys.stderr)
    with atomic_file(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for features in _encoded(tower, paths, batch_size):
            file.write(features.tobytes())
    written = _open(path, shape)
    if written is None:
        raise OSError(f"{path} was written but cannot be read back")
    return written


def cache_path(tower: VisionTower, paths: Sequence[Path], cache_dir: Path = CACHE_DIR) -> Path:
    """Cache file of these images, in this order, under this tower; it need not exist.

    Raises:
        ValueError: an image cannot be read.
    """
    key = hashlib.sha256(f"{tower.name}\n{tower.width}\n{len(paths)}\n".encode())
    for path in paths:
        try:
            key.update(hashlib.sha256(Path(path).read_bytes()).digest())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return Path(cache_dir) / f"{key.hexdigest()}.npy"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and vanishes if the block raises.

    Makes the folder. Whoever reads `path` sees the old contents or the new ones, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:32]}-{uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _encoded(
    tower: VisionTower, paths: Sequence[Path], batch_size: int
) -> Iterator[NDArray[np.float32]]:
    """Features (≤ batch_size, width), batch by batch, under a progress bar."""
    with tqdm(total=len(paths), desc=f"encoding {len(paths)} images", unit="image") as bar:
        for start in range(0, len(paths), batch_size):
            batch = [tower.transform(load_image(p)) for p in paths[start : start + batch_size]]
            features = tower.encode(torch.stack(batch)).cpu().numpy().astype("<f4", copy=False)
            if features.shape != (len(batch), tower.width):
                raise ValueError(
                    f"{tower.name} made features {features.shape} of {len(batch)} images; "
                    f"expected {(len(batch), tower.width)}"
                )
            if not np.isfinite(features).all():
                raise ValueError(f"{tower.name} made features that are not finite")
            yield features
            bar.update(len(batch))


def _open(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """The cached array, or None where the file is missing, damaged or of another shape."""
    try:
        # "c", not "r": torch warns about tensors that share memory which cannot be written
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError):
        if path.is_dir():
            raise ValueError(f"{path} is a folder where the feature cache has a file") from None
        return None
    if array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous:
        return None
    if not np.isfinite(array).all():
        return None
    return array
