"""The tuners: PEFT's way of putting routed layers into a model and of keeping their values."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..attach import checkpoint_activations as turn_on
from ..bases import hidden_width
from ..build import (
    PROJECTOR,
    Builder,
    build_projector,
    keep_called,
    padded,
    reads_projected,
    refuse_uninitialised,
)
from ..config import RoutedConfig
from ..context import RoutingContext, own_context
from ..merge import refuse_to_merge
from ..targets import ALL_LINEAR, Target, find_targets
from ..text import follow
from .layers import RoutedAdapterLayer, RoutedLoraLayer, RoutedTunerLayer


def context_of(model: nn.Module) -> RoutingContext:
    """The context of a model with routed adapters of PEFT's, for `with context.using(image):`.

    Raises:
        ValueError: the model has none.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, RoutedTunerLayer) and module.views:
            return next(iter(module.views.values())).context
    raise ValueError(f"model={type(model).__name__} has no routed adapter of PEFT's")


def checkpoint_activations(model: nn.Module, **kwargs: Any) -> None:
    """`Attached.checkpoint_activations` for a model with routed adapters of PEFT's.

    Raises:
        ValueError: the model has no routed adapter, or no activation checkpointing.
    """
    turn_on(model, context_of(model), **kwargs)


def _needs_projector(model: nn.Module, config: RoutedConfig, targets: list[Target]) -> bool:
    """Whether features of visual_width have to be projected for layers that read them."""
    if config.visual_width is None or not reads_projected(model, config, None):
        return False
    bases = (getattr(target.module, "base_layer", target.module) for target in targets)
    position = config.position if config.host == "adapter" else "before"
    try:
        widths = {hidden_width(base, position, model) for base in bases}
    except ValueError:  # which the layers' builder says with the target's name
        return False
    return widths != {config.visual_width}


def _apart(model: nn.Module, targets: list[Target], config: Any) -> list[Target]:
    """The targets, none of them in what PEFT copies for modules_to_save, and each in one place.

    A copy has a context that nobody sets, which route "none" does without. "all-linear" passes by
    what is in there; PEFT takes modules_to_save for ends of names.

    Raises:
        ValueError: another target in a module that is copied, or one with several names, of which
            PEFT replaces the first alone.
    """
    routed = config.routed()
    reads = routed.routing().route.takes != "nothing"
    saved: Any = tuple(getattr(config, "modules_to_save", None) or ()) if reads else ()
    copied = [
        name
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or name.endswith(saved)
    ]
    inside = {name: outer for outer in copied for name in _names_in(model, outer)}
    if routed.target_modules == ALL_LINEAR:
        targets = [target for target in targets if target.names[0] not in inside]
    layers = (n for n, module in model.named_modules() if isinstance(module, RoutedTunerLayer))
    for name in (*layers, *(target.names[0] for target in targets)):
        if name in inside:
            by_task = f", by task_type={config.task_type!r}" if config.task_type else ""
            raise ValueError(
                f"modules_to_save has {inside[name]}{by_task}, in which {name} is a target: name "
                "targets outside of it"
            )
    for target in targets:
        name, *others = target.names
        if others:
            raise ValueError(
                f"target {name} is {', '.join(others)} too: PEFT adapts one of them; `attach` "
                "adapts a module in all its places"
            )
    return targets


def _names_in(model: nn.Module, outer: str) -> Iterator[str]:
    """Of a module and all that is in it."""
    return (name for name, _ in model.get_submodule(outer).named_modules(prefix=outer))


class _Use:
    """Whether an adapter is in use: active, and not disabled, in a layer that still has it."""

    def __init__(self, layers: list[RoutedTunerLayer], name: str) -> None:
        self.name = name
        self.held = [(layer, layer.views[name]) for layer in layers if name in layer.views]

    def __call__(self) -> bool:
        return any(
            layer.views.get(self.name) is view
            and self.name in layer.active_adapter_names()
            and not layer.disable_adapters
            for layer, view in self.held
        )


class _RoutedModel(BaseTuner):
    """What both tuners share.

    The context is the model's own (an attribute `context`, which its forward sets) or a new one.
    """

    layer: type[RoutedTunerLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _padded: Any = ()

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # Who passes a single configuration keeps the layers and drops the tuner.
        self._is_kept = not isinstance(peft_config, PeftConfig)
        self._hooks: dict[str, list[Any]] = {}  # by adapter; what follows injects the first
        self._projected: str | None = None  # the adapter that has a projector
        super().__init__(model, peft_config, *args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if not hasattr(config, "routed"):
            raise ValueError(
                f"adapter {adapter_name!r}: {type(config).__name__} is no routed configuration"
            )
        routed: RoutedConfig = config.routed()
        refuse_uninitialised(model)
        targets = _apart(model, find_targets(model, routed), config)
        self._refuse_projector(adapter_name, routed, _needs_projector(model, routed, targets))
        self._routed, self._targets = routed, targets
        self._target_names = {name for target in targets for name in target.names}
        if routed.target_modules == ALL_LINEAR:  # PEFT would name others
            config.target_modules = sorted(self._target_names)
        self._context = self._find_context(model)
        self._widths: set[int] = set()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._padded = [*self._padded, *padded(model, targets)]
        use = _Use([layer for _, layer in self._find_layers()], adapter_name)
        self._hooks[adapter_name] = follow(model, routed, targets, self._context, use)
        self._add_projector(model, adapter_name)

    def _refuse_projector(self, adapter_name: str, routed: RoutedConfig, is_needed: bool) -> None:
        if is_needed and not self._is_kept:
            raise ValueError(
                f"visual_width={routed.visual_width}: its projector would be neither trained nor "
                "saved with a model's own add_adapter or inject_adapter_in_model; use "
                "get_peft_model, or project the features yourself"
            )
        others = [name for name in self.peft_config if name != adapter_name]
        if others and (is_needed or self._projected in others):
            raise ValueError(
                f"adapter {adapter_name!r}: visual_width with several adapters (there is "
                f"{', '.join(others)}), which would share a projector; project the features "
                "yourself"
            )

    @property
    def context(self) -> RoutingContext:
        """Holds the routing input of all layers: `with model.context.using(image):`."""
        return self._context

    def _find_context(self, model: nn.Module) -> RoutingContext:
        own = own_context(model) or self.__dict__.get("_context")
        if own is not None:
            return own
        try:
            return context_of(model)
        except ValueError:
            return RoutingContext()

    def _add_projector(self, model: nn.Module, adapter_name: str) -> None:
        if not reads_projected(model, self._routed, None):
            return
        like = next((module for _, module in self._find_layers()), model)
        projector = build_projector(
            model, self._routed, self._widths, self._context, getattr(like, "base_layer", like)
        )
        if projector is None:
            return
        self._context.projector = projector
        setattr(self, PROJECTOR, projector)
        self._projected = adapter_name
        self._train_projector_with_its_adapter()

    def _drop_projector(self) -> None:
        if self._projected is not None:
            self._modules.pop(PROJECTOR, None)
            self._context.projector = self._projected = None

    def _train_projector_with_its_adapter(self) -> None:
        """It trains where the adapter does, the only one there then is, unless it is frozen."""
        if self._projected is None:
            return
        views = (view for _, layer in self._find_layers() for view in layer.views.values())
        trains = any(p.requires_grad for view in views for p in view.own_parameters())
        is_frozen = self.peft_config[self._projected].projector == "frozen"
        getattr(self, PROJECTOR).requires_grad_(trains and not is_frozen)

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's.

        Raises:
            ValueError: in an encoder-decoder model, some routed by the image and some not.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._refuse_mixed([name for name in names if name in self.peft_config])
        super().set_adapter(adapter_name, *args, **kwargs)
        self._train_projector_with_its_adapter()

    def _refuse_mixed(self, names: list[str]) -> None:
        configs = [self.peft_config[name].routed() for name in names]
        kinds = {c.routed_by for c in configs if c.routing().route.takes != "nothing"}
        if "image" in kinds and any(self._hooks.get(name) for name in names):
            others = " and ".join(sorted(kinds - {"image"}))
            raise ValueError(
                f"adapter_name={names}: adapters routed by the image and by {others} cannot be "
                "active together in an encoder-decoder model, which sets the image aside for the "
                "latter"
            )

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the projector with its adapter."""
        super().set_requires_grad(*args, **kwargs)
        self._train_projector_with_its_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; what belongs to the adapter alone goes too: its projector, its hooks."""
        super().delete_adapter(adapter_name)
        for hook in self._hooks.pop(adapter_name, ()):
            hook.remove()
        if adapter_name == self._projected:
            self._drop_projector()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        projector = getattr(self, PROJECTOR, None)
        if projector is not None and autocast_adapter_dtype:
            for parameter in projector.parameters():
                if parameter.dtype.itemsize < 4:  # GradScaler takes no fp16 gradients
                    parameter.data = parameter.data.float()

    def _find_layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            if isinstance(module, RoutedTunerLayer):
                yield name, module

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        return key in self._target_names

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_ours = isinstance(target, RoutedTunerLayer)
        base: Any = target.base_layer if is_ours else target
        builder = Builder(self.model, self._routed, self._context, {})
        _, made = builder.build(Target(base, (current_key,)))
        new = target if is_ours else self.layer(base)
        assert isinstance(new, RoutedTunerLayer)
        new.add(adapter_name, made, self._routed.position)
        self._widths.add(made.d)
        if adapter_name not in self.active_adapters:
            for parameter in new.views[adapter_name].own_parameters():
                parameter.requires_grad_(False)
        if not is_ours:
            keep_called(parent, new)
            self._replace_module(parent, target_name, new, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Layers are made on their base's device, and a base may have no weight to take over.
        if isinstance(child, RoutedAdapterLayer):
            child.recorders.give_back(child.base_layer)
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        """The base model without any routed layer, bit for bit as it was."""
        for hook in (*chain.from_iterable(self._hooks.values()), *self._padded):
            hook.remove()
        self._drop_projector()
        unloaded: nn.Module = super().unload()
        return unloaded

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        biases = {name: getattr(config, "bias", None) for name, config in self.peft_config.items()}
        try:  # PEFT reads "bias" as the name of a rule
            for config in self.peft_config.values():
                config.bias = "none"
            super()._mark_only_adapters_as_trainable(model)
        finally:
            for name, config in self.peft_config.items():
                if biases[name] is None:
                    del config.bias
                else:
                    config.bias = biases[name]

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: Any
    ) -> dict[str, Tensor]:
        return {}

    def _check_new_adapter_config(self, config: Any) -> None:
        """PEFT's rule is about biases, which routed adapters leave alone."""

    def disable_adapter_layers(self) -> None:
        """The base model's outputs from now on."""
        self._enable_adapter_layers(enabled=False)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._train_projector_with_its_adapter()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        refuse_to_merge(self.model)

    unmerge_adapter = merge_adapter

    def _check_merge_allowed(self) -> None:
        refuse_to_merge(self.model)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise ValueError(
            "routed adapters cannot be combined by weights: they are not linear in A and B"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No weight holds what depends on the image."""
        return False

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: a batch of several adapters would drop the image; run each alone"
            )
        yield


class RoutedLoraModel(_RoutedModel):
    """Routed LoRA in a model: what `get_peft_model` makes of a `RoutedLoraConfig`."""

    prefix = "lora_"
    layer = RoutedLoraLayer
    tuner_layer_cls = RoutedLoraLayer


class RoutedAdapterModel(_RoutedModel):
    """Routed adapters in a model: what `get_peft_model` makes of a `RoutedAdapterConfig`."""

    prefix = "adapter_"
    layer = RoutedAdapterLayer
    tuner_layer_cls = RoutedAdapterLayer
