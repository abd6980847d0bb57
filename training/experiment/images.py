"""The images of a batch: features from the cache, or pixels for the tower."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fused_route.training.data.images import load_image
from fused_route.training.experiment.sampling import seed_of
from fused_route.training.feature_cache import FeatureCache

LEAST_AREA = 0.8  # of an image that a random crop keeps; less often cuts what is asked about

Row = dict[str, Any]


class CachedImages:
    """Features of the images of rows, from a `FeatureCache`."""

    def __init__(self, cache: FeatureCache, control: str = "none") -> None:
        self.cache = cache
        self.control = control

    def __call__(self, rows: Sequence[Row], seed: int | None = None) -> dict[str, Tensor]:
        """visual_features (B, n·Nv, width), the n images of a row one after the other."""
        paths = [path for row in rows for path in row["paths"]]
        features = self.cache.batch(paths)
        features = features.reshape(len(rows), -1, features.shape[-1])
        return {"visual_features": in_place_of(features, self.control, rows, seed)}


class PixelImages:
    """Pixels of the images of rows, by the tower's image processor."""

    def __init__(self, preprocess: Any, augmentation: str = "none", control: str = "none") -> None:
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.control = control

    def __call__(self, rows: Sequence[Row], seed: int | None = None) -> dict[str, Tensor]:
        """pixel_values (B, n, channels, H, W); augmented by a seed, if given, and row."""
        pixels = []
        for row in rows:
            draw = None
            if seed is not None and self.augmentation != "none":
                draw = random.Random(seed_of(seed, row["row"]))
            pixels.append(torch.stack([self._pixels(path, draw) for path in row["paths"]]))
        return {"pixel_values": in_place_of(torch.stack(pixels), self.control, rows, seed)}

    def _pixels(self, path: Path, draw: random.Random | None) -> Tensor:
        image = load_image(path)
        pixels: Tensor = self.preprocess(image if draw is None else _cropped(image, draw))
        return pixels


def in_place_of(images: Tensor, control: str, rows: Sequence[Row], seed: int | None) -> Tensor:
    """What rows get in place of their images (B, …), features or pixels, as `Recipe.control` says.

    Noise is drawn by a seed (None: 0) and the row, so that a resumed run draws the same. One row
    alone has no deviation, and gets standard normal draws: its mean would be the image.
    """
    if control == "constant":
        return torch.ones_like(images)
    if control != "noise":
        return images
    drawn = torch.stack([_noise(images[0], row, seed or 0) for row in rows])
    if len(rows) == 1:
        return drawn.to(images.dtype)
    values = images.float()
    spread, mean = torch.std_mean(values, 0, correction=0)
    return (mean + spread * drawn).to(images.dtype)


def _noise(like: Tensor, row: Row, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed_of(seed, row["row"]))
    return torch.randn(like.shape, generator=draw)


def _cropped(image: Image.Image, draw: random.Random) -> Image.Image:
    """A part of the image of the same shape, at least `LEAST_AREA` of it."""
    scale = draw.uniform(LEAST_AREA, 1.0) ** 0.5
    width, height = (max(1, round(side * scale)) for side in image.size)
    left = draw.randint(0, image.width - width)
    top = draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))
