"""Folding images into routed layers, and merging layers that no image routes.

For a fixed image an affine route is z = x_t M + c, with M and c from the image alone, so that the
image can become part of the weights:

    bottleneck   z = x_h (Mᵀ A)ᵀ + (b_A M + c)
    host         y = x_h (W + s B Mᵀ A)ᵀ + (b + s B cᵀ)          linear layers, one image
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import plain_base
from .bottleneck import Bottleneck, More
from .checks import one_of, whole
from .modules import RoutedLinear
from .reference import NO_DROPOUT, grouped, image_operand, ungrouped
from .routes import Operand
from .routing_input import RoutingInput

INTO = ("bottleneck", "host")


@dataclass
class _Image:
    """What a layer runs instead of itself while images are folded into it.

    Args:
        layer: the layer; its parameters are left alone.
        batch: samples that it then takes, images times beams.
    """

    layer: Bottleneck
    batch: int
    _versions: tuple[int, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._versions = self._now()

    def _now(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.layer.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": None}  # those of a copy count anew

    def check(self, x_h: Tensor) -> None:
        """The call is one that the folded images answer; else a ValueError."""
        layer = self.layer
        if layer.training:
            raise ValueError(f"{layer.label} has an image folded in: unfold it before training")
        if self._versions is None:
            self._versions = self._now()
        if self._versions != self._now():
            raise ValueError(f"{layer.label} has changed since an image was folded in: fold again")
        if x_h.shape[0] != self.batch:
            raise ValueError(
                f"{layer.label} has images for a batch of {self.batch} folded in, x_h is a batch "
                f"of {x_h.shape[0]} (for beams: fold(…, beams=…))"
            )

    def __call__(self, x_h: Tensor, more: More) -> Tensor:
        raise NotImplementedError


@dataclass
class BesideDown(_Image):
    """Each sample's operand, prepared: A' of each sample would be B·R·d numbers."""

    given: RoutingInput

    def __call__(self, x_h: Tensor, more: More) -> Tensor:
        self.check(x_h)
        layer = self.layer
        return layer.around(
            x_h, layer.down(), layer.b_A, more, x_r=self.given, route=layer.routing, impl=layer.impl
        )


@dataclass
class IntoDown(_Image):
    """One image: A' = Mᵀ A and b' = b_A M + c take the place of A and b_A, and nothing routes."""

    A: Tensor
    b_A: Tensor | None

    def __call__(self, x_h: Tensor, more: More) -> Tensor:
        self.check(x_h)
        layer = self.layer
        return layer.around(x_h, self.A, self.b_A, more, route="none", impl=layer.impl)


@dataclass
class IntoHost(_Image):
    """One image: W' and b' take the place of the whole layer."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x_h: Tensor, more: More) -> Tensor:
        self.check(x_h)
        if any(more):
            raise ValueError(f"{self.layer.label} has an image folded in and takes x_h alone")
        return F.linear(x_h, self.weight, self.bias)


class Folded:
    """Images folded into the layers of a model, until `unfold` or the end of a `with` block.

    Attributes:
        layers: the layers that hold them.
    """

    def __init__(self, images: list[_Image]) -> None:
        self.layers = [image.layer for image in images]
        for image in images:
            image.layer.folded = image

    def unfold(self) -> None:
        """The layers are what they were, bit for bit: no parameter was touched."""
        for layer in self.layers:
            layer.folded = None
        self.layers = []

    def __enter__(self) -> "Folded":
        return self

    def __exit__(self, *_: object) -> None:
        self.unfold()


@torch.no_grad()
def fold(
    model: nn.Module, x_r: Tensor | RoutingInput, *, into: str = "bottleneck", beams: int = 1
) -> Folded:
    """Folds images into the routed layers of a model, for generating with them.

        with fold(model.eval(), image_features):
            model.generate(input_ids)

    Args:
        model: a model with routed layers, from `attach` or of your own, in evaluation mode when it
            runs.
        x_r: features as a context takes them, for B images.
        into: "bottleneck", any B: one image goes into the down-projection, of several each sample's
            operand is kept; "host", B = 1 and linear layers only: the layer becomes a plain linear
            layer. Its W' is a copy beside W.
        beams: how many rows of a batch belong to each image.

    Layers of route "none" stay as they are.

    Raises:
        ValueError: no layer is routed by an image, one whose route is not affine in x_t (relu,
            self_gram) or which cannot hold the image, or images folded in already. Nothing is then
            changed.
    """
    one_of("into", into, INTO)
    whole("beams", beams)
    given = x_r if isinstance(x_r, RoutingInput) else RoutingInput(x_r)
    if given.sample_index is not None:
        raise ValueError("sample_index is given: packed sequences cannot be folded in")
    if into == "host" and given.batch_size != 1:
        raise ValueError(f"into='host' takes one image, x_r has {given.batch_size}")
    images = []
    for layer in routed_layers(model):
        refuse_unfoldable(layer, into)
        with layer.context.using(given):
            held = layer.routing_input(given.x_r)
        assert held is not None
        operand = image_operand(
            held, layer.down(), layer.b_A, routing=layer.routing, G=groups(layer),
            dropout=NO_DROPOUT,
        )  # fmt: skip
        if any(t.shape[-2] > 1 for t in operand.tensors if operand.mix != "matrix"):
            raise ValueError(
                f"{layer.label}: transpose='eccv24' pairs visual with text tokens, which no weight "
                "can hold; use transpose='exact'"
            )
        images.append(_image(layer, held, operand, into, beams))
    if not images:
        raise ValueError(f"model={type(model).__name__} has no layer that an image routes")
    return Folded(images)


def routed_layers(model: nn.Module) -> Iterator[Bottleneck]:
    """The layers of a model that take an image."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Bottleneck) and module.routing.route.takes != "nothing":
            yield module


def refuse_unfoldable(layer: Bottleneck, into: str) -> None:
    """ValueError where the image cannot become part of this layer."""
    route = layer.routing.route
    if layer.folded is not None:
        raise ValueError(f"{layer.label} has an image folded in already: unfold it first")
    if route.first != "none" or route.scores == "text":
        raise ValueError(f"{layer.label}: route {route.name!r} is not affine in x_t")
    if layer.routed_by != "image":
        raise ValueError(f"{layer.label} is routed by its own text, not by an image")
    if into == "host":
        if not isinstance(layer, RoutedLinear):
            raise ValueError(f"{layer.label} is an adapter: it folds into='bottleneck' only")
        if plain_base(layer.base)[0] is None:
            raise ValueError(
                f"{layer.label}: into='host' needs a base that is a plain nn.Linear or Conv1D, got "
                f"{type(layer.base).__name__}"
            )


def groups(layer: Bottleneck) -> int:
    """G: column groups that the layer routes each by itself."""
    if isinstance(layer, RoutedLinear) and layer.routing.segments != "joint":
        return len(layer.adapted)
    return 1


def _image(
    layer: Bottleneck, given: RoutingInput, operand: Operand, into: str, beams: int
) -> _Image:
    batch = given.batch_size * beams
    if into == "host":
        assert isinstance(layer, RoutedLinear)
        return IntoHost(layer, batch, *host(layer, operand))
    # The routed linear has no bias in the bottleneck: what add contributes stays beside A.
    has_no_place = operand.mix == "shift" and isinstance(layer, RoutedLinear)
    if given.batch_size == 1 and not has_no_place:
        A, c = down(layer, operand)
        return IntoDown(layer, batch, A, mixed(layer.b_A, operand) if layer.b_A is not None else c)
    tensors = tuple(t.repeat_interleave(beams, 0) for t in operand.tensors)
    beside = RoutingInput(
        given.x_r.repeat_interleave(beams, 0), operand=Operand(operand.mix, tensors)
    )
    return BesideDown(layer, batch, beside)


def mixed(rows: Tensor, operand: Operand) -> Tensor:
    """rows M + c, of rows (…, R), in at least fp32 inside."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    tensors = tuple(t.to(wide) for t in operand.tensors)
    G = tensors[0].shape[1] if tensors else 1
    x = grouped(rows.to(wide).reshape(1, -1, rows.shape[-1]), G)
    return ungrouped(Operand(operand.mix, tensors)(x)).reshape(rows.shape).to(rows.dtype)


def down(layer: Bottleneck, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """(Mᵀ A, c): the columns of A are mixed as rows of text are; c is None where it is zero."""
    A = layer.down()
    if operand.mix == "shift":
        return A, operand.tensors[0].flatten()
    return mixed(A.mT, operand).mT.contiguous(), None


def host(layer: RoutedLinear, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """(W + s B Mᵀ A, b + s B cᵀ), in the dtype of W."""
    weight, bias = plain_base(layer.base)
    assert weight is not None
    A, c = down(layer, operand)
    W, b = added(layer, weight, A), bias
    if c is not None:
        start = weight.new_zeros(weight.shape[0]) if bias is None else bias
        b = added(layer, start.unsqueeze(-1), c.unsqueeze(-1)).squeeze(-1)
    return W, b


def added(layer: RoutedLinear, weight: Tensor, A: Tensor) -> Tensor:
    """weight (of·n, ·) + s B A in the rows of the adapted segments, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    blocks = list(weight.to(wide).chunk(layer.of))
    g = len(layer.adapted)
    for i, A_g, B_g in zip(
        layer.adapted, A.to(wide).chunk(g), layer.B.to(wide).chunk(g), strict=True
    ):
        blocks[i] = blocks[i] + layer.s * (B_g @ A_g)
    return torch.cat(blocks).to(weight.dtype)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds the updates of layers of route "none" to their bases, which then stand alone again.

    Returns:
        The model; where it is itself such a layer, its base.

    Raises:
        ValueError: a layer that an image routes (`fold` holds one image), an adapter, a base that
            is no plain nn.Linear or Conv1D, or one whose weight is tied to another module's.
            Nothing is then changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    layers = {m: n for n, m in model.named_modules() if isinstance(m, Bottleneck)}
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no routed layer")
    owners = _owners(model)
    merged = {}
    for layer in layers:
        _refuse_unmergeable(layer, owners)
        assert isinstance(layer, RoutedLinear)
        weight, _ = plain_base(layer.base)
        assert weight is not None
        merged[layer] = weight, added(layer, weight, layer.A)
    for weight, sum_ in merged.values():
        weight.copy_(sum_)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, RoutedLinear) and name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
    return model.base if isinstance(model, RoutedLinear) else model  # type: ignore[return-value]


def _refuse_unmergeable(layer: Bottleneck, owners: dict[int, set[int]]) -> None:
    route = layer.routing.route
    if route.takes != "nothing":
        raise ValueError(
            f"{layer.label}: route {route.name!r} depends on the image, so that no weight holds it "
            "for all images; fold(model, x_r) holds one"
        )
    if not isinstance(layer, RoutedLinear):
        raise ValueError(f"{layer.label} is an adapter: only routed linear layers merge")
    if plain_base(layer.base)[0] is None:
        raise ValueError(
            f"{layer.label}: merging needs a base that is a plain nn.Linear or Conv1D, got "
            f"{type(layer.base).__name__}"
        )
    if len(owners[id(layer.weight)]) > 1:
        raise ValueError(f"{layer.label}: the base's weight is tied to another module's")


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """Modules that hold a parameter, by the id of the parameter."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return owners
