"""Merging the updates of layers that no image routes into their bases."""

import torch
from torch import Tensor, nn

from .bases import plain_base
from .bottleneck import Bottleneck
from .fold import Layer, added, views_of
from .modules import LinearCall, RoutedLinear


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds the updates of layers of route "none" to their bases, which then stand alone again.

    Returns:
        The model; where it is itself such a layer, its base.

    Raises:
        ValueError: a layer that an image routes (`fold` holds one image), an adapter, a layer of
            PEFT's (the message says what merges it), a base that is no plain nn.Linear or Conv1D
            without hooks, or one whose weight is tied to another module's. Nothing is then changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    refuse_to_merge(model)
    layers = [module for module in model.modules() if isinstance(module, Bottleneck)]
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no routed layer")
    owners = _Owners(model)
    merged = {}
    for layer in layers:
        _refuse_unmergeable(layer, owners)
        assert isinstance(layer, LinearCall)
        weight, _ = plain_base(layer.base)
        assert weight is not None
        merged[layer] = weight, added(layer, weight, layer.A)
    for layer, (weight, sum_) in merged.items():
        weight.copy_(sum_)
        layer.is_merged = True
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, RoutedLinear) and name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
    return model.base if isinstance(model, RoutedLinear) else model


def refuse_to_merge(model: nn.Module) -> None:
    """ValueError where layers are PEFT's: why they do not merge, or what merges them."""
    views = [view for module in model.modules() for view in views_of(module)]
    for view in views:
        _refuse_kind(view)
    if views:
        raise ValueError(
            f"{views[0].label} is a layer of PEFT's, which this library cannot merge in place: "
            "save_pretrained(directory), then fused_route.attach(base, directory).merge() with a "
            "base that has no adapter, such as model.unload()"
        )


def _refuse_kind(layer: Layer) -> None:
    route = layer.routing.route
    if route.takes != "nothing":
        raise ValueError(
            f"{layer.label}: route {route.name!r} depends on the image, so that no weight holds it "
            "for all images; fold(model, x_r) holds one"
        )
    if not isinstance(layer, LinearCall):
        raise ValueError(f"{layer.label} is an adapter: only routed linear layers merge")


def _refuse_unmergeable(layer: Bottleneck, owners: "_Owners") -> None:
    _refuse_kind(layer)
    assert isinstance(layer, RoutedLinear)
    if plain_base(layer.base)[0] is None:
        raise ValueError(
            f"{layer.label}: merging needs a base that is a plain nn.Linear or Conv1D without "
            f"hooks, got {type(layer.base).__name__}"
        )
    if owners.several(layer.weight):
        raise ValueError(f"{layer.label}: the base's weight is tied to another module's")


class _Owners:
    """Modules that hold a parameter, by the bytes that it lies in."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, list[tuple[int, int, int]]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    memory, start, end = _bytes(parameter)
                    self._held.setdefault(memory, []).append((start, end, id(module)))

    def several(self, weight: Tensor) -> bool:
        """Whether more than one module holds bytes of this weight."""
        memory, start, end = _bytes(weight)
        held = self._held.get(memory, [])
        return len({module for first, last, module in held if first < end and start < last}) > 1


def _bytes(tensor: Tensor) -> tuple[int, int, int]:
    """Its memory, and the first byte and the one after the last that it takes of that.

    Parameters may be views of one buffer, as torch.nn.utils.vector_to_parameters makes them. Where
    there is no memory to point to, a tensor is its own.
    """
    memory = tensor.untyped_storage().data_ptr()
    if not memory:
        return id(tensor), 0, 1
    first = int(tensor.storage_offset())
    steps = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = first + int(sum(steps))
    return memory, first * tensor.element_size(), (last + 1) * tensor.element_size()
