"""Putting routed layers into a model, and taking them out again."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, checkpoint
from .config import RoutedConfig
from .context import RoutingContext, RoutingInput, VisualProjector
from .modules import AdaptedModule, Bottleneck, RoutedAdapter, RoutedLinear, base_features, like
from .targets import Target, find_targets, is_causal, is_named

PROJECTOR = "visual_projector"

# Names in a checkpoint of the parameters of each host, as PEFT names those of its layers.
TENSOR_NAMES = {
    "lora": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "adapter": {
        "A": "adapter_A.weight",
        "b_A": "adapter_A.bias",
        "B": "adapter_B.weight",
        "b_B": "adapter_B.bias",
    },
}

# Settings in which a checkpoint may differ from the model it is loaded into: how it was trained,
# and where layers sit, which the names of their tensors tell.
MAY_DIFFER = (
    "dropout",
    "lora_dropout",
    "projector",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


@dataclass(frozen=True)
class _Replaced:
    """A module that attach put into the model, the one that was there, and their names."""

    names: tuple[str, ...]
    original: nn.Module
    layer: Bottleneck


class Attached:
    """A model with routed layers in it. Made by `attach`.

    Attributes:
        model: the model, changed in place.
        config: what was asked for.
        context: holds the routing input of all layers.
        layers: the routed layers by the name of the module they adapt.
        projector: from the features' width to the layers', or None where they agree.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RoutedConfig,
        context: RoutingContext,
        replaced: list[_Replaced],
        before: dict[str, bool],
        saved: dict[str, Tensor],
    ) -> None:
        self.model = model
        self.config = config
        self.context = context
        self.projector = context.projector
        self.layers = {r.names[0]: r.layer for r in replaced}
        self._replaced = replaced
        self._requires_grad = before
        self._saved = saved

    def using(self, x_r: Tensor | RoutingInput) -> AbstractContextManager[None]:
        """`context.using`: routes with these features inside a `with` block."""
        return self.context.using(x_r)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser gets: routed layers, projector, modules_to_save."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by their names in a checkpoint; the model's own, not copies."""
        self._refuse_detached()
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            for parameter, written in TENSOR_NAMES[self.config.host].items():
                tensor = getattr(layer, parameter, None)
                if tensor is not None:
                    found[f"{checkpoint.PREFIX}{name}.{written}"] = tensor
        for name in self._saved:
            found[f"{checkpoint.PREFIX}{name}"] = _tensor(self.model, name)
        if self.projector is not None:
            for name, tensor in self.projector.state_dict(keep_vars=True).items():
                found[f"base_model.{PROJECTOR}.{name}"] = tensor
        return found

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes adapter_model.safetensors and adapter_config.json, each whole or not at all.

        Raises:
            ValueError: detached, or `directory` is a file.
        """
        base = {"base_model_class": type(self.model).__name__}
        name = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        checkpoint.write(
            directory,
            self.tensors(),
            self.config.to_json(),
            {
                "auto_mapping": base,
                "base_model_name_or_path": name or None,
                "fused_route_version": __version__,
            },
        )

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Takes over a checkpoint's values, all of them or, if anything does not fit, none.

        Raises:
            ValueError: another model, route, rank or setting; a missing, damaged or incomplete
                file; missing or unexpected tensors, or tensors of another shape.
        """
        expected = self.tensors()
        written = checkpoint.read_config(directory)
        theirs = config_of(written, directory)
        _refuse_other_model(self.model, written, directory)
        mine = self.config.to_json()
        other = [
            f"{key} is {value!r} there, {mine[key]!r} here"
            for key, value in theirs.to_json().items()
            if key in mine and mine[key] != value and key not in MAY_DIFFER
        ]
        if theirs.host != self.config.host or other:
            raise ValueError(f"{directory} holds another adapter: {'; '.join(other)}")
        found = checkpoint.read_tensors(directory, theirs.to_json())
        checkpoint.check_tensors(found, expected, directory)
        checkpoint.copy_tensors(found, expected)

    def detach(self) -> nn.Module:
        """Takes everything out again: the model is bit for bit what it was before `attach`.

        modules_to_save get their old values back, requires_grad its old setting.

        Raises:
            ValueError: detached already.
        """
        self._refuse_detached()
        for replaced in self._replaced:
            for name in replaced.names:
                _put(self.model, name, replaced.original)
        if self.projector is not None:
            delattr(self.model, PROJECTOR)
            self.context.projector = None
        checkpoint.copy_tensors(self._saved, {n: _tensor(self.model, n) for n in self._saved})
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
        self._replaced = []
        self.context.clear()
        return self.model

    def _refuse_detached(self) -> None:
        if not self._replaced:
            raise ValueError("the routed layers were detached from the model")

    def __repr__(self) -> str:
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = sum(p.numel() for p in self.model.parameters())
        return (
            f"Attached({len(self.layers)} layers, route={self.config.route}, r={self.config.r}, "
            f"{trainable:,} of {total:,} parameters trainable)"
        )


def attach(
    model: nn.Module,
    config: RoutedConfig | str | os.PathLike[str],
    context: RoutingContext | None = None,
) -> Attached:
    """Puts routed layers into a model, in place, and freezes everything else.

    Args:
        model: any torch model; its code is not touched, its modules are kept.
        config: what to adapt and how; or the directory of a checkpoint, whose configuration and
            values are then used.
        context: to share with code of your own; None: a new one.

    Returns:
        The handle to route (`using`), train, save, load and detach with.

    Raises:
        ValueError: nothing matches, a target that cannot be adapted, a model that is attached to
            already, or a checkpoint that does not fit. The model is then as it was.
    """
    if not isinstance(config, RoutedConfig):
        directory = config
        written = checkpoint.read_config(directory)
        _refuse_other_model(model, written, directory)
        attached = attach(model, config_of(written, directory), context)
        try:
            attached.load(directory)
        except ValueError:
            attached.detach()
            raise
        return attached

    _refuse_attached(model)
    targets = find_targets(model, config)
    saved = _modules_to_save(model, config, targets)
    context = RoutingContext() if context is None else context
    layers = [_build(model, target, config, context) for target in targets]
    projector = _projector(config, {layer.d for _, layer in layers}, targets, context)

    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for target, (module, _) in zip(targets, layers, strict=True):
        for name in target.names:
            _put(model, name, module)
    for name in saved:
        _tensor(model, name).requires_grad_(_tensor(model, name).is_floating_point())
    if projector is not None:
        context.projector = projector
        model.add_module(PROJECTOR, projector)
    replaced = [
        _Replaced(target.names, target.module, layer)
        for target, (_, layer) in zip(targets, layers, strict=True)
    ]
    return Attached(model, config, context, replaced, before, saved)


def config_of(written: dict[str, Any], directory: str | os.PathLike[str]) -> RoutedConfig:
    """`RoutedConfig.from_json`, naming the checkpoint in its errors."""
    try:
        return RoutedConfig.from_json(written)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory}/{checkpoint.CONFIG}: {error}") from None


def _refuse_attached(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            raise ValueError(f"model has a routed layer already ({name}): detach it first")
    if hasattr(model, PROJECTOR):
        raise ValueError(f"model has an attribute {PROJECTOR!r} of its own")


def _refuse_other_model(
    model: nn.Module, written: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    mapping = written.get("auto_mapping")
    theirs = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if theirs not in (None, type(model).__name__):
        raise ValueError(
            f"{directory} is an adapter for {theirs}, this model is a {type(model).__name__}"
        )


def _build(
    model: nn.Module, target: Target, config: RoutedConfig, context: RoutingContext
) -> tuple[nn.Module, Bottleneck]:
    """(what replaces the target, the routed layer in it)."""
    name = target.names[0]
    if config.routing().route.scores == "text" and is_causal(model, name):
        raise ValueError(
            f"route={config.route!r} lets a token see later ones: refused for {name}, which is "
            "part of a decoder"
        )
    try:
        if config.host == "lora":
            module, layer = _linear(target.module, config, context)
        else:
            module, layer = _adapter(target.module, config, context)
    except ValueError as error:
        raise ValueError(f"target {name}: {error}") from None
    layer.label = name
    module.train(target.module.training)
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
        **like(base),
    )
    return AdaptedModule(base, adapter), adapter


def _projector(
    config: RoutedConfig, widths: set[int], targets: list[Target], context: RoutingContext
) -> VisualProjector | None:
    if config.visual_width is None or widths == {config.visual_width}:
        return None
    if context.projector is not None:
        raise ValueError("context has a projector already; leave visual_width at None")
    projector = VisualProjector(config.visual_width, widths)
    projector.requires_grad_(config.projector == "trainable")
    return projector.to(**like(targets[0].module))


def _modules_to_save(
    model: nn.Module, config: RoutedConfig, targets: list[Target]
) -> dict[str, Tensor]:
    """Copies of every parameter and buffer in modules_to_save, by name in the model."""
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


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tensor(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(parent), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor
