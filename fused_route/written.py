"""What the adapter_config.json of a checkpoint says of the model at hand."""

import os
from dataclasses import replace
from typing import Any

from torch import nn

from . import checkpoint
from .config import RoutedConfig
from .targets import is_named


def read_for(
    model: nn.Module, directory: str | os.PathLike[str]
) -> tuple[dict[str, Any], RoutedConfig]:
    """The keys of adapter_config.json, and the configuration that they are for this model.

    PEFT adds to modules_to_save what the heads of any model of a task are called ("classifier",
    "score"). Names that no module has are left out; their tensors, if the file has any, are
    unexpected ones.

    Raises:
        ValueError: no such file, no routed adapter's, or one for another model.
    """
    written = checkpoint.read_config(directory)
    _refuse_other_model(model, written, directory)
    try:
        config = RoutedConfig.from_json(written)
    except ValueError as error:
        raise ValueError(f"{directory}/{checkpoint.CONFIG}: {error}") from None
    modules = [name for name, _ in model.named_modules()]
    saved = [
        item for item in config.modules_to_save if any(is_named(name, (item,)) for name in modules)
    ]
    return written, replace(config, modules_to_save=saved)


def class_name(model: nn.Module) -> str:
    """Of the model's own class: fully_shard gives it one of its own, derived from it."""
    classes = type(model).__mro__
    own = (of for of in classes if not of.__module__.startswith("torch.distributed.fsdp"))
    return next(own).__name__


def _refuse_other_model(
    model: nn.Module, written: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    mapping = written.get("auto_mapping")
    theirs = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if theirs not in (None, class_name(model)):
        raise ValueError(
            f"{directory} is an adapter for {theirs}, this model is a {class_name(model)}"
        )
