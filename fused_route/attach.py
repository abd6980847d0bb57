"""Putting routed layers into a model, and taking them out again."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from . import __version__, checkpoint
from .before import _Before, find, put
from .bottleneck import Bottleneck
from .build import (
    PROJECTOR,
    Builder,
    build_projector,
    padded,
    reads_projected,
    refuse_uninitialised,
)
from .card import write_card
from .checks import one_of, shown, truth
from .config import HOSTS, RoutedConfig, identity_of
from .context import RoutingContext, VisualProjector, own_context
from .freezing import saved
from .functional import IMPLS, PLANS, Impl, ProductPlan
from .merge import merge
from .modules import AdaptedModule
from .routing_input import RoutingInput
from .targets import find_targets, refuse_compiled
from .text import follow
from .together import PROJECT
from .written import class_name, read_for

OF_PROJECTOR = f"base_model.{PROJECTOR}."  # names of its tensors in a checkpoint


class Attached:
    """A model with routed layers in it. Made by `attach`.

    Attributes:
        model: the model, changed in place.
        config: what was asked for.
        context: holds the routing input of all layers.
        layers: the routed layers by the name of the module they adapt.
        projector: from the features' width to the layers', or None where `attach` added none.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RoutedConfig,
        context: RoutingContext,
        layers: dict[str, Bottleneck],
        projector: VisualProjector | None,
        before: _Before,
    ) -> None:
        self.model = model
        self.config = config
        self.context = context
        self.layers = layers
        self.projector = projector
        self._before: _Before | None = before

    def using(
        self, x_r: Tensor | RoutingInput | None = None, *, text_mask: Tensor | str | None = None
    ) -> AbstractContextManager[None]:
        """`context.using`: routes with these features inside a `with` block."""
        return self.context.using(x_r, text_mask=text_mask)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser gets: every parameter of the model that requires a gradient.

        After `attach` these are the routed layers', the projector's, modules_to_save's and those
        that the configuration's `train` names.
        """
        return (p for p in self.model.parameters() if p.requires_grad)

    def checkpoint_activations(self, **kwargs: Any) -> None:
        """Turns on a Hugging Face model's activation (gradient) checkpointing, image included.

        The routing input is captured at forward and restored at recompute; otherwise a forward with
        another image before the backward would make gradients wrong. Keyword arguments go to the
        model's own method.

        Raises:
            ValueError: the model has no such method (checkpoint its parts with
                context_fn=context.checkpoint_contexts); or activation_checkpointing_kwargs or
                gradient_checkpointing_kwargs are given, which are set here.
        """
        checkpoint_activations(self.model, self.context, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by their names in a checkpoint; the model's own, not copies."""
        before = self._attached()
        found: dict[str, Tensor] = {}
        for name, layer in self._own().items():
            for parameter, written in HOSTS[self.config.host].tensors.items():
                tensor = getattr(layer, parameter, None)
                if tensor is not None:
                    found[f"{checkpoint.PREFIX}{name}.{written}"] = tensor
        for name in before.saved:
            tensor = find(self.model, name)
            if tensor is None:
                raise ValueError(f"the model has no {name} any more, which attach was to save")
            found[f"{checkpoint.PREFIX}{name}"] = tensor
        if self.projector is not None:
            for name, tensor in self.projector.named_parameters():
                found[f"{OF_PROJECTOR}{name}"] = tensor
        return found

    def _own(self) -> dict[str, Bottleneck]:
        """The layers without repetition: a shared one by the first name it has."""
        first: dict[Bottleneck, str] = {}
        for name, layer in self.layers.items():
            first.setdefault(layer, name)
        return {name: layer for layer, name in first.items()}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes adapter_model.safetensors and adapter_config.json, each whole or not at all.

        Beside them README.md gets a section that says what this is and how it loads; what else is
        in it stays.

        What was unfrozen by hand after `attach` trains but is not saved: name it in modules_to_save
        or train. (The model's own save_pretrained would write wrapped modules under names that no
        plain model has.)

        Raises:
            ValueError: detached, or `directory` is a file.
        """
        settings = self.config.to_json()
        name = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        description = {
            "auto_mapping": {"base_model_class": class_name(self.model)},
            "base_model_name_or_path": name or None,
            "fused_route_version": __version__,
        }
        checkpoint.write(
            directory, self.tensors(), {**settings, **description}, identity_of(settings)
        )
        write_card(directory, settings)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Takes over a checkpoint's values, all of them or, if anything does not fit, none.

        Raises:
            ValueError: another model, route, rank or setting; a missing, damaged or incomplete
                file; missing or unexpected tensors, or tensors of another shape.
        """
        expected = self.tensors()
        written, theirs = read_for(self.model, directory)
        differences = self.config.differences(theirs)
        if differences:
            raise ValueError(f"{directory} holds another adapter: {'; '.join(differences)}")
        found = checkpoint.read_tensors(directory, identity_of(written))
        if self.projector is None and self.config.routing().route.takes == "nothing":
            found = {name: tensor for name, tensor in found.items() if not _is_projectors(name)}
        checkpoint.check_tensors(found, expected, directory)
        checkpoint.copy_tensors(found, expected)

    def detach(self) -> nn.Module:
        """Takes everything out again: the model is bit for bit what it was before `attach`.

        modules_to_save and buffers (a norm's running statistics) get their old values back,
        requires_grad its old setting; gradients of modules_to_save are dropped. Values of what was
        unfrozen by hand after `attach`, and has trained, stay as they are. A buffer that the
        model has replaced since by one of another shape, or by None, is left as it is: a cache of
        rotary embeddings that grew, on whose length the model counts.

        Raises:
            ValueError: detached already; or the model has since lost a module that holds a target,
                or what trains (modules_to_save, train) or its shape. Nothing is then changed: put
                that back, and detach again.
        """
        before = self._attached()
        before.refuse_changed(self.model)
        self.context.together.remove(self.layers.values())
        if self.projector is not None:
            self.model._modules.pop(PROJECTOR, None)
            self.context.projector = None
        before.put_back(self.model)
        self._before = None
        return self.model

    def merge(self) -> nn.Module:
        """Adds the updates to the weights and takes the layers out: a plain model, for any image.

        What trained beside them (modules_to_save, train) keeps its values; requires_grad is what it
        was. The layers cannot be put back: `save` first.

        Raises:
            ValueError: as `fused_route.merge`: any route but "none", adapters, bases that are not
                plain or tied; or detached already. Nothing is then changed.
        """
        before = self._attached()
        merge(self.model)
        before.saved, before.modules, before.buffers, self.layers = {}, {}, {}, {}
        return self.detach()

    def _attached(self) -> _Before:
        if self._before is None:
            raise ValueError("the routed layers were detached from the model")
        if any(layer.is_merged for layer in self.layers.values()):
            raise ValueError("the routed layers were merged into the model: there is no way back")
        return self._before

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
    *,
    impl: Impl = "auto",
    recompute: bool = False,
    plan: ProductPlan = "auto",
    project: str = "auto",
) -> Attached:
    """Puts routed layers into a model, in place, and freezes everything else.

    Args:
        model: any torch model; its code is not touched, its modules are kept.
        config: what to adapt and how; or the directory of a checkpoint, whose configuration and
            values are then used.
        context: to share with code of your own; None: the model's own, an attribute `context` that
            its forward sets, or a new one.
        impl, recompute: of the layers, as in `RoutedLinear`.
        plan: of the linear layers, as in `RoutedLinear`; adapters have none and ignore it.
        project: who computes x_v = x_r Aᵀ. "layer", each when it is called; "together", the context
            for all layers of one width and rank in one product when it is set, for one backward
            pass; "auto", together where that saves launches: on a GPU, without gradients, from
            five layers on (docs/kernels.md).

    Returns:
        The handle to route (`using`), train, save, load and detach with.

    Raises:
        ValueError: nothing matches, a target that cannot be adapted, a model that is attached to
            already, has routed adapters of PEFT's or is compiled (attach first, then compile), or a
            checkpoint that does not fit. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    refuse_compiled(name for name, _ in model.named_children())
    if not isinstance(context, (RoutingContext, type(None))):
        raise ValueError(f"context must be a RoutingContext, got {type(context).__name__}")
    one_of("impl", impl, IMPLS)
    one_of("plan", plan, PLANS)
    one_of("project", project, PROJECT)
    options = {"impl": impl, "recompute": truth("recompute", recompute), "plan": plan}
    shared = context
    context = shared or own_context(model) or RoutingContext()
    if isinstance(config, RoutedConfig):
        is_read = reads_projected(model, config, shared)
        return _attach(model, config, context, options, project, is_read)
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(
            f"config must be a RoutedConfig or a directory, got {type(config).__name__}"
        )
    written, theirs = read_for(model, config)
    # before anything of these sizes is made
    tensors = checkpoint.read_tensors(config, identity_of(written))
    is_read = theirs.routing().route.takes != "nothing" or any(map(_is_projectors, tensors))
    attached = _attach(model, theirs, context, options, project, is_read)
    try:
        attached.load(config)
    except BaseException:
        attached.detach()
        raise
    return attached


def _attach(
    model: nn.Module,
    config: RoutedConfig,
    context: RoutingContext,
    options: dict[str, Any],
    project: str,
    is_read: bool,
) -> Attached:
    _refuse_routed(model)
    refuse_uninitialised(model)
    targets = find_targets(model, config)
    before = _Before(saved=saved(model, config, targets))
    builder = Builder(model, config, context, options)
    built = [builder.build(target) for target in targets]
    widths = {layer.d for _, layer in built}
    projector = None
    if is_read:
        projector = build_projector(model, config, widths, context, targets[0].module)
    before.hooks += follow(model, config, targets, context)
    # Nothing is refused from here on.
    before.hooks += padded(model, targets)
    before.read(model)
    model.requires_grad_(False)
    for target, (module, _) in zip(targets, built, strict=True):
        for name in target.names:
            before.modules[name] = target.module
            put(model, name, module)
        if isinstance(module, AdaptedModule):
            module.recorders.take(target.module)
    _unfreeze(model, before.saved)
    if projector is not None:
        context.projector = projector
        model.add_module(PROJECTOR, projector)
    layers = {t.names[0]: layer for t, (_, layer) in zip(targets, built, strict=True)}
    # expand alone loses launches: the vector of ones beside x_v is then made in torch
    when = "layer" if project == "auto" and config.route == "expand" else project
    for layer in layers.values():
        layer.project = when
        context.together.add(layer, when)
    return Attached(model, config, context, layers, projector, before)


def _unfreeze(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        tensor = find(model, name)
        assert tensor is not None
        tensor.requires_grad_(isinstance(tensor, nn.Parameter) and tensor.is_floating_point())


def _refuse_routed(model: nn.Module) -> None:
    """ValueError where a model has routed layers already, of this library's or of PEFT's."""
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            raise ValueError(f"model has a routed layer already ({name}): detach it first")
        if hasattr(module, "active_views"):
            raise ValueError(
                f"model has a routed layer of PEFT's already ({name}), which would be frozen: "
                "unload() it first, or add_adapter there"
            )


def checkpoint_activations(model: nn.Module, context: RoutingContext, **kwargs: Any) -> None:
    """Turns on a Hugging Face model's activation (gradient) checkpointing, image included.

    Args:
        context: of the model's routed layers; its routing input is captured at forward and restored
            at recompute.
        kwargs: for the model's own method.

    Raises:
        ValueError: the model has no such method, or kwargs has what it is given here.
    """
    kinds = ("activation", "gradient")  # the second until transformers 5.x renamed it
    for name in (f"{kind}_checkpointing_kwargs" for kind in kinds):
        if name in kwargs:
            raise ValueError(
                f"{name}={shown(kwargs[name])}: its use_reentrant and context_fn are set here, so "
                "that the image is kept; leave it out"
            )
    for kind in kinds:
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None:
            captured = {
                "use_reentrant": False,
                "context_fn": context.checkpoint_contexts,
            }
            enable(**{f"{kind}_checkpointing_kwargs": captured}, **kwargs)
            return
    raise ValueError(
        f"model={type(model).__name__} has no activation_checkpointing_enable; pass "
        "context_fn=context.checkpoint_contexts to torch.utils.checkpoint"
    )


def _is_projectors(name: str) -> bool:
    return name.startswith(OF_PROJECTOR)
