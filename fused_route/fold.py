"""Folding images into routed layers.

For a fixed image an affine route is z = x_t M + c, with M and c from the image alone, so that the
image can become part of the weights:

    bottleneck   z = x_h (Mᵀ A)ᵀ + (b_A M + c)
    host         y = x_h (W + s B Mᵀ A)ᵀ + (b + s B cᵀ)          linear layers, one image
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import is_hooked, plain_base
from .bottleneck import Bottleneck, More
from .checks import one_of, whole
from .modules import LinearCall
from .reference import NO_DROPOUT, grouped, image_operand, ungrouped
from .routes import Operand
from .routing import Routing
from .routing_input import RoutingInput
from .together import tensor_state

INTO = ("bottleneck", "host")
UNROUTED = Routing("none")
Layer = Any  # a Bottleneck, or what does the same with parameters that PEFT keeps


@dataclass
class _Image:
    """What a layer runs instead of itself while images are folded into it.

    Args:
        layer: the layer; its parameters are left alone.
        batch: samples that it then takes, images times beams; None: any, all of one image.
    """

    layer: Layer
    batch: int | None
    _state: tuple[object, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._state = self._now()

    def _now(self) -> tuple[object, ...]:
        tensors = self.layer.parameters()
        scale = self.layer.s if isinstance(self.layer, LinearCall) else 1.0
        return (scale, *(part for tensor in tensors for part in tensor_state(tensor)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None}  # that of a copy is its own

    def check(self, x_h: Tensor) -> None:
        """The call is one that the folded images answer; else a ValueError."""
        layer = self.layer
        if layer.training:
            raise ValueError(f"{layer.label} has an image folded in: unfold it before training")
        if not torch.compiler.is_compiling():
            if self._state is None:
                self._state = self._now()
            if self._state != self._now():
                raise ValueError(
                    f"{layer.label} has changed since an image was folded in: fold again"
                )
        if self.batch is not None and x_h.shape[0] != self.batch:
            raise ValueError(
                f"{layer.label} has images for a batch of {self.batch} folded in, x_h is a batch "
                f"of {x_h.shape[0]} (for beams: fold(…, beams=…); an encoder runs before that, "
                "without beams: generate(encoder_outputs=…))"
            )

    def __call__(self, x_h: Tensor, more: More, **base_out: Tensor) -> Tensor:
        """The layer's output; base_out, where another layer has called the base."""
        raise NotImplementedError


@dataclass
class BesideDown(_Image):
    """Each sample's operand, prepared: A' of each sample would be B·R·d numbers."""

    given: RoutingInput
    A: Tensor

    def __call__(self, x_h: Tensor, more: More, **base_out: Tensor) -> Tensor:
        self.check(x_h)
        layer, given = self.layer, self.given
        if self.batch is None:
            given = repeated(given, x_h.shape[0])
        return layer.around(
            x_h, self.A, layer.b_A, more, x_r=given, route=layer.routing, impl=layer.impl,
            **base_out,
        )  # fmt: skip


@dataclass
class IntoDown(_Image):
    """One image: A' = Mᵀ A and b' = b_A M + c take the place of A and b_A, and nothing routes."""

    A: Tensor
    b_A: Tensor | None

    def __call__(self, x_h: Tensor, more: More, **base_out: Tensor) -> Tensor:
        self.check(x_h)
        layer = self.layer
        return layer.around(
            x_h, self.A, self.b_A, more, route=UNROUTED, impl=layer.impl, **base_out
        )


@dataclass
class IntoHost(_Image):
    """One image: W' and b' take the place of the whole layer."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x_h: Tensor, more: More, **base_out: Tensor) -> Tensor:
        self.check(x_h)
        if is_hooked(self.layer.base):  # put there since: the base is not called
            raise needs_plain_base(self.layer)
        if any(more):
            raise ValueError(f"{self.layer.label} has an image folded in and takes x_h alone")
        if base_out:
            raise ValueError(
                f"{self.layer.label} has an image folded into its base: activate its adapter "
                "first, or fold into='bottleneck'"
            )
        return F.linear(x_h, self.weight, self.bias)


class Folded:
    """Images folded into the layers of a model, until `unfold` or the end of a `with` block.

    Attributes:
        layers: the layers that hold them.
    """

    def __init__(self, images: list[_Image]) -> None:
        self.layers = [image.layer for image in images]
        self._images = images
        for image in images:
            image.layer.folded = image

    def unfold(self) -> None:
        """The layers are what they were, bit for bit: no parameter was touched.

        One that was unfolded otherwise, and holds another image since, keeps that.
        """
        for image in self._images:
            if image.layer.folded is image:
                image.layer.folded = None
        self.layers, self._images = [], []

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
        model: a model with routed layers, from `attach` or of your own, in evaluation mode.
        x_r: features as a context takes them, for B images.
        into: "bottleneck", any B: one image goes into the down-projection, of several each sample's
            operand is kept; "host", B = 1 and linear layers only: the layer becomes a plain linear
            layer. Its W' is a copy beside W.
        beams: how many rows of a batch belong to each of several images. One image is that of
            every row, however many there are. The encoder of an encoder-decoder model runs once for
            each text: call it with the images folded in without beams, and give what it returns to
            `generate(encoder_outputs=…)` with them folded in for beams.

    Layers of route "none" stay as they are. A layer, or its base, that has changed since refuses to
    run; torch does not count changes through a parameter's `.data`, and compiled calls look at
    none: these go unseen, fold again.

    Gradients reach the inputs of a folded model, but not what the image was folded with: A gets
    none, or a part, while B may get its own. Unfold before you train, also in evaluation mode.

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
    layers = list(routed_layers(model))
    for layer in layers:
        refuse_unfoldable(layer, into)
    with ExitStack() as stack:
        for context in {id(layer.context): layer.context for layer in layers}.values():
            stack.enter_context(context.using(given))
        images = [_folded(layer, into, beams) for layer in layers]
    if not images:
        raise ValueError(f"model={type(model).__name__} has no layer that an image routes")
    return Folded(images)


def unfold(model: nn.Module) -> None:
    """Takes images out of every layer of a model, such as a copy that was made while it held them.

    Raises:
        ValueError: no torch module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    for module in model.modules():
        layers = [module] if isinstance(module, Bottleneck) else []
        for layer in (*layers, *views_of(module)):
            layer.folded = None


def views_of(module: Any) -> list[Layer]:
    """The routed adapters that a target of PEFT's has, known without importing PEFT."""
    return list(module.views.values()) if hasattr(module, "active_views") else []


def routed_layers(model: nn.Module) -> Iterator[Layer]:
    """The layers of a model that take an image, those of active adapters under PEFT among them.

    Raises:
        ValueError: no torch module, or a target with several active adapters.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    for name, module in model.named_modules():
        layers = [module] if isinstance(module, Bottleneck) else []
        if hasattr(module, "active_views"):
            layers = module.active_views()
        if len(layers) > 1:
            raise ValueError(f"{name} has {len(layers)} active adapters: activate one to fold")
        yield from (layer for layer in layers if layer.routing.route.takes != "nothing")


def refuse_unfoldable(layer: Layer, into: str) -> None:
    """ValueError where the image cannot become part of this layer."""
    route = layer.routing.route
    if layer.training:
        raise ValueError(f"{layer.label} is in training mode: call model.eval() before folding")
    if layer.folded is not None:
        raise ValueError(f"{layer.label} has an image folded in already: unfold it first")
    if route.first != "none" or route.scores == "text":
        raise ValueError(f"{layer.label}: route {route.name!r} is not affine in x_t")
    if layer.routed_by != "image":
        raise ValueError(f"{layer.label} is routed by its own text, not by an image")
    if into == "host":
        if not isinstance(layer, LinearCall):
            raise ValueError(f"{layer.label} is an adapter: it folds into='bottleneck' only")
        if plain_base(layer.base)[0] is None:
            raise needs_plain_base(layer)


def needs_plain_base(layer: Layer) -> ValueError:
    """Why this layer's base cannot hold the image."""
    hooked = " with hooks" if isinstance(layer.base, nn.Module) and is_hooked(layer.base) else ""
    return ValueError(
        f"{layer.label}: into='host' needs a base that is a plain nn.Linear or Conv1D without "
        f"hooks, got {type(layer.base).__name__}{hooked}"
    )


def groups(layer: Layer) -> int:
    """G: column groups that the layer routes each by itself."""
    if isinstance(layer, LinearCall) and layer.routing.segments != "joint":
        return len(layer.adapted)
    return 1


def _folded(layer: Layer, into: str, beams: int) -> _Image:
    """What the layer runs instead, for the images that its context holds."""
    given = layer.routing_input(layer.A)
    assert given is not None
    operand = image_operand(
        given, layer.down(), layer.b_A, routing=layer.routing, G=groups(layer), dropout=NO_DROPOUT
    )
    if any(t.shape[-2] > 1 for t in operand.tensors if operand.mix != "matrix"):
        raise ValueError(
            f"{layer.label}: transpose='eccv24' pairs visual with text tokens, which no weight can "
            "hold; use transpose='exact'"
        )
    batch = None if given.batch_size == 1 else given.batch_size * beams
    if into == "host":
        assert isinstance(layer, LinearCall)
        return IntoHost(layer, batch, *host(layer, operand))
    # The routed linear has no bias in the bottleneck: what add contributes stays beside A.
    has_no_place = operand.mix == "shift" and isinstance(layer, LinearCall)
    if given.batch_size == 1 and not has_no_place:
        A, c = down(layer, operand)
        return IntoDown(layer, batch, A, mixed(layer.b_A, operand) if layer.b_A is not None else c)
    beside = repeated(RoutingInput(given.x_r, operand=operand), 1 if batch is None else beams)
    return BesideDown(layer, batch, beside, layer.down())


def repeated(given: RoutingInput, times: int) -> RoutingInput:
    """Every sample and its operand `times` times in a row."""
    if times == 1:
        return given
    assert given.operand is not None
    mix, tensors = given.operand
    operand = Operand(mix, tuple(t.repeat_interleave(times, 0) for t in tensors))
    return RoutingInput(given.x_r.repeat_interleave(times, 0), operand=operand)


def mixed(rows: Tensor, operand: Operand) -> Tensor:
    """rows M + c, of rows (…, R), in at least fp32 inside."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    tensors = tuple(t.to(wide) for t in operand.tensors)
    G = tensors[0].shape[1] if tensors else 1
    x = grouped(rows.to(wide).reshape(1, -1, rows.shape[-1]), G)
    return ungrouped(Operand(operand.mix, tensors)(x)).reshape(rows.shape).to(rows.dtype)


def down(layer: Layer, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """(Mᵀ A, c): the columns of A are mixed as rows of text are; c is None where it is zero."""
    A = layer.down()
    if operand.mix == "shift":
        return A, operand.tensors[0].flatten()
    return mixed(A.mT, operand).mT.contiguous(), None


def host(layer: LinearCall, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """(W + s B Mᵀ A, b + s B cᵀ), in the dtype of W."""
    weight, bias = plain_base(layer.base)
    assert weight is not None
    A, c = down(layer, operand)
    W, b = added(layer, weight, A), bias
    if c is not None:
        start = weight.new_zeros(weight.shape[0]) if bias is None else bias
        b = added(layer, start.unsqueeze(-1), c.unsqueeze(-1)).squeeze(-1)
    return W, b


def added(layer: LinearCall, weight: Tensor, A: Tensor) -> Tensor:
    """weight (of·n, ·) + s B A in the rows of the adapted segments, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    blocks = list(weight.to(wide).chunk(layer.of))
    g = len(layer.adapted)
    for i, A_g, B_g in zip(
        layer.adapted, A.to(wide).chunk(g), layer.B.to(wide).chunk(g), strict=True
    ):
        blocks[i] = blocks[i] + layer.s * (B_g @ A_g)
    return torch.cat(blocks).to(weight.dtype)
