"""What of an object must not change when a call is refused."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_route import Attached, RoutingContext
from fused_route.routes import RouteTable


def seen(value: Any) -> Any:
    """Everything of a value that a refusal must leave alone, comparable by `same`."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.detach().clone()
    if isinstance(value, Attached):
        return [seen(value.model), seen(value.context), dict(value.layers), value._before]
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, RoutingContext):
        held = value._thread.held
        return [held, len(value._thread.before), value.projector, list(value.together._when)]
    if isinstance(value, (RouteTable, Mapping)):
        return {key: seen(item) for key, item in value.items()}
    return value


def _of_module(module: nn.Module) -> list[Any]:
    modules = dict(module.named_modules(remove_duplicate=False))
    return [
        {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        {name: p.requires_grad for name, p in module.named_parameters()},
        {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)},
        {name: (id(m), m.training, m.__dict__.get("folded")) for name, m in modules.items()},
        {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in modules.items()},
    ]


def same(one: Any, other: Any) -> bool:
    """Equal to the bit: of tensors NaN is NaN, of objects the very same."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.is_meta or one.numel() == 0:
            return one.device == other.device
        return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    if isinstance(one, dict):
        keys = isinstance(other, dict) and list(one) == list(other)
        return keys and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or (type(one) in (int, bool, str, tuple) and one == other)
