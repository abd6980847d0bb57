"""The layers of a model that bottlenecks are put to: how wide they are, what they compute."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .checks import whole


def base_features(
    base: object, in_features: int | None = None, out_features: int | None = None
) -> tuple[int, int]:
    """(input, output) width of an nn.Linear, a Hugging Face Conv1D or a layer that tells both.

    Raises:
        ValueError: neither the base nor the caller tells, or they disagree.
    """
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # no Conv1D without it
    if pytorch_utils is not None and isinstance(base, pytorch_utils.Conv1D):
        told: tuple[Any, Any] = base.weight.shape[0], base.weight.shape[1]
    else:
        told = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not all(isinstance(width, int) for width in told):
        if in_features is None or out_features is None:
            raise ValueError(
                f"base={type(base).__name__} does not tell its widths (in_features, "
                "out_features): give in_features and out_features"
            )
        told = whole("in_features", in_features), whole("out_features", out_features)
    for name, given, width in zip(
        ("in_features", "out_features"), (in_features, out_features), told, strict=True
    ):
        if given not in (None, width):
            raise ValueError(f"{name}={given}, but the base has {width}")
    return told


def hidden_width(module: nn.Module, position: str, model: nn.Module) -> int:
    """Width of the hidden states "before" or "after" a module of a model.

    Linear layers, norms and nn.MultiheadAttention tell; for others, such as a whole attention or a
    dropout, it is the hidden_size of the model's config.

    Raises:
        ValueError: nobody tells.
    """
    try:
        return base_features(module)[position == "after"]
    except ValueError:
        weight = getattr(module, "weight", None)
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "hidden_size") and hasattr(config, "get_text_config"):
            config = config.get_text_config()  # of a vision-language model
        hidden_size = getattr(config, "hidden_size", None)
        told = [getattr(module, "embed_dim", None), getattr(module, "d_model", None), hidden_size]
        if isinstance(weight, Tensor) and weight.dim() == 1:
            told.insert(0, weight.shape[0])
        widths = [width for width in told if isinstance(width, int)]
        if not widths:
            raise ValueError(
                f"{type(module).__name__} does not tell how wide its hidden states are, nor does "
                "model.config.hidden_size: adapt a linear layer or a norm"
            ) from None
        return widths[0]


def plain_base(base: object) -> tuple[Tensor | None, Tensor | None]:
    """(weight (of·n, d), bias) of a base that is F.linear of them and nothing else; else Nones.

    Subclasses (quantised layers are some), hooks and tensors that are not torch's own (shards) mean
    that the base must be called.
    """
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    is_conv1d = pytorch_utils is not None and type(base) is pytorch_utils.Conv1D
    if not is_conv1d and type(base) is not nn.Linear:
        return None, None
    layer: Any = base
    if is_hooked(layer) or are_all_hooked():
        return None, None
    parameters = vars(layer)["_parameters"]
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:
        weight, bias = layer.weight, layer.bias
    if type(weight) not in (nn.Parameter, Tensor):
        return None, None
    assert isinstance(weight, Tensor) and isinstance(bias, (Tensor, type(None)))
    return (weight.T if is_conv1d else weight), bias


def is_hooked(base: nn.Module) -> bool:
    """Whether a base wants to be called: it has hooks, or a forward of its own."""
    own = vars(base)  # nn.Module's own look-up takes 0.4 µs an attribute
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def are_all_hooked() -> bool:
    """Whether hooks on all modules, as profilers have them, want every base called."""
    everywhere = torch.nn.modules.module
    return bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def weight_kind(
    base: object, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Device and dtype for parameters beside a base: as asked, else as its weight."""
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(
                f"device must be one of torch, such as 'cpu' or 'cuda:0', got {device!r}"
            ) from None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype of torch, got {dtype!r}")
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor):
        device = weight.device if device is None else device
        if dtype is None and weight.is_floating_point():
            dtype = weight.dtype
    return {"device": device, "dtype": dtype}
