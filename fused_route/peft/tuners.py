"""The tuners: PEFT's way of putting routed layers into a model and of keeping their values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..attach import checkpoint_activations as turn_on
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


class _RoutedModel(BaseTuner):
    """What both tuners share.

    The context is the model's own (an attribute `context`, which its forward sets) or a new one.
    """

    layer: type[RoutedTunerLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _hooks: Any = ()
    _padded: Any = ()

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if not hasattr(config, "routed"):
            raise ValueError(
                f"adapter {adapter_name!r}: {type(config).__name__} is no routed configuration"
            )
        self._routed: RoutedConfig = config.routed()
        if self._routed.visual_width is not None and len(self.peft_config) > 1:
            raise ValueError(
                f"adapter {adapter_name!r}: visual_width with several adapters; project the "
                "features yourself"
            )
        refuse_uninitialised(model)
        self._targets = find_targets(model, self._routed)
        self._target_names = {name for target in self._targets for name in target.names}
        if self._routed.target_modules == ALL_LINEAR:  # PEFT would name others
            config.target_modules = sorted(self._target_names)
        self._context = self._find_context(model)
        self._widths: set[int] = set()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._padded = [*self._padded, *padded(model, self._targets)]
        if not self._hooks:
            self._hooks = follow(model, self._routed, self._targets, self._context)
        self._add_projector(model, self._widths, config.inference_mode)

    @property
    def context(self) -> RoutingContext:
        """Holds the routing input of all layers: `with model.context.using(image):`."""
        return self._context

    def _find_context(self, model: nn.Module) -> RoutingContext:
        own = own_context(model)
        if own is not None:
            return own
        try:
            return context_of(model)
        except ValueError:
            return RoutingContext()

    def _add_projector(self, model: nn.Module, widths: set[int], inference_mode: bool) -> None:
        if not reads_projected(model, self._routed, None):
            return
        like = next((module for _, module in self._find_layers()), model)
        projector = build_projector(
            model, self._routed, widths, self._context, getattr(like, "base_layer", like)
        )
        if projector is None:
            return
        if inference_mode:
            projector.requires_grad_(False)
        self._context.projector = projector
        setattr(self, PROJECTOR, projector)

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
        for hook in (*self._hooks, *self._padded):
            hook.remove()
        if hasattr(self, PROJECTOR):
            self._context.projector = None
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
