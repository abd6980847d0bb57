"""What takes a target's place under PEFT: the base, and the parameters of each adapter by name."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..bottleneck import NO_REPLICAS, Bottleneck, Routed
from ..config import HOSTS
from ..merge import refuse_to_merge
from ..modules import AdapterCall, LinearCall, RoutedLinear, behind, by_name, in_front, is_own
from ..recording import Recorders

# Attributes of a layer that are no parameters.
SETTINGS = {
    "lora": ("rank", "alpha", "adapted", "of", "plan"),
    "adapter": ("rank", "activation", "residual", "norm"),
}
PARAMETERS = frozenset(name for host in HOSTS.values() for name in host.tensors)
COMMON = (
    "d",
    "routing",
    "routed_by",
    "dropout",
    "context",
    "recompute",
    "impl",
    "label",
    "project",
)


def containers(host: str) -> tuple[str, ...]:
    """Names of the ModuleDicts of a layer: "lora_A" of "lora_A.weight"."""
    return tuple(dict.fromkeys(where.split(".")[0] for where in HOSTS[host].tensors.values()))


class Parameters(nn.Module):
    """The weight and bias that PEFT keeps for one adapter under one name."""


class View(Routed):
    """One adapter of a layer: its settings, and its parameters where PEFT keeps them.

    Nothing is copied: what PEFT, FSDP or load_state_dict put in a parameter's place is used.
    The layer is held weakly, so that the weights of a deleted model are freed at once.
    """

    _owner: "Callable[[], RoutedTunerLayer | None]"

    def __init__(
        self, owner: "RoutedTunerLayer", name: str, made: Bottleneck, position: str
    ) -> None:
        self._owner, self._name, self.position = ref(owner), name, position
        self._where = HOSTS[owner.host].tensors
        self.folded = None
        for setting in (*COMMON, *SETTINGS[owner.host]):
            setattr(self, setting, getattr(made, setting))

    @property
    def owner(self) -> "RoutedTunerLayer":
        """The layer.

        Raises:
            ReferenceError: it is gone.
        """
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"{self.label}: the layer of adapter {self._name!r} is gone")
        return owner

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to the layer's copy, which a weak reference could not tell.
        return {**self.__dict__, "_owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _owner=ref(state["_owner"]))

    def __getattr__(self, name: str) -> Any:
        where = self.__dict__.get("_where", {})
        if name not in where:
            if name in PARAMETERS:
                return None
            raise AttributeError(name)
        container, leaf = where[name].split(".")
        held = getattr(self.owner, container)
        return getattr(held[self._name], leaf, None) if self._name in held else None

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The layer's."""
        return self.owner.training

    @property
    def base(self) -> nn.Module:
        """The layer's."""
        return self.owner.base_layer

    def call(self, x_h: Tensor, *more: Any) -> Tensor:
        """y of x_h, in its dtype."""
        with self._products_in(x_h):
            y: Tensor = super().call(x_h, *more)  # type: ignore[misc]
        return y.to(x_h.dtype)

    def onto(self, x_h: Tensor, y: Tensor) -> Tensor:
        """y and the update."""
        with self._products_in(x_h):
            added: Tensor = super().onto(x_h, y)  # type: ignore[misc]
        return added

    def _products_in(self, x_h: Tensor) -> AbstractContextManager[Any]:
        """PEFT keeps the adapters of half-precision models in fp32: products are made as x_h is."""
        is_mixed = self.A.dtype != x_h.dtype and x_h.dtype in (torch.float16, torch.bfloat16)
        if not is_mixed or torch.is_autocast_enabled(x_h.device.type):
            return nullcontext()
        return torch.autocast(x_h.device.type, dtype=x_h.dtype)

    def own_parameters(self) -> Iterator[Tensor]:
        """Those of the adapter."""
        return (t for t in (getattr(self, name) for name in self._where) if t is not None)

    def parameters(self) -> Iterator[Tensor]:
        """What the layer computes with, as the parameters of a `Bottleneck` are."""
        return self.own_parameters()


class LinearView(View, LinearCall):
    """Of routed LoRA."""

    def parameters(self) -> Iterator[Tensor]:
        """The adapter's and the base's."""
        yield from self.own_parameters()
        yield from self.base.parameters()


class AdapterView(View, AdapterCall):
    """Of a routed adapter."""


class RoutedTunerLayer(nn.Module, BaseTunerLayer):
    """A target of PEFT's, its parameters in ModuleDicts by adapter, as PEFT wants them.

    Args:
        base_layer: what was there.
    """

    host: str
    view: type[View]
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for container in containers(self.host):
            setattr(self, container, nn.ModuleDict())
        self.views: dict[str, Any] = {}
        self.training = base_layer.training

    def add(self, name: str, made: Bottleneck, position: str) -> None:
        """Takes over a layer's parameters and settings under an adapter's name.

        What was there under that name goes, with parameters that the new one does not have.
        """
        for held in (getattr(self, container) for container in containers(self.host)):
            if name in held:
                del held[name]
        for parameter, where in HOSTS[self.host].tensors.items():
            tensor = getattr(made, parameter, None)
            if tensor is None:
                continue
            container, leaf = where.split(".")
            held = getattr(self, container)
            if name not in held:
                held[name] = Parameters()
            held[name].register_parameter(leaf, tensor)
        self.views[name] = self.view(self, name, made, position)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's own layers."""
        self.views.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def active_adapter_names(self) -> list[str]:
        """`active_adapters`, with its type."""
        names: Any = self.active_adapters
        return list(names)

    def active_views(self) -> list[Any]:
        """Of the active adapters that this layer has."""
        if self.disable_adapters:
            return []
        return [self.views[name] for name in self.active_adapter_names() if name in self.views]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_to_merge(self)

    def unmerge(self) -> None:
        refuse_to_merge(self)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(NO_REPLICAS)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No weight holds what depends on the image."""
        return False


class RoutedLoraLayer(RoutedTunerLayer):
    """Routed LoRA: y = base(x_h) + s · z Bᵀ, the updates of all active adapters added."""

    host = "lora"
    view = LinearView
    adapter_layer_names = tuple(
        dict.fromkeys(w.split(".")[0] for w in HOSTS["lora"].tensors.values())
    )

    def add(self, name: str, made: Bottleneck, position: str) -> None:
        """As every layer, which like one of attach tells its base's widths."""
        super().add(name, made, position)
        assert isinstance(made, RoutedLinear)
        self.in_features, self.out_features = made.in_features, made.out_features

    def forward(self, x_h: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if x_h is None:
            x_h = by_name(self.base_layer, kwargs)
        views = self.active_views()
        if not views:
            return self.base_layer(x_h, *args, **kwargs)
        first, *others = views
        y: Tensor = first.call(x_h, (args, kwargs))
        for view in others:
            y = view.onto(x_h, y)
        return y


class RoutedAdapterLayer(RoutedTunerLayer):
    """Routed adapters after or before the base, those of several active adapters in turn."""

    host = "adapter"
    view = AdapterView
    adapter_layer_names = tuple(
        dict.fromkeys(w.split(".")[0] for w in HOSTS["adapter"].tensors.values())
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.recorders = Recorders()
        self.recorders.take(base_layer)

    def __getattr__(self, name: str) -> Any:
        # Models look at eps, batch_first and other attributes of what is adapted here.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if is_own(name):
                raise
            base: Any = super().__getattr__("base_layer")
            is_pefts = isinstance(base, BaseTunerLayer)  # and has lora_A, which this layer has not
            return getattr(base.get_base_layer() if is_pefts else base, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        views, base = self.active_views(), self.base_layer
        if base._forward_hooks:
            self.recorders.take(base)
        call = args, kwargs
        for view in views:
            if view.position == "before":
                call = in_front(view.call, view.label, call)
        inside, more = call
        out = base(*inside, **more)
        for view in views:
            if view.position == "after":
                out = behind(view.call, view.label, out)
        if self.recorders.hooks:
            self.recorders.run(self, args, out)
        return out
