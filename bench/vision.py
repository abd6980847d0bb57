"""Where a training step's image features come from: a frozen vision model, or a cache of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.operands import DTYPES

VISION = "vit_base_patch16_224"
SIZES = {"img_size": 224, "patch_size": 16, "embed_dim": 768}  # its own, known without building it


@dataclass(frozen=True)
class Images:
    """Features of a step's images.

    Args:
        features: computes or gives them, (S, Nv, width), without a graph.
        live: tensors that exist anyway: the images and the vision model's, or the features.
    """

    features: Callable[[], Tensor]
    live: list[Tensor]


def width(changed: Mapping[str, Any]) -> int:
    """Of the features; `changed`: what `VISION` is told otherwise, arguments of timm's."""
    return int({**SIZES, **changed}["embed_dim"])


def tokens(changed: Mapping[str, Any]) -> int:
    """Of an image: a class token and one for each patch."""
    sizes = {**SIZES, **changed}
    return 1 + int(sizes["img_size"] // sizes["patch_size"]) ** 2


def tower(changed: Mapping[str, Any]) -> Any:
    """The frozen vision model, with random weights."""
    import timm

    vision = timm.create_model(VISION, pretrained=False, num_classes=0, **changed)
    return vision.eval().requires_grad_(False)


def images(case: Case, changed: Mapping[str, Any], dtype: torch.dtype) -> Images:
    """A step's images, drawn anew in the case's dtype and computed with in this one.

    Raises:
        ValueError: an image has fewer than Nv tokens.
    """
    if case.Nv > (most := tokens(changed)):
        raise ValueError(f"Nv must be at most {most}, the tokens of an image; got {case.Nv}")
    return SOURCES[case.features](case, changed, dtype)


def _computed(case: Case, changed: Mapping[str, Any], dtype: torch.dtype) -> Images:
    stored = DTYPES[case.dtype]
    vision = tower(changed).to(stored).to(dtype)
    side = vision.patch_embed.img_size[0]
    pixels = torch.randn(case.S, 3, side, side).to(stored).to(dtype)

    @torch.no_grad()
    def features() -> Tensor:
        every: Tensor = vision.forward_features(pixels)
        return every[:, : case.Nv]  # pooled, it is the first

    return Images(features, [pixels, *vision.parameters(), *vision.buffers()])


def _cached(case: Case, changed: Mapping[str, Any], dtype: torch.dtype) -> Images:
    # Standard normal: a vision model's last norm gives its features that scale.
    given = torch.randn(case.S, case.Nv, width(changed)).to(DTYPES[case.dtype]).to(dtype)
    return Images(lambda: given, [given])


# By the names in `bench.cases.FEATURES`.
SOURCES: dict[str, Callable[[Case, Mapping[str, Any], torch.dtype], Images]] = {
    "computed": _computed, "cached": _cached,
}  # fmt: skip
