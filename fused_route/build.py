"""From a configuration and a target to the module that takes its place."""

from typing import Any

from torch import Tensor, nn

from .config import RoutedConfig
from .context import RoutingContext, VisualProjector
from .modules import (
    AdaptedModule,
    Bottleneck,
    RoutedAdapter,
    RoutedLinear,
    base_features,
    weight_kind,
)
from .targets import Target, is_causal, is_named

PROJECTOR = "visual_projector"


def build(
    model: nn.Module, target: Target, config: RoutedConfig, context: RoutingContext
) -> tuple[nn.Module, Bottleneck]:
    """(what replaces the target, the routed layer in it).

    Raises:
        ValueError: the target cannot be adapted; the message names it.
    """
    name = target.names[0]
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"target {name}: nn.MultiheadAttention reads its weight and never calls it; adapt the "
            "attention as a whole (host 'adapter'), or use a model with separate projections"
        )
    if config.routing().route.scores == "text" and is_causal(model, name):
        raise ValueError(
            f"route={config.route!r} lets a token see later ones: refused for {name}, which is "
            "part of a decoder"
        )
    try:
        module, layer = _HOSTS[config.host](target.module, config, context)
    except ValueError as error:
        raise ValueError(f"target {name}: {error}") from None
    layer.label = name
    if isinstance(parent, nn.TransformerEncoderLayer):
        # In evaluation it would read the weight too; it calls its modules if one has a hook.
        module.register_forward_pre_hook(_called)
    module.training = layer.training = target.module.training
    return module, layer


def _linear(
    base: nn.Module, config: RoutedConfig, context: RoutingContext
) -> tuple[nn.Module, Bottleneck]:
    layer = RoutedLinear(
        base,
        config.r,
        config.alpha,
        config.routing(),
        adapted=config.adapted,
        of=config.of,
        dropout=config.dropout,
        context=context,
    )
    return layer, layer


def _adapter(
    base: nn.Module, config: RoutedConfig, context: RoutingContext
) -> tuple[nn.Module, Bottleneck]:
    adapter = RoutedAdapter(
        base_features(base)[1],
        config.r,
        config.routing(),
        config.activation,
        bias=config.bias,
        residual=config.residual,
        dropout=config.dropout,
        context=context,
        **weight_kind(base),
    )
    return AdaptedModule(base, adapter), adapter


_HOSTS = {"lora": _linear, "adapter": _adapter}


def _called(*_: Any) -> None:
    """A hook that does nothing but make torch call the module."""


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
    return projector.to(**weight_kind(like))


def modules_to_save(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> dict[str, Tensor]:
    """Copies of every parameter and buffer in modules_to_save, by name in the model.

    Raises:
        ValueError: a name that no module has, or a module with a target in it.
    """
    saved: dict[str, Tensor] = {}
    targeted = {name for target in targets for name in target.names}
    missed = set(config.modules_to_save)
    for name, module in model.named_modules():
        matching = {item for item in config.modules_to_save if is_named(name, (item,))}
        if not matching:
            continue
        missed -= matching
        inside = [t for t in targeted if t == name or t.startswith(f"{name}.")]
        if inside:
            raise ValueError(f"modules_to_save has {name}, in which {inside[0]} is a target")
        state = module.state_dict(keep_vars=True)
        saved |= {f"{name}.{key}": value.detach().clone() for key, value in state.items()}
    if missed:
        raise ValueError(f"modules_to_save: no module is called {', '.join(sorted(missed))}")
    return saved
