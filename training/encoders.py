"""Frozen vision towers as encoders of image files, each known by a digest of what it computes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_route.checks import one_of, shown
from fused_route.training.data.images import load_image
from fused_route.training.files import content_digest
from fused_route.training.packages import missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEATURES = ("pooled", "tokens")
# What differs between two versions of a library or two folders, and changes no feature. The dtype
# of weights is counted with the weights.
PASSING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder.

    Attributes:
        key: digest of all that features depend on, besides the image; names their cache.
        preprocess: an RGB image to the encoder's input (3, H, W); sent to worker processes.
        encode: inputs (B, 3, H, W) to features (B, Nv, width), on the encoder's device.
        weights: digest of its weights alone, which no version of a library changes.
    """

    key: str
    preprocess: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor], Tensor]
    weights: str = ""


def encoder_of(tower: "PreTrainedModel", processor: Any, features: str) -> Encoder:
    """A vision tower of transformers, or of timm in its wrapper, as an encoder.

    Its weights are those of now: after a change of them make another encoder.

    Args:
        tower: see `towers.as_tower`. It encodes in eval mode, without gradients or autocast, in
            its own dtype, and is left in the mode that it was in.
        processor: the tower's image processor, of AutoImageProcessor or AutoProcessor; None: the
            transform of a timm tower's own configuration, for evaluation.
        features: "pooled" or "tokens", as in `VisionLanguageConfig`.

    Raises:
        ValueError: something else; no processor where the tower is not timm's; a tower without
            weights.
    """
    from fused_route.training.towers import as_tower

    one_of("features", features, FEATURES)
    tower = as_tower(tower)
    processor = getattr(processor, "image_processor", processor)
    if processor is None:
        preprocess, preprocessing = _of_timm(tower)
    elif hasattr(processor, "to_json_string"):
        preprocess = partial(_processed, processor)
        preprocessing = json.loads(processor.to_json_string())
    else:
        raise ValueError(
            "processor must be an image processor of transformers, such as "
            f"AutoImageProcessor.from_pretrained makes, got {shown(processor)}"
        )
    weights = weights_digest(tower.state_dict())
    identity = {
        "tower": _class_of(tower),
        "config": _lasting(tower.config.to_dict()),
        "weights": weights,
        "processor": None if processor is None else _class_of(processor),
        "preprocessing": _lasting(preprocessing),
        "features": features,
        "dtype": str(tower.dtype),
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    return Encoder(key, preprocess, partial(_encoded, tower, features), weights)


def weights_digest(state: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of names, dtypes, shapes and bytes in the order of names.

    Each tensor has a digest of its own, so that all cores work: hashing releases Python's lock.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    names = sorted(state)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest_of, names, [state[name] for name in names]))
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        total.update(f"{name}\0".encode() + digest)
    return total.hexdigest()


def _digest_of(name: str, value: Any) -> bytes:
    if not isinstance(value, Tensor):  # what a module adds by get_extra_state
        return hashlib.sha256(repr(value).encode()).digest()
    if value.is_meta:
        raise ValueError(f"tower has no weights: {name} is on the meta device")
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\0".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _class_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _lasting(config: Any) -> Any:
    """A configuration without what changes from place to place."""
    if isinstance(config, dict):
        return {str(k): _lasting(v) for k, v in config.items() if k not in PASSING}
    return [_lasting(v) for v in config] if isinstance(config, (list, tuple)) else config


def _of_timm(tower: Any) -> tuple[Callable[[Image.Image], Tensor], dict[str, Any]]:
    """The transform of a timm model's own configuration, at the size of its patches' grid."""
    model = getattr(tower, "timm_model", None)
    if model is None:
        raise ValueError(
            f"processor is None, but {type(tower).__name__} is not timm's: give its image "
            "processor, AutoImageProcessor.from_pretrained(…)"
        )
    try:
        from timm.data import create_transform, resolve_data_config
    except ImportError as error:
        raise missing("timm") from error
    # The configuration says 224 of a model that was made with img_size=32, too.
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    given = {} if size is None else {"input_size": (3, *size)}
    own = getattr(tower.config, "pretrained_cfg", None)
    config = resolve_data_config(given, pretrained_cfg=own, model=model)
    return create_transform(**config, is_training=False), config


def _processed(processor: Any, image: Image.Image) -> Tensor:
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def _encoded(tower: Any, features: str, pixels: Tensor) -> Tensor:
    """Features (B, Nv, width) of inputs (B, 3, H, W), in the tower's dtype and on its device."""
    from fused_route.training.towers import features_of

    if pixels.dim() != 4:
        raise ValueError(
            f"the processor makes {tuple(pixels.shape[1:])} of an image; an encoder takes "
            "(3, H, W): turn its tiling or packing of images off"
        )
    training = [module for module in tower.modules() if module.training]
    tower.eval()
    try:
        with torch.no_grad(), torch.autocast(tower.device.type, enabled=False):
            return features_of(tower, pixels.to(tower.device, tower.dtype), features)
    finally:
        for module in training:
            module.training = True


class Batch(NamedTuple):
    """Image files on their way through an encoder.

    Attributes:
        files: path and SHA-256 of the contents of each image in `values`.
        values: their inputs (B, 3, H, W), then features (B, Nv, width); None: there are none.
        broken: path of each file that holds no readable image, and the line that says so.
    """

    files: list[tuple[Path, bytes]]
    values: Tensor | None
    broken: list[tuple[Path, str]]


def encoded(
    encoder: Encoder, files: Sequence[tuple[Path, bytes]], batch_size: int, workers: int
) -> Iterator[Batch]:
    """Features of image files, in order, batch by batch.

    Args:
        files: path and SHA-256 of the contents; contents that changed since are broken.
        workers: processes that read and preprocess beside this one; 0: this one does.

    Raises:
        ValueError: preprocessing makes inputs of different sizes.
    """
    if not files:
        return
    loader = DataLoader(
        _Images(files, encoder.preprocess), batch_size, num_workers=workers, collate_fn=_together,
        generator=torch.Generator(),  # its seed of workers would advance the caller's random state
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        values = batch.values
        yield batch if values is None else batch._replace(values=encoder.encode(values))


class _Images(Dataset[Any]):
    """Inputs of an encoder, or the line that says why there is none."""

    def __init__(
        self, files: Sequence[tuple[Path, bytes]], preprocess: Callable[[Image.Image], Tensor]
    ) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[tuple[Path, bytes], Tensor | str]:
        path, digest = self.files[i]
        image = None
        try:
            image = load_image(path)
            pixels = self.preprocess(image)
            if content_digest(path) != digest:
                return (path, digest), f"{path} changed while it was being encoded"
        except (ValueError, OSError) as error:
            why = " ".join(str(error).split())
            named = why if image is None else f"{path} cannot be preprocessed: {why}"
            return (path, digest), named
        return (path, digest), pixels


def _together(items: list[tuple[tuple[Path, bytes], Tensor | str]]) -> Batch | str:
    """A batch of one tensor, which costs workers one open file; or why the inputs make none.

    What goes wrong in a worker is said in words: an exception would bring its traceback along.
    """
    files = [file for file, made in items if isinstance(made, Tensor)]
    pixels = [made for _, made in items if isinstance(made, Tensor)]
    broken = [(path, made) for (path, _), made in items if isinstance(made, str)]
    for (path, _), made in zip(files, pixels, strict=True):
        if made.shape != pixels[0].shape:
            return (
                f"{path} is preprocessed to {tuple(made.shape)}, {files[0][0]} to "
                f"{tuple(pixels[0].shape)}: a cache takes inputs of one size, so let the "
                "processor crop or resize to one"
            )
    return Batch(files, torch.stack(pixels) if pixels else None, broken)
