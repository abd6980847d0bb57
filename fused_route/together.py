"""x_v of many layers in one product, when their context is set."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .routing_input import RoutingInput

PROJECT = ("auto", "layer", "together")
# One product for all costs two launches, four with biases, and saves one a layer (docs/kernels.md).
FEWEST = 5


class Projecting(Protocol):
    """What is read of a layer."""

    slot: int

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
    """x_v (B, Nv, R) of one layer, and the A it was made with, in the state it had."""

    x_v: Tensor
    A: Tensor
    version: int


class Together:
    """The layers of a context, whose x_v it computes at once.

    L layers of one width and rank need one batched product instead of L. Under autograd each x_v
    is for one forward pass: a layer that is called again projects by itself.
    """

    def __init__(self) -> None:
        self.layers: list[Projecting] = []
        self._when: list[str] = []

    def add(self, layers: Iterable[Projecting], when: str) -> None:
        """Gives each layer its slot, unless `when` says that each projects by itself."""
        for layer in layers if when != "layer" else ():
            layer.slot = len(self.layers)
            self.layers.append(layer)
            self._when.append(when)

    def clear(self) -> None:
        """Forgets the layers: each projects by itself again."""
        for layer in self.layers:
            layer.slot = -1
        self.layers, self._when = [], []

    def project(self, inputs: Mapping[int, RoutingInput]) -> dict[int, Projected]:
        """What each layer's A makes of the routing input of its width, by slot."""
        made: dict[int, Projected] = {}
        if not self.layers or torch.compiler.is_compiling():
            return made
        for layers in self._alike(inputs):
            x_v = project(inputs[layers[0].d].x_r, layers)
            for layer, of_layer in zip(layers, x_v.unbind(), strict=True):
                made[layer.slot] = Projected(of_layer, layer.A, layer.A._version)
        return made

    def _alike(self, inputs: Mapping[int, RoutingInput]) -> list[list[Projecting]]:
        """The layers that one product can serve, and is to."""
        alike: dict[tuple[object, ...], list[Projecting]] = {}
        for layer, when in zip(self.layers, self._when, strict=True):
            if when == "auto" and torch.is_grad_enabled():
                continue
            A = layer.A
            if layer.d in inputs and layer.projects_as_is() and not A.is_meta:
                kind = when, A.shape, A.dtype, A.device, layer.b_A is None
                alike.setdefault(kind, []).append(layer)
        return [
            layers
            for (when, *_), layers in alike.items()
            if when == "together" or len(layers) >= FEWEST
        ]


def project(x_r: Tensor, layers: list[Projecting]) -> Tensor:
    """x_v (L, B, Nv, R) of L layers, each one's contiguous, as the kernels read it."""
    A = torch.stack([layer.A for layer in layers])
    x_v = x_r.to(A.dtype).flatten(0, 1) @ A.mT
    biases = [layer.b_A for layer in layers if layer.b_A is not None]
    if biases:
        x_v = x_v + torch.stack(biases).unsqueeze(1)
    return x_v.unflatten(1, x_r.shape[:2])
