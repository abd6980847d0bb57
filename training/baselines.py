"""What routing is compared with, at equal parameter count: cross-attention, plain and PEFT's LoRA.

`attach_cross_attention` puts the first into a model in place of what `attach` puts there, `plain`
turns a configuration into that of the second, `peft_lora` into that of the third.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_route import (
    Attached,
    RoutedConfig,
    RoutedLinear,
    RoutingContext,
    RoutingInput,
    attach,
    checkpoint,
)
from fused_route.bases import base_features
from fused_route.checks import whole
from fused_route.context import own_context
from fused_route.targets import find_targets

from .cross_attention import CrossAttentionLinear


def matching_inner_rank(
    d: int, rank: int, g: int = 1, heads: int = 4, budget: int | None = None
) -> int:
    """The largest k for which cross-attention has no more parameters than a routed layer.

    B aside, which both have: 2·k·g·d + 4·(k·g)² + r·g·k·g ≤ budget.

    Args:
        d, rank, g: width, r and number of adapted segments.
        heads: divides k·g.
        budget: parameters of the routed layer without B; None: r·g·d, those of A.

    Raises:
        ValueError: there is no such k.
    """
    d, rank, g, heads = whole("d", d), whole("rank", rank), whole("g", g), whole("heads", heads)
    budget = rank * g * d if budget is None else whole("budget", budget)
    # The positive root of 4·(k·g)² + (2·d + r·g)·k·g − budget, rounded down.
    half = 2 * d + rank * g
    most = (math.isqrt(half * half + 16 * budget) - half) // 8 // g
    k = next((k for k in range(most, 0, -1) if k * g % heads == 0), None)
    if k is None:
        raise ValueError(
            f"heads={heads} must divide k·g, where at most k = {most} (with g = {g}) has no more "
            f"parameters than a routed layer of rank={rank} and d={d}: take other heads or ranks"
        )
    return k


@dataclass
class CrossAttached:
    """A model with cross-attention in it, made by `attach_cross_attention`.

    Attributes:
        model: the model, changed in place.
        config: what was asked for.
        context: holds the image's features for all layers.
        layers: the layers by the name of the module they adapt.
        plain: the handle of the plain LoRA whose place they took, with the projector, if any.
    """

    model: nn.Module
    config: RoutedConfig
    context: RoutingContext
    layers: dict[str, CrossAttentionLinear]
    plain: Attached

    def using(self, x_r: Tensor | RoutingInput) -> AbstractContextManager[None]:
        """`context.using`: attends to these features inside a `with` block."""
        return self.context.using(x_r)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The layers', the projector's where it is trainable, and those of modules_to_save."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def checkpoint_activations(self, **kwargs: Any) -> None:
        """As `Attached.checkpoint_activations`."""
        self.plain.checkpoint_activations(**kwargs)

    def state_dict(self) -> dict[str, Tensor]:
        """All that belongs to the baseline, modules_to_save and projector included, by name.

        References, as torch's own: safetensors.torch.save_file writes them, `load_state_dict`
        takes them back. A ValueError if detached.
        """
        layers = self.plain.layers.values()
        replaced = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
        found = {k: t for k, t in self.plain.tensors().items() if id(t) not in replaced}
        for name, layer in self.layers.items():
            for key, parameter in layer.named_parameters(recurse=False):
                found[f"{checkpoint.PREFIX}{name}.{key}"] = parameter
        return {name: tensor.detach() for name, tensor in found.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over values; a ValueError, and none of them, if names or shapes do not fit."""
        expected = self.state_dict()
        checkpoint.check_tensors(tensors, expected, "tensors")
        checkpoint.copy_tensors(tensors, expected)

    def detach(self) -> nn.Module:
        """Takes everything out: the model is as before, bit for bit. A ValueError if detached."""
        return self.plain.detach()


def attach_cross_attention(
    model: nn.Module,
    config: RoutedConfig,
    *,
    heads: int = 4,
    inner_rank: int | None = None,
    context: RoutingContext | None = None,
) -> CrossAttached:
    """Puts cross-attention where `attach` would put routed LoRA, and freezes everything else.

    Args:
        model: any torch model, changed in place.
        config: what to adapt, with which rank; its route and modes are not used.
        heads, inner_rank: of `CrossAttentionLinear`; inner_rank None: `matching_inner_rank` of each
            layer, so that none has more parameters than the routed one.
        context: to share with code of your own; None: a new one.

    Raises:
        ValueError: host "adapter"; nothing matches; a target that cannot be adapted; ranks and
            heads that do not fit; a model that is attached to already. The model is then as it was.
    """
    _refuse(model, config)
    if config.routed_by != "image":
        raise ValueError(f"routed_by={config.routed_by!r}: cross-attention is to an image")
    counts = _counts(model, config) if inner_rank is None else {}
    if context is None:
        context = own_context(model) or RoutingContext()  # given, since its projector is read
    attached = attach(model, plain(config), context)
    layers: dict[str, CrossAttentionLinear] = {}
    try:
        for name, layer in attached.layers.items():
            assert isinstance(layer, RoutedLinear)
            budget = counts[name] - layer.B.numel() if inner_rank is None else None
            layers[name] = _instead_of(layer, heads, inner_rank, budget)
    except BaseException:
        attached.detach()
        raise
    instead = {id(layer): layers[name] for name, layer in attached.layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in instead:
            model.set_submodule(name, instead[id(module)])
    return CrossAttached(model, config, attached.context, layers, attached)


def _refuse(model: nn.Module, config: RoutedConfig) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    if not isinstance(config, RoutedConfig) or config.host != "lora":
        given = f"host={config.host!r}" if isinstance(config, RoutedConfig) else repr(config)
        raise ValueError(f"config must be a RoutedConfig with host='lora', got {given}")
    for name, module in model.named_modules():
        if isinstance(module, CrossAttentionLinear):
            raise ValueError(f"model has cross-attention already ({name}): detach it first")


def _instead_of(
    layer: RoutedLinear, heads: int, inner_rank: int | None, budget: int | None
) -> CrossAttentionLinear:
    base = layer.base
    assert isinstance(base, nn.Module)
    try:
        if inner_rank is None:
            g = len(layer.adapted)
            inner_rank = matching_inner_rank(layer.d, layer.rank, g, heads, budget)
        instead = CrossAttentionLinear(
            base, layer.rank, inner_rank, layer.alpha, heads=heads,
            adapted=layer.adapted, of=layer.of, dropout=layer.dropout, context=layer.context,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"target {layer.label}: {error}") from None
    for hook in layer._forward_pre_hooks.values():  # makes torch's own encoder call the layer
        instead.register_forward_pre_hook(hook)
    instead.label, instead.training = layer.label, layer.training
    return instead


def plain(config: RoutedConfig) -> RoutedConfig:
    """The same bottlenecks without a route: plain LoRA or plain adapters.

    A route has no parameters, so the counts are equal; but not to those of a configuration with
    inner_rank. `attach` then adds a projector only where a visual prefix may need it: to a model
    with a context of its own, or for a context that it is given.
    """
    return replace(
        config, route="none", transpose="exact", segments="per_group", pool="mean",
        normalize="none", inner_rank=None, routed_by="image",
    )  # fmt: skip


class PeftLora(NamedTuple):
    """Plain LoRA by PEFT.

    Attributes:
        config: a `peft.LoraConfig`.
        parameters: of its LoRA layers.
        difference: by how many these are more than those of the routed layers.
    """

    config: Any
    parameters: int
    difference: int


def peft_lora(model: nn.Module, config: RoutedConfig) -> PeftLora:
    """PEFT's LoRA on the same targets, of the rank whose parameter count is closest, same scale.

    It has r' (d + of·n) parameters a layer, the routed layer r·g (d + n): PEFT knows no segments
    and adapts a fused projection as a whole, with one A. r' = r for separate projections, and for
    two square segments of three. Of what `train` names, the targets' biases train with PEFT too;
    the others are left to the caller.

    Raises:
        ValueError: PEFT is not installed, host "adapter", or what `attach` refuses.
    """
    _refuse(model, config)
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("the package peft is missing; run: pip install peft") from None
    from transformers.pytorch_utils import Conv1D

    routed = sum(_counts(model, config).values())
    targets = find_targets(model, config)
    a_rank = sum(sum(base_features(target.module)) for target in targets)
    below = routed // a_rank
    rank = max(1, min(below, below + 1, key=lambda rank: abs(rank * a_rank - routed)))
    s = config.to_json()["lora_alpha"] / config.r
    lora = LoraConfig(
        r=rank,
        lora_alpha=s * rank,
        lora_dropout=config.dropout,
        target_modules="|".join(re.escape(target.names[0]) for target in targets),
        fan_in_fan_out=any(isinstance(target.module, Conv1D) for target in targets),
        bias="lora_only" if "host_bias" in config.train else "none",
        modules_to_save=list(config.modules_to_save) or None,
    )
    return PeftLora(lora, rank * a_rank, rank * a_rank - routed)


def parameter_table(model: nn.Module, config: RoutedConfig, heads: int = 4) -> dict[str, int]:
    """Trainable parameters of the bottlenecks by arm, without the projector's and the model's own.

    The arms are "routed" and "plain", for host "lora" also "PEFT LoRA", and with an image
    "cross-attention".

    Raises:
        ValueError: what `attach`, `attach_cross_attention` and `peft_lora` refuse.
    """
    table = {
        "routed": sum(_counts(model, config).values()),
        "plain": sum(_counts(model, plain(config)).values()),
    }
    if config.host != "lora":
        return table
    if config.routed_by == "image":
        with _random_numbers_kept(model):
            attached = attach_cross_attention(model, config, heads=heads)
            table["cross-attention"] = sum(_own_parameters(x) for x in attached.layers.values())
            attached.detach()
    return table | {"PEFT LoRA": peft_lora(model, config).parameters}


def _counts(model: nn.Module, config: RoutedConfig) -> dict[str, int]:
    """Parameters of each routed layer that `attach` would put into a model."""
    with _random_numbers_kept(model):
        attached = attach(model, config)
        first = {layer: name for name, layer in reversed(attached.layers.items())}  # if shared
        counts = {name: _own_parameters(layer) for layer, name in first.items()}
        attached.detach()
    return counts


def _own_parameters(layer: nn.Module) -> int:
    return sum(p.numel() for key, p in layer.named_parameters() if not key.startswith("base."))


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Draws nothing from the generators that a run's own layers will be drawn from."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        yield
