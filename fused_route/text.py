"""Routing by text: hooks that tell the layers of an encoder-decoder model what they are routed by.

A layer routed by its own text needs to know which tokens are padding; one routed by the encoder,
the mean of the encoder's states. Both are arguments of calls that the model makes by itself.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .config import RoutedConfig
from .context import RoutingContext
from .routing_input import masked_mean
from .targets import Target


def always() -> bool:
    """Whether layers are in use that cannot be turned off."""
    return True


def follow(
    model: nn.Module,
    config: RoutedConfig,
    targets: list[Target],
    context: RoutingContext,
    is_used: Callable[[], bool] = always,
) -> list[RemovableHandle]:
    """Hooks around the encoder (routed_by "text") or decoder ("encoder") that set the context.

    Other models than encoder-decoder ones get none with "text": their text_mask is set around them.

    Args:
        is_used: whether the layers route at the time of a call; while they do not, the context
            stays as it is, for other layers. It is copied with the model.

    Raises:
        ValueError: "encoder" without an encoder and a decoder, or for a target outside the decoder.
    """
    if config.routed_by == "image":
        return []
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder, decoder = (_part(model, name) for name in ("get_encoder", "get_decoder"))
    if config.routed_by == "text":
        following = Following(context, "text", is_used)
        return _around(encoder, following) if pair and encoder else []
    if not pair or encoder is None or decoder is None:
        raise ValueError(
            f"routed_by='encoder': {type(model).__name__} is no encoder-decoder model with "
            "get_encoder and get_decoder; give the context masked_mean(states, mask) yourself, "
            "with routed_by='image'"
        )
    inside = {id(module) for module in decoder.modules()}
    for target in targets:
        if id(target.module) not in inside:
            raise ValueError(
                f"routed_by='encoder': target {target.names[0]} is not part of the decoder, and "
                "the encoder's states do not exist before it"
            )
    return _around(decoder, Following(context, "encoder", is_used))


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    part = get() if callable(get) else None
    return part if isinstance(part, nn.Module) and part is not model else None


class Following:
    """The hooks: before a call, the context is set from its arguments; after it, set back."""

    def __init__(
        self, context: RoutingContext, routed_by: str, is_used: Callable[[], bool]
    ) -> None:
        self.context = context
        self.routed_by = routed_by
        self.is_used = is_used

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set from the arguments of the module's forward."""
        self.context.push(self)
        if not self.is_used():
            return
        inner = getattr(module, "base_layer", module)  # a layer of PEFT's around it takes anything
        given = inspect.signature(inner.forward).bind_partial(*args, **kwargs).arguments
        if self.routed_by == "text":
            mask = given.get("attention_mask")
            self.context.set(text_mask="all" if mask is None else mask)
            return
        states = given.get("encoder_hidden_states")
        if states is None:
            raise ValueError("routed_by='encoder': the decoder was called without the encoder's")
        self.context.set(masked_mean(states, given.get("encoder_attention_mask")))

    def after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Set back, whether or not the call succeeded."""
        self.context.pop(self)


def _around(module: nn.Module, following: Following) -> list[RemovableHandle]:
    return [
        module.register_forward_pre_hook(following.before, with_kwargs=True),
        module.register_forward_hook(following.after, always_call=True),
    ]
