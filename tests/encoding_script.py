"""Images, an encoder and a cache of its features, for tests.

`python encoding_script.py IMAGES CACHE SECONDS`, which tests run beside themselves, encodes the
images of a folder in shards of four, with a pause before each batch.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fused_route.training import feature_shards
from fused_route.training.data.images import load_image
from fused_route.training.encoders import Encoder
from fused_route.training.feature_cache import FeatureCache

SHARD = 4


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W), the size of the image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def encoder(seconds: float = 0.0, key: str = "colours") -> Encoder:
    """Two tokens of each image, its mean and its largest value in each channel: (B, 2, 3)."""

    def encode(batch: Tensor) -> Tensor:
        time.sleep(seconds)
        return torch.stack([batch.mean((2, 3)), batch.amax((2, 3))], 1)

    return Encoder(key, pixels, encode)


def paint(path: Path, colour: int, side: int = 8) -> Path:
    """An image whose pixels all differ; the same bytes for the same colour."""
    generator = torch.Generator().manual_seed(colour)
    values = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)
    return path


def expected(paths: list[Path]) -> Tensor:
    """Features of `encoder`, computed directly."""
    return encoder().encode(torch.stack([pixels(load_image(path)) for path in paths]))


def counted(key: str = "colours") -> tuple[Encoder, list[int]]:
    """An encoder, and a list of how many images it was given at each call."""
    own, calls = encoder(key=key), []

    def encode(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return own.encode(batch)

    return replace(own, encode=encode), calls


def filled(folder: Path, paths: list[Path]) -> FeatureCache:
    """A cache with the features of these images."""
    cache = FeatureCache(folder, "colours")
    cache.encode(encoder(), paths, batch_size=4)
    return cache


def shards(folder: Path) -> list[Path]:
    """Files of features below a cache's folder."""
    return sorted(folder.glob("*/*.safetensors"))


def main(images: Path, folder: Path, seconds: float) -> None:
    feature_shards.SHARD_IMAGES = SHARD
    colours = encoder(seconds)
    cache = FeatureCache(folder, colours.key)
    done = cache.encode(colours, sorted(images.iterdir()), batch_size=2)
    print(done.new)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
