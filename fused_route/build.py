"""From a configuration and a target to the module that takes its place."""

import re
import warnings
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .bases import base_features, hidden_width, weight_kind
from .bottleneck import Bottleneck
from .config import RoutedConfig
from .context import RoutingContext, VisualProjector, own_context
from .modules import AdaptedModule, RoutedAdapter, RoutedLinear
from .surroundings import is_causal, is_sequence_first, reads_weight
from .targets import Target, block_of

PROJECTOR = "visual_projector"


@dataclass
class Builder:
    """Makes the layers of one model.

    Args:
        options: arguments of the layers that no checkpoint records: impl, recompute, plan.
    """

    model: nn.Module
    config: RoutedConfig
    context: RoutingContext
    options: dict[str, Any]
    _shared: dict[str, RoutedAdapter] = field(default_factory=dict)
    _warned: set[tuple[type, str]] = field(default_factory=set)

    def build(self, target: Target) -> tuple[nn.Module, Bottleneck]:
        """(what replaces the target, the routed layer in it).

        Raises:
            ValueError: the target cannot be adapted; the message names it.
        """
        name = target.names[0]
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target {name}: nn.MultiheadAttention reads its weight and never calls it; adapt "
                "the attention as a whole (host 'adapter'), or use a model with separate "
                "projections"
            )
        self._refuse_future(name)
        try:
            module, layer = _HOSTS[self.config.host](self, target)
        except ValueError as error:
            raise ValueError(f"target {name}: {error}") from None
        self._look_around(name, parent)
        keep_called(parent, module)
        module.training = layer.training = target.module.training
        return module, layer

    def _look_around(self, name: str, parent: nn.Module) -> None:
        """ValueError for tokens before samples, a warning for a weight that is read."""
        if self.config.routing().route.takes != "nothing" and is_sequence_first(self.model, name):
            raise ValueError(
                f"target {name}: its hidden states are (T, B, d), tokens before samples, and those "
                "of routed layers (B, …, d); use batch_first=True where the model has it"
            )
        part = (type(parent), name.rpartition(".")[2])
        if (
            self.config.host == "lora"
            and part not in self._warned
            and reads_weight(parent, part[1])
        ):
            self._warned.add(part)  # the same is true of every block's
            warnings.warn(
                f"target {name}: {type(parent).__name__} reads its weight; where it does so "
                "instead of calling it, nothing is routed and nothing trained",
                stacklevel=5,
            )

    def _refuse_future(self, name: str) -> None:
        config = self.config
        reads = {
            f"route={config.route!r}": config.routing().route.scores == "text",
            "routed_by='text'": config.routed_by == "text",
        }
        for setting, reads_all in reads.items():
            if reads_all and is_causal(self.model, name):
                raise ValueError(
                    f"{setting} lets a token see later ones: refused for {name}, which is part of "
                    "a decoder"
                )

    def _linear(self, target: Target) -> tuple[nn.Module, Bottleneck]:
        config = self.config
        try:
            base_features(target.module)
        except ValueError:
            raise ValueError(
                f"{type(target.module).__name__} is no linear layer, as host='lora' needs: "
                "nn.Linear, Conv1D, or what tells in_features and out_features; host='adapter' "
                "takes norms and whole modules too"
            ) from None
        layer = RoutedLinear(
            target.module,
            config.r,
            config.alpha,
            adapted=config.adapted,
            of=config.of,
            **self._common(),
        )
        layer.label = target.names[0]
        return layer, layer

    def _adapter(self, target: Target) -> tuple[nn.Module, Bottleneck]:
        config, module, name = self.config, target.module, target.names[0]
        block = block_of(name, config.layers_pattern)
        place = name if config.share == "none" else block
        if place is None:
            raise ValueError("share='block', but its name has no layer index")
        width = hidden_width(module, config.position, self.model)
        adapter = self._shared.get(place)
        common = self._common()
        common.pop("plan", None)  # it has no base
        if adapter is None:
            adapter = self._shared[place] = RoutedAdapter(
                width,
                config.r,
                activation=config.activation,
                bias=config.bias,
                residual=config.residual,
                norm=config.norm,
                **common,
                **weight_kind(_with_weight(module)),
            )
            adapter.label = place
        if adapter.d != width:
            raise ValueError(f"share='block', but {place} has targets {adapter.d} and {width} wide")
        return AdaptedModule(module, adapter, config.position), adapter

    def _common(self) -> dict[str, Any]:
        config = self.config
        return {
            "route": config.routing(),
            "inner_rank": config.inner_rank,
            "routed_by": "text" if config.routed_by == "text" else "image",
            "dropout": config.dropout,
            "context": self.context,
            **self.options,
        }


_HOSTS = {"lora": Builder._linear, "adapter": Builder._adapter}


def _with_weight(module: nn.Module) -> object:
    """What tells device and dtype: the module, or the first parameter inside it."""
    if getattr(module, "weight", None) is not None:
        return module
    return _Weight(next(module.parameters(), None))


@dataclass
class _Weight:
    weight: nn.Parameter | None


def refuse_uninitialised(model: nn.Module) -> None:
    """ValueError where a model has lazy parameters, whose shape its first batch tells."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"model: {name} is not initialised yet: run a batch through the model first"
            )


def keep_called(parent: nn.Module, module: nn.Module) -> None:
    """Has torch's encoder layer call a part of it in evaluation too, where it would read weights.

    It calls its parts if one of them has a hook.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        module.register_forward_pre_hook(_called)


def _called(*_: Any) -> None:
    """A hook that does nothing but make torch call the module."""


class Padded:
    """Has an nn.TransformerEncoder hand on padded batches, until it is removed.

    With a padding mask, in evaluation, it would make nested tensors of them, for layers that read
    weights.
    """

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        """The encoder is as it was."""
        self.encoder.use_nested_tensor = True


def padded(model: nn.Module, targets: list[Target]) -> list[Padded]:
    """The encoders around targets that would hand on nested tensors, kept from it."""
    around = (
        model.get_submodule(name[:end])
        for target in targets
        for name in target.names
        for end in (0, *(dot.start() for dot in re.finditer(r"\.", name)))
    )
    encoders = dict.fromkeys(
        module for module in around if isinstance(module, nn.TransformerEncoder)
    )
    return [Padded(encoder) for encoder in encoders if getattr(encoder, "use_nested_tensor", False)]


def reads_projected(model: nn.Module, config: RoutedConfig, context: RoutingContext | None) -> bool:
    """Whether anything may read what a projector makes.

    Layers that an image routes do. With route "none", code that was given a context to share, and
    a model with a context of its own, unless its attribute `reads_routing_input` is False.
    """
    if config.routing().route.takes != "nothing" or context is not None:
        return True
    return own_context(model) is not None and getattr(model, "reads_routing_input", True)


def build_projector(
    model: nn.Module, config: RoutedConfig, widths: set[int], context: RoutingContext, like: object
) -> VisualProjector | None:
    """From visual_width to the layers' widths; None where they agree.

    Raises:
        ValueError: the context has a projector already, or the model has no place for one.
    """
    if config.visual_width is None or widths == {config.visual_width}:
        return None
    if context.projector is not None:
        raise ValueError("context has a projector already; leave visual_width at None")
    if hasattr(model, PROJECTOR):
        raise ValueError(f"model has an attribute {PROJECTOR!r} of its own")
    if isinstance(model, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"visual_width with a {type(model).__name__}: the projector would become one of its "
            "layers; attach to a module around it, or project the features yourself"
        )
    projector = VisualProjector(config.visual_width, widths)
    projector.requires_grad_(config.projector == "trainable").train(model.training)
    kind = weight_kind(like)
    if any(parameter.is_meta for parameter in projector.parameters()):
        # PEFT's low_cpu_mem_usage: the values are still to come, from a file.
        return projector.to(dtype=kind["dtype"])
    return projector.to(**kind)
