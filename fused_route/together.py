"""x_v of many layers in one product, when their context is set."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from .routing_input import RoutingInput

PROJECT = ("auto", "layer", "together")
# One product for all costs two launches, four with biases, and saves one a layer (docs/kernels.md).
FEWEST = 5

State = tuple[object, ...]


class Projecting(Protocol):
    """What is read of a layer."""

    @property
    def project(self) -> str:
        """One of PROJECT."""

    @property
    def d(self) -> int:
        """Width of x_r."""

    @property
    def A(self) -> Tensor:
        """(R, d)."""

    @property
    def b_A(self) -> Tensor | None:
        """(R,)."""

    def projects_as_is(self) -> bool:
        """Whether x_v = x_r Aᵀ + b_A, without dropout or anything else of the layer's own."""


class Projected(NamedTuple):
    """x_v (B, Nv, R) of one layer, and the state of what it was made of."""

    x_v: Tensor
    state: State
    is_captured: bool = False  # by a CUDA graph: there is then no value before a replay


class Together:
    """The layers of a context, whose x_v it computes at once.

    L layers of one width and rank need one batched product instead of L. Under autograd each x_v
    is for one forward pass: a layer that is called again projects by itself. Layers are held
    weakly, and copies start without any: each comes in when it is called.
    """

    def __init__(self) -> None:
        self._when: WeakKeyDictionary[Projecting, str] = WeakKeyDictionary()

    def add(self, layer: Projecting, when: str) -> None:
        """From now on the layer's x_v is projected with the others' ("together", "auto")."""
        if when != "layer":
            self._when[layer] = when

    def remove(self, layers: Iterable[Projecting]) -> None:
        """From now on these layers project by themselves."""
        for layer in layers:
            self._when.pop(layer, None)

    def __contains__(self, layer: object) -> bool:
        return layer in self._when

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._when = WeakKeyDictionary()

    def project(self, inputs: Mapping[int, RoutingInput]) -> dict[int, Projected]:
        """What each layer's A makes of the routing input of its width, by id of the layer."""
        made: dict[int, Projected] = {}
        if not self._when or torch.compiler.is_compiling():
            return made
        if torch._C._are_functorch_transforms_active():
            return made
        for layers in self._alike(inputs):
            x_r = inputs[layers[0].d].x_r
            captured = is_captured(x_r)
            for layer, x_v in zip(layers, project(x_r, layers).unbind(), strict=True):
                made[id(layer)] = Projected(x_v, state_of(layer, x_r), captured)
        return made

    def _alike(self, inputs: Mapping[int, RoutingInput]) -> list[list[Projecting]]:
        """The layers that one product can serve, and is to."""
        alike: dict[State, list[Projecting]] = {}
        for ref in self._when.keyrefs():  # a list: other threads add layers meanwhile
            layer = ref()
            when = None if layer is None else self._when.get(layer)
            if layer is None or when is None:
                continue
            given = inputs.get(layer.d)
            if given is None or not layer.projects_as_is() or not is_plain(layer):
                continue
            if layer.A.device != given.x_r.device:  # of a model on several GPUs
                continue
            if when == "auto" and (torch.is_grad_enabled() or not saves_launches(given.x_r)):
                continue
            A = layer.A
            kind = when, A.shape, A.dtype, A.device, layer.b_A is None
            alike.setdefault(kind, []).append(layer)
        return [
            layers
            for (when, *_), layers in alike.items()
            if when == "together" or len(layers) >= FEWEST
        ]


def saves_launches(x_r: Tensor) -> bool:
    """Whether launches are what counts: on a CPU stacking every A costs more than it saves."""
    return x_r.device.type == "cuda"


def is_captured(x_r: Tensor) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return x_r.is_cuda and torch.cuda.is_current_stream_capturing()


def is_plain(layer: Projecting) -> bool:
    """Whether the layer's A and b_A can be stacked: not shards, nor anything without memory."""
    A = layer.A
    both = (A,) if layer.b_A is None else (A, layer.b_A)
    return A.shape[1:] == (layer.d,) and all(
        type(t) in (Parameter, Tensor) and not t.is_meta and not t.is_inference() for t in both
    )


def state_of(layer: Projecting, x_r: Tensor) -> State:
    """What changes when A, b_A or x_r does: in place, to another tensor, or to other memory."""
    tensors = (layer.A, x_r) if layer.b_A is None else (layer.A, x_r, layer.b_A)
    return tuple(part for t in tensors for part in tensor_state(t))


def tensor_state(tensor: Tensor) -> State:
    """Of one tensor."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr()


def project(x_r: Tensor, layers: list[Projecting]) -> Tensor:
    """x_v (L, B, Nv, R) of L layers, each one's contiguous, as the kernels read it."""
    A = torch.stack([layer.A for layer in layers])
    x_v = x_r.to(A.dtype).flatten(0, 1) @ A.mT
    biases = [layer.b_A for layer in layers if layer.b_A is not None]
    if biases:
        x_v = x_v + torch.stack(biases).unsqueeze(1)
    return x_v.unflatten(1, x_r.shape[:2])
