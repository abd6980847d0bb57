"""Vision towers of a `VisionLanguageModel`: those of transformers, and timm's as such."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperModel

from fused_route.checks import shown
from fused_route.training.packages import missing


def as_tower(vision: Any) -> PreTrainedModel:
    """A vision model of transformers as it is, one of timm's inside transformers' TimmWrapperModel.

    Raises:
        ValueError: something else; or a model of timm's made with arguments, see `wrap_timm`.
    """
    if isinstance(vision, PreTrainedModel):
        if getattr(vision, "main_input_name", None) != "pixel_values":
            raise ValueError(
                f"vision={type(vision).__name__} takes {vision.main_input_name}, not pixel_values: "
                "give a vision model, such as the vision_model of CLIP"
            )
        return vision
    if isinstance(vision, nn.Module) and hasattr(vision, "pretrained_cfg"):
        return wrap_timm(vision)
    raise ValueError(
        f"vision must be a vision model of transformers or timm, got {type(vision).__name__}"
    )


def wrap_timm(model: nn.Module, **model_args: Any) -> PreTrainedModel:
    """A model of timm's, its weights included, as a model of transformers that can be saved.

    Args:
        model: made by timm.create_model.
        model_args: what timm.create_model was given beside the name, such as img_size=96; a
            checkpoint needs them to make the model again.

    Raises:
        ValueError: timm makes another model of this name and these arguments.
    """
    try:
        import timm
    except ImportError as error:
        raise missing("timm") from error
    pretrained: Any = getattr(model, "pretrained_cfg", None) or {}
    name = pretrained.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"model={type(model).__name__} does not tell a name that timm knows")
    given: Any = model
    with torch.device("meta"):
        same = timm.create_model(name, num_classes=given.num_classes, **model_args)
    if _described(same) != _described(model):
        raise ValueError(
            f"model is not what timm.create_model({name!r}{_shown(model_args)}) makes: call "
            "wrap_timm(model, …) with the arguments that it was made with"
        )
    given.reset_classifier(0)
    config = TimmWrapperConfig(architecture=name, model_args=model_args, num_labels=0)
    tower = TimmWrapperModel(config)
    tower.timm_model = model
    return tower


def _described(model: Any) -> tuple[Any, ...]:
    """What a model of timm's computes, but for the values of its weights."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    pool = getattr(model, "global_pool", None)
    return repr(model), shapes, size, pool if isinstance(pool, str) else None


def _shown(arguments: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def width_of(tower: PreTrainedModel, features: str) -> int:
    """Width of a tower's features, pooled or not.

    Raises:
        ValueError: it does not tell.
    """
    own = getattr(tower, "timm_model", None)
    told = getattr(own, "num_features", None)
    if features == "pooled":  # some networks have a layer behind the pooling
        told = getattr(own, "head_hidden_size", None) or told
    if told is None:
        told = getattr(tower.config, "hidden_size", None)
    if told is None:
        told = (getattr(tower.config, "hidden_sizes", None) or [None])[-1]
    if not isinstance(told, int):
        raise ValueError(
            f"vision={type(tower).__name__} does not tell how wide its features are: give "
            "visual_width"
        )
    return told


def features_of(tower: PreTrainedModel, pixel_values: Tensor, features: str) -> Tensor:
    """Features of images.

    Args:
        pixel_values: (B, channels, H, W), or (B, n, channels, H, W) for n images a sample.
        features: "pooled", the tower's pooled output; "tokens", its last hidden states.

    Returns:
        (B, Nv, width), the images of a sample one after the other.

    Raises:
        ValueError: another shape, or a tower without what is asked for.
    """
    if (
        not isinstance(pixel_values, Tensor)
        or pixel_values.dim() not in (4, 5)
        or 0 in pixel_values.shape[1:]
    ):
        raise ValueError(
            "pixel_values must be (B, channels, H, W), or (B, n, channels, H, W) for n images a "
            f"sample, got {shown(pixel_values)}"
        )
    batch = pixel_values.shape[0]
    images = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
    out = tower(pixel_values=images)
    name = "pooler_output" if features == "pooled" else "last_hidden_state"
    wanted: Tensor | None = getattr(out, name, None)
    if wanted is None:
        other = "tokens" if features == "pooled" else "pooled"
        raise ValueError(
            f"features={features!r}: {type(tower).__name__} returns no {name}; take {other!r}, or "
            "the model without its head"
        )
    if wanted.dim() == 4:
        wanted = _in_a_row(tower, wanted)
    tokens: Tensor = wanted.unsqueeze(1) if wanted.dim() == 2 else wanted
    return tokens.reshape(batch, -1, tokens.shape[-1])


def _in_a_row(tower: PreTrainedModel, states: Tensor) -> Tensor:
    """States of a grid, (B, width, H, W), or (B, H, W, width) where timm says so, as tokens."""
    layout = str(getattr(getattr(tower, "timm_model", None), "output_fmt", "NCHW"))
    if layout.endswith("NHWC"):
        return states.flatten(1, 2)
    return states.flatten(2).transpose(1, 2)
