"""Finding the modules of a model that a configuration names."""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .checks import shown
from .config import RoutedConfig

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """A module and every name it has in the model (shared modules have several)."""

    module: nn.Module
    names: tuple[str, ...]


def find_targets(model: nn.Module, config: RoutedConfig) -> list[Target]:
    """The modules that target_modules, layers_to_transform and layers_pattern select.

    A module may name children in an attribute `unrouted`, such as the vision tower whose features
    are the routing input: nothing in them matches.

    Raises:
        ValueError: nothing matches, an item of target_modules or layers_to_transform matches
            nothing, or a target lies inside another, or inside a compiled module.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    missed_layers = set(config.layers_to_transform or ())
    listed = () if isinstance(config.target_modules, str) else config.target_modules
    missed = set(listed)
    unrouted = tuple(_unrouted(model))
    linear = _linear(model, config) if config.target_modules == ALL_LINEAR else None
    for name, module in model.named_modules(remove_duplicate=False):
        is_meant = is_named(name, config.target_modules) if linear is None else name in linear
        if not name or not is_meant:
            continue
        if f"{name}.".startswith(unrouted):
            continue
        if config.layers_to_transform is not None:
            index = layer_index(name, config.layers_pattern)
            if index not in config.layers_to_transform:
                continue
            missed_layers.discard(index)
        missed -= {item for item in listed if is_named(name, (item,))}
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    if not modules:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module"
            f"{_in_layers(config)}; linear layers end in: {', '.join(_linear_endings(model))}"
        )
    if missed_layers:
        raise ValueError(f"layers_to_transform={sorted(missed_layers)}: no target in these layers")
    if missed:
        raise ValueError(f"target_modules: nothing is called {', '.join(sorted(missed))}")
    _refuse_nested([name for found in names.values() for name in found])
    refuse_compiled(name for found in names.values() for name in found)
    return [Target(module, tuple(names[key])) for key, module in modules.items()]


def _unrouted(model: nn.Module) -> Iterator[str]:
    """Names of modules, with a dot behind, in which nothing is to be adapted."""
    for name, module in model.named_modules():
        for child in getattr(module, "unrouted", ()):
            yield f"{name}.{child}.".removeprefix(".")


def _linear(model: nn.Module, config: RoutedConfig) -> set[str]:
    """Names of all linear layers, but the output embedding and what is in modules_to_save."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    kinds = (nn.Linear,) if pytorch_utils is None else (nn.Linear, pytorch_utils.Conv1D)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: set[str] = set()
    passed_by: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[0] in passed_by or is_named(name, config.modules_to_save):
            passed_by.add(name)
            continue
        base = getattr(module, "base_layer", None)  # of a layer that PEFT has adapted already
        if base is not None:
            passed_by.add(name)
        if module is not head and isinstance(module if base is None else base, kinds):
            found.add(name)
    return found


def _refuse_nested(names: list[str]) -> None:
    for name in names:
        for outer in names:
            if name.startswith(f"{outer}."):
                raise ValueError(f"target_modules matches {name} inside {outer}: name one of them")


def refuse_compiled(names: Iterable[str]) -> None:
    """ValueError for a name within what torch.compile has made: no other model has that name."""
    for name in names:
        if "_orig_mod" in name.split("."):
            raise ValueError(
                f"{name} is part of a compiled model: attach first, then compile; its attribute "
                "_orig_mod is the model as it was"
            )


def is_named(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a module's name matches: wholly a regular expression, or an item as name or suffix.

    Raises:
        ValueError: not a regular expression.
    """
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"target_modules={shown(patterns)} is no regular expression: {error}"
            ) from None
    return any(name == item or name.endswith(f".{item}") for item in patterns)


def block_of(name: str, pattern: str | Sequence[str] | None) -> str | None:
    """A module's name up to the index after `pattern`, or up to its first number; None if none."""
    parts = name.split(".")
    patterns = (pattern,) if isinstance(pattern, str) else pattern
    for place, (before, part) in enumerate(zip(["", *parts], parts, strict=False)):
        if part.isdigit() and (patterns is None or before in patterns):
            return ".".join(parts[: place + 1])
    return None


def layer_index(name: str, pattern: str | Sequence[str] | None) -> int | None:
    """The index after `pattern` in a module's name, or the first number in it; None if none."""
    block = block_of(name, pattern)
    return None if block is None else int(block.rpartition(".")[2])


def _in_layers(config: RoutedConfig) -> str:
    layers = config.layers_to_transform
    return "" if layers is None else f" in layers_to_transform={list(layers)}"


def _linear_endings(model: nn.Module) -> list[str]:
    """Last parts of the names of what looks like a linear layer, most frequent first."""
    count: dict[str, int] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name and weight is not None and weight.dim() == 2 and not list(module.children()):
            ending = name.rsplit(".", 1)[-1]
            count[ending] = count.get(ending, 0) + 1
    return sorted(count, key=lambda ending: -count[ending])[:12]
