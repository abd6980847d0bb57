"""Models that packages ship, for recipes that need no download."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, ViTImageProcessor

from fused_route.training.demo.task import encoder_directory
from fused_route.training.demo.vision import MEAN, RESOLUTION, STD, load_efficientnet_lite0
from fused_route.training.towers import wrap_timm

BICUBIC = 3


def _efficientnet_lite0() -> tuple[PreTrainedModel, Any]:
    """Pooled features of 1,280 numbers, of images squashed to 128 × 128."""
    processor = ViTImageProcessor(
        size={"height": RESOLUTION, "width": RESOLUTION},
        resample=BICUBIC,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return wrap_timm(load_efficientnet_lite0().model), processor


TOWERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "packaged/efficientnet-lite0": _efficientnet_lite0
}
LANGUAGES: dict[str, Callable[[], str]] = {
    "packaged/all-minilm-l6-v2": lambda: str(encoder_directory())
}
