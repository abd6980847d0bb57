"""A route in the modes it runs in: which formula, over which columns, pooled and scaled how.

Shapes: x_t (B, G, T, C) and x_v (B, G, Nv, C); with segments "per_group" G = g and C = r, with
"joint" G = 1 and C = R = g·r.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .checks import one_of
from .routes import FIRST, ROUTES, Operand, Route, check_operand, rank1, reshaped

MODES = {
    "transpose": ("exact", "eccv24"),
    "segments": ("per_group", "joint"),
    "pool": ("mean", "first"),
    "normalize": ("none", "unit"),
}
COMPAT = {"eccv24": {"transpose": "eccv24", "segments": "joint"}}


def pooled(x_v: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    """One visual vector (B, G, 1, C) per sample from x_v (B, G, Nv, C); zero where none is valid.

    Masked rows of x_v are zero already.
    """
    if x_v.shape[-2] == 1:
        return x_v
    if mask is None:
        return x_v.mean(-2, keepdim=True) if pool == "mean" else x_v[..., :1, :]
    if pool == "mean":
        count = mask.sum(-1).clamp_min(1)[:, None, None, None]
        wide = torch.promote_types(
            x_v.dtype, torch.float32
        )  # a sum may overflow where no mean does
        return (x_v.sum(-2, keepdim=True, dtype=wide) / count).to(x_v.dtype)
    index = mask.to(torch.uint8).argmax(-1)[:, None, None, None]
    return x_v.gather(-2, index.expand(*x_v.shape[:2], 1, x_v.shape[-1]))


# Second moments of relu(x) for x ~ N(0, 1): E[relu(x)²] = 1/2, and E[relu(x) relu(x')] = 1/2π for
# independent x, x'. So E[xᵀx] = DIAGONAL·I + COMMON·11ᵀ.
SECOND_MOMENT = {"none": (1.0, 0.0), "relu": (0.5 - 0.5 / math.pi, 0.5 / math.pi)}

# A gain below this counts as an image of zeros: its power −3/2, in the gradient, still fits fp32.
FLOOR = 1e-24


def gain(operand: Operand, first: str = "none") -> Tensor:
    """Mean square of z over that of x_t, for x_t of C independent N(0, σ²) entries.

    scale: |w|²/C. rank1: |u|²|w|²/C. matrix: ‖K‖²/C (Frobenius). With first="relu" the mix sees
    relu(x_t), whose entries are correlated through their mean: |u|² becomes uᵀSu with S its second
    moments. For shift, which adds, |w|²/C: the mean square that is added, in units of 1.

    Returns:
        (…, 1 or T, 1), in the dtype of the operand, at least fp32.
    """
    diagonal, common = SECOND_MOMENT[first]
    tensors = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in operand.tensors]
    if operand.mix == "rank1":
        u, w = tensors
        score = diagonal * u.square().sum(-1, True) + common * u.sum(-1, True).square()
        return score * w.square().mean(-1, True)
    if operand.mix == "matrix":
        K = tensors[0]
        score = diagonal * K.square().sum(-2, True) + common * K.sum(-2, True).square()
        return score.mean(-1, True)
    (w,) = tensors
    return w.square().mean(-1, True) * (diagonal + common if operand.mix == "scale" else 1.0)


def unit(operand: Operand, first: str = "none") -> Operand:
    """The operand divided by √gain: z then has the mean square of x_t, whatever the image's scale.

    gram gets ‖K‖ = √C (for Nv = 1: ‖x_v‖ = C^¼), expand and ones ‖x_v‖ = 1, mul ‖x_v‖ = √C; add,
    which cannot multiply the scale of x_t, adds a vector of unit mean square. A zero operand (all
    tokens masked) stays zero; one whose gain exceeds fp32 becomes NaN.
    """
    if operand.mix == "identity":
        return operand
    g = gain(operand, first)
    g = torch.add(g, g, alpha=0.0)  # infinity becomes NaN: too large an image is no missing one
    is_black = g <= FLOOR
    factor = torch.where(is_black, 0.0, torch.where(is_black, 1.0, g).rsqrt())
    *rest, last = operand.tensors
    return Operand(operand.mix, (*rest, (last * factor).to(last.dtype)))


@dataclass(frozen=True, init=False)
class Routing:
    """A route and the modes it runs in.

    Args:
        route: a name in `ROUTES`, or a `Route`.
        transpose: "exact", the paper's formula; "eccv24", the published code's, which reshapes
            where the paper transposes and pairs visual with text tokens. They differ for Nv > 1.
        segments: several adapted segments are routed "per_group" (C = r columns each) or "joint"
            (C = R = g·r, all at once, as the published GPT-2 does).
        pool: how routes that take a vector get one from Nv > 1 tokens: the "mean" over valid
            tokens, or the "first" valid one.
        normalize: "none", the paper's formula; "unit" rescales what the image contributes so that
            the mix keeps the scale of x_t (see `unit`).
        compat: "eccv24" sets transpose="eccv24" and segments="joint".

    Raises:
        ValueError: an unknown name, or modes that exclude each other.
    """

    route: Route
    transpose: str
    segments: str
    pool: str
    normalize: str

    def __init__(
        self,
        route: str | Route = "mul",
        *,
        transpose: str = "exact",
        segments: str = "per_group",
        pool: str = "mean",
        normalize: str = "none",
        compat: str | None = None,
    ) -> None:
        modes = {"transpose": transpose, "segments": segments}
        if compat is not None:
            one_of("compat", compat, COMPAT)
            modes = COMPAT[compat]
        modes |= {"pool": pool, "normalize": normalize}
        for mode, value in modes.items():
            one_of(mode, value, MODES[mode])
            object.__setattr__(self, mode, value)
        if not isinstance(route, Route):
            one_of("route", route, ROUTES)
            route = ROUTES[route]
        object.__setattr__(self, "route", route)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.transpose != "eccv24":
            return
        if self.route.published is None:
            raise ValueError(
                f"transpose='eccv24' has no meaning for route {self.route.name!r}, which the "
                "published code does not have; use transpose='exact'"
            )
        if self.pool != "mean":
            raise ValueError(
                f"pool={self.pool!r} with transpose='eccv24': the published code pools nothing; "
                "use transpose='exact', or leave pool at its default"
            )

    def modes(self) -> dict[str, str]:
        """The modes by name, as checkpoints record them."""
        return {mode: getattr(self, mode) for mode in MODES}

    def operand(self, x_v: Tensor, mask: Tensor | None = None) -> Operand:
        """The operand of x_v (B, G, Nv, C); mask (B, Nv), True where a token is valid.

        Raises:
            ValueError: a mask with the published reshape, or an Nv that the route does not take.
        """
        Nv = x_v.shape[-2]
        if mask is not None:
            if self.transpose == "eccv24" and Nv > 1:
                raise ValueError(
                    f"mask with transpose='eccv24' and Nv = {Nv}: the published reshape mixes "
                    "masked with valid tokens; use transpose='exact'"
                )
            x_v = x_v.masked_fill(~mask[:, None, :, None], 0.0)
        if self.transpose == "eccv24" and self.route.published is not None:
            operand = self.route.published(x_v)
        elif self.route.takes == "vector":
            operand = self.route.prepare(pooled(x_v, mask, self.pool))
        else:
            operand = self.route.prepare(x_v)
        self.check(operand, x_v.shape, x_v.device)
        return unit(operand, self.route.first) if self.normalize == "unit" else operand

    def check(self, operand: Operand, x_v: torch.Size, device: torch.device) -> None:
        """A route, above all a user's own, must not mix samples or fall back on broadcasting.

        Raises:
            ValueError: no operand, or one that does not fit x_v of this shape (B, G, Nv, C) on
                this device.
        """
        check_operand(f"route {self.route.name!r}: what prepare returns", operand)
        B, G, Nv, C = x_v
        rows = {"matrix": (C,)}.get(operand.mix, (1, Nv) if self.transpose == "eccv24" else (1,))
        for tensor in operand.tensors:
            if tensor.device != device:
                raise ValueError(
                    f"route {self.route.name!r}: {operand.mix} is on {tensor.device}, x_v is on "
                    f"{device}"
                )
            if tensor.shape not in [(B, G, n, C) for n in rows]:
                raise ValueError(
                    f"route {self.route.name!r}: {operand.mix} takes (…, {rows[0]}, C) = "
                    f"{(B, G, rows[0], C)} for x_v {tuple(x_v)}, got {tuple(tensor.shape)}"
                )

    def mix(self, x_t: Tensor, operand: Operand) -> Tensor:
        """z (B, G, T, C) from x_t (B, G, T, C).

        Raises:
            ValueError: the operand has a row for each visual token, and they are not T.
        """
        T = x_t.shape[-2]
        rows = {1} if operand.mix == "matrix" else {w.shape[-2] for w in operand.tensors}
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if not rows <= {1, T} and not is_tracing:  # by torch.jit, sizes are tensors
            raise ValueError(
                f"x_r has Nv = {max(rows)} visual tokens: route {self.route.name!r} under "
                f"transpose='eccv24' takes 1, or pairs {T} with the T = {T} text tokens"
            )
        if self.route.scores == "text":
            x_t_T = x_t.mT if self.transpose == "exact" else reshaped(x_t)
            operand = rank1(x_t_T.sum(-1).unsqueeze(-2), operand.tensors[-1])
        return operand(FIRST[self.route.first](x_t))


def as_routing(route: str | Route | Routing) -> Routing:
    """`Routing` of a name or route in the default modes; a `Routing` as it is."""
    if isinstance(route, Routing):
        return route
    if not isinstance(route, Route):
        one_of("route", route, ROUTES)
        route = ROUTES[route]
    if torch.compiler.is_compiling():  # which looks through a cache, and warns of it
        return Routing(route)
    try:
        return _in_default_modes(route)
    except TypeError:  # its functions have no hash
        return Routing(route)


@cache
def _in_default_modes(route: Route) -> Routing:
    return Routing(route)
