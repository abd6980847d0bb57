"""Image features of the demo, encoded once and cached."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fused_route.training.demo.vision import VisionTower
from fused_route.training.encoders import Encoder
from fused_route.training.feature_cache import FeatureCache

CACHE_DIR = Path(".cache", "features")


def encode_images(
    tower: VisionTower,
    paths: Sequence[Path],
    cache_dir: Path = CACHE_DIR,
    *,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Features of images (N, tower.width), float32, in the order of `paths`.

    What a `FeatureCache` under the tower's name has is read, the rest encoded. One line on
    standard error says how much that is.

    Raises:
        ValueError: `paths` is empty, one of them is no readable image, or the tower returns
            features of another shape or that are not finite.
    """
    if not paths:
        raise ValueError("paths is empty: no images to encode")
    encoder = encoder_of_tower(tower)
    cache = FeatureCache(cache_dir, encoder.key, tower.width)
    new = len(cache.missing(paths))
    what = f"{new} not cached yet, encoding into" if new else "cached in"
    print(f"features of {len(paths)} images: {what} {cache.folder}", file=sys.stderr)
    cache.encode(encoder, paths, batch_size=batch_size, dtype="float32")
    return cache.batch(paths)[:, 0].numpy()


def encoder_of_tower(tower: VisionTower) -> Encoder:
    """A tower of the demo as an encoder of features (B, 1, width)."""
    key = hashlib.sha256(f"{tower.name}\n{tower.width}".encode()).hexdigest()
    return Encoder(key, tower.transform, lambda batch: tower.encode(batch).unsqueeze(1))
