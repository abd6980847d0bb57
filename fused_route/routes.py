"""Routing functions: what the image does to the bottleneck (arXiv 2403.09377).

A route is *prepared* from the image alone into an operand, and the operand is *mixed* into x_t:

    z = mix(first(x_t), prepare(x_v))

There are five mixes; kernels know only those. `ROUTES` is the table of routes.

Shapes: C is the width a route sees (r, or R when segments are routed jointly), x_t (…, T, C),
x_v (…, Nv, C); leading axes are sample and group. Any floating dtype, any device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .checks import one_of, shown

Mix = Literal["identity", "shift", "scale", "rank1", "matrix"]

MIXES: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x_t: x_t,
    "shift": lambda x_t, w: x_t + w,
    "scale": lambda x_t, w: x_t * w,
    "rank1": lambda x_t, u, w: (x_t * u).sum(-1, keepdim=True) * w,
    "matrix": lambda x_t, K: x_t @ K,
}

TAKES = {"identity": 0, "shift": 1, "scale": 1, "rank1": 2, "matrix": 1}  # tensors

FIRST: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x_t: x_t, "relu": torch.relu}


class Operand(
    NamedTuple
):  # not a dataclass: the compiler of torch 2.11 loses a frozen one's fields
    """What an image becomes before it meets x_t: a mix and its tensors.

    `w` and `u` are (…, 1, C), one row for all tokens of a sample (a row for each token only under
    transpose="eccv24"); `K` is (…, C, C). Build one with `identity`, `shift`, `scale`,
    `rank1` or `matrix`.
    """

    mix: Mix
    tensors: tuple[Tensor, ...] = ()

    def __call__(self, x_t: Tensor) -> Tensor:
        """z (…, T, C) from x_t (…, T, C)."""
        return MIXES[self.mix](x_t, *self.tensors)


def check_operand(argument: str, given: Any) -> None:
    """An Operand of a mix that there is, of tensors as many as it takes; else a ValueError."""
    known = isinstance(given, Operand) and given.mix in TAKES
    if not known or len(given.tensors) != TAKES[given.mix]:
        shows = f"{given.mix} of {len(given.tensors)}" if isinstance(given, Operand) else None
        raise ValueError(
            f"{argument} must be identity(), shift(w), scale(w), rank1(u, w) or matrix(K), got "
            f"{shows or type(given).__name__}"
        )
    for tensor in given.tensors:
        _tensor(f"{argument} {given.mix}", tensor)


def _tensor(argument: str, given: Any) -> Tensor:
    if not isinstance(given, Tensor):
        raise ValueError(f"{argument} must be a tensor, got {shown(given)}")
    return given


def identity() -> Operand:
    """z = x_t."""
    return Operand("identity")


def shift(w: Tensor) -> Operand:
    """z = x_t + w, w (…, 1, C)."""
    return Operand("shift", (_tensor("w", w),))


def scale(w: Tensor) -> Operand:
    """z = x_t ∘ w, w (…, 1, C)."""
    return Operand("scale", (_tensor("w", w),))


def rank1(u: Tensor, w: Tensor) -> Operand:
    """z = ⟨x_t, u⟩ w, u and w (…, 1, C)."""
    return Operand("rank1", (_tensor("u", u), _tensor("w", w)))


def matrix(K: Tensor) -> Operand:
    """z = x_t K, K (…, C, C)."""
    return Operand("matrix", (_tensor("K", K),))


@dataclass(frozen=True)
class Route:
    """One routing function.

    Args:
        name: how users and checkpoints call it.
        prepare: x_v (…, Nv, C) to an `Operand`. Masked visual tokens arrive as zero rows. A route
            that takes a vector always gets Nv = 1.
        takes: "tokens" (all of x_v), "vector" (x_v pooled to one token) or "nothing" (no image).
        first: applied to x_t before the mix: "none" or "relu".
        published: `prepare` as the published code computes it, where that differs with Nv > 1;
            used by `transpose="eccv24"` and given x_v unpooled. None: the route has no such mode.
        scores: where rank1's u comes from. "text" replaces it by Σ_t x_t: the route then mixes
            tokens in both directions, and is refused in causal decoders.
    """

    name: str
    prepare: Callable[[Tensor], Operand]
    _: KW_ONLY
    takes: Literal["nothing", "vector", "tokens"] = "tokens"
    first: Literal["none", "relu"] = "none"
    published: Callable[[Tensor], Operand] | None = None
    scores: Literal["image", "text"] = "image"

    def __post_init__(self) -> None:
        one_of("takes", self.takes, ("nothing", "vector", "tokens"))
        one_of("first", self.first, FIRST)
        one_of("scores", self.scores, ("image", "text"))
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name must be a Python identifier, got {self.name!r}")
        for name in ("prepare", "published"):
            function = getattr(self, name)
            if not callable(function) and (name == "prepare" or function is not None):
                raise ValueError(f"{name} must be callable, got {shown(function)}")

    def __reduce__(self) -> str | tuple[object, ...]:
        # prepare is often a lambda, which pickles by name only: so does a route of the table
        return (_named, (self.name,)) if ROUTES.get(self.name) is self else super().__reduce__()


def reshaped(x: Tensor) -> Tensor:
    """(…, N, C) to (…, C, N) by row-major reshape: what the published code has for a transpose."""
    return x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2])


def _ones_like(x: Tensor) -> Tensor:
    """Ones of the shape of x in the memory of one: nothing to write, save or read."""
    return x.new_ones(()).expand_as(x)


def _gram(x_v: Tensor, x_v_T: Tensor, relu: Callable[[Tensor], Tensor]) -> Operand:
    if x_v.shape[-2] == 1:  # K has rank 1: C multiplications a token instead of C²
        return rank1(relu(x_v), x_v)
    return matrix(relu(x_v_T) @ x_v)


def _ones(x_v: Tensor, x_v_T: Tensor, relu: Callable[[Tensor], Tensor]) -> Operand:
    u = relu(x_v_T).sum(-1).unsqueeze(-2)
    return rank1(u, _ones_like(u))


def _expand(x_v: Tensor) -> Operand:
    return rank1(_ones_like(x_v), x_v)


def _expand_published(x_v: Tensor) -> Operand:
    Nv, C = x_v.shape[-2:]
    if Nv == 1:
        return _expand(x_v)
    if Nv != C:
        raise ValueError(
            f"x_r has Nv = {Nv} visual tokens: route 'expand' under transpose='eccv24' takes 1 or "
            f"{C} (its width); transpose='exact' pools any number"
        )
    return matrix(x_v)


def _text_scores(x_v: Tensor) -> Operand:
    if x_v.shape[-2] != 1:
        raise ValueError(
            f"x_r has Nv = {x_v.shape[-2]} visual tokens: route 'self_gram' takes one per sample"
        )
    return _expand(x_v)


def _both(
    kind: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Operand],
    relu: Callable[[Tensor], Tensor],
) -> tuple[Callable[[Tensor], Operand], Callable[[Tensor], Operand]]:
    """(prepare, published) of a route that multiplies by x_vᵀ."""
    return (
        lambda x_v: kind(x_v, x_v.mT, relu),
        lambda x_v: kind(x_v, reshaped(x_v), relu),
    )


def _table() -> dict[str, Route]:
    gram, gram_published = _both(_gram, FIRST["none"])
    gram_relu, gram_relu_published = _both(_gram, FIRST["relu"])
    ones, ones_published = _both(_ones, FIRST["none"])
    ones_relu, ones_relu_published = _both(_ones, FIRST["relu"])
    rows = (
        Route("none", lambda x_v: identity(), takes="nothing", published=lambda x_v: identity()),
        Route("add", shift, takes="vector", published=shift),
        Route("mul", scale, takes="vector", published=scale),
        Route("gram", gram, published=gram_published),
        Route("expand", _expand, takes="vector", published=_expand_published),
        Route("gram_relu", gram_relu, first="relu", published=gram_relu_published),
        Route("ones", ones, published=ones_published),
        Route("ones_relu", ones_relu, first="relu", published=ones_relu_published),
        Route("self_gram", _text_scores, published=_text_scores, scores="text"),
    )
    return {route.name: route for route in rows}


class RouteTable(Mapping[str, Route]):
    """Routes by name: the built-in ones and those that users `register`."""

    def __init__(self, routes: dict[str, Route]) -> None:
        self._routes = routes
        self._built_in = tuple(routes)

    def __getitem__(self, name: str) -> Route:
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)

    def register(self, route: Route) -> Route:
        """Adds a user's route, so that configurations and checkpoints can name it.

        Raises:
            ValueError: no Route, or a built-in one has this name. One's own are replaced.
        """
        if not isinstance(route, Route):
            raise ValueError(f"route must be a Route, got {shown(route)}")
        if route.name in self._built_in:
            raise ValueError(
                f"name={route.name!r} is taken; built-in routes: {', '.join(self._built_in)}"
            )
        self._routes[route.name] = route
        return route


ROUTES = RouteTable(_table())


def is_built_in(route: Route) -> bool:
    """Whether this is a route of the library, and not a user's."""
    return route.name in ROUTES._built_in and ROUTES[route.name] is route


def _named(name: str) -> Route:
    one_of("route", name, ROUTES)
    return ROUTES[name]
