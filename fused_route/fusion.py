"""What the kernels are told about a call: everything that is the same for all calls of a layer."""

from functools import lru_cache
from typing import NamedTuple

from .routes import ROUTES, Mix
from .routing import Routing

# Built-in routes with one visual vector x_v: (mix, u, w), where u and w are x_v as it is
# ("plain"), its relu, or "one".
OF_ONE_VECTOR: dict[str, tuple[Mix, str, str]] = {
    "add": ("shift", "one", "plain"),
    "mul": ("scale", "one", "plain"),
    "gram": ("rank1", "plain", "plain"),
    "expand": ("rank1", "one", "plain"),
    "gram_relu": ("rank1", "relu", "plain"),
    "ones": ("rank1", "plain", "one"),
    "ones_relu": ("rank1", "relu", "one"),
}


class Fusion(NamedTuple):
    """What is the same for all calls of a layer.

    Args:
        mix, u, w: the mix, and how its operands follow from the tensors they are read from.
        first: applied to x_t before the mix.
        groups: G, column groups that are routed each by itself.
        image: "none"; "owned": the kernels compute x_v from one x_r (S, d) per sample, and its
            gradient; "operand": u, w or K are given, and their gradients returned.
        base: what the update is added to: x_h ("residual"), nothing ("none"), a "frozen" linear
            layer that is part of the operation, or an output that was "given".
        activation, p: activation of z, dropout probability.
        segments, of: the column blocks of y that are adapted, of how many.
        x_t: "saved" for the backward pass, or "recomputed" there.
        products: fp32 products in "ieee" or "tf32".
        plan: of a frozen base: "p1", its product by the library, to which K1 adds; "p3", a product
            that runs over the bottleneck too; "auto", whichever is faster at this size.
    """

    mix: str
    u: str
    w: str
    first: str
    groups: int
    image: str
    base: str
    activation: str
    p: float
    segments: tuple[int, ...]
    of: int
    x_t: str
    products: str
    plan: str = "p1"

    def text(self) -> str:
        """This Fusion as one argument of the torch operators."""
        segments = ",".join(str(i) for i in self.segments)
        return (
            f"{self.mix} {self.u} {self.w} {self.first} {self.groups} {self.image} {self.base} "
            f"{self.activation} {self.p!r} {segments} {self.of} {self.x_t} "
            f"{self.products} {self.plan}"
        )

    @staticmethod
    @lru_cache(1024)  # a schedule of dropout makes ever new ones
    def of_text(text: str) -> "Fusion":
        """The Fusion whose `text()` this is."""
        (
            mix, u, w, first, groups, image, base, activation, p, segments, of, x_t, products, plan,
        ) = text.split()  # fmt: skip
        return Fusion(
            mix, u, w, first, int(groups), image, base, activation, float(p),
            tuple(int(i) for i in segments.split(",")), int(of), x_t, products, plan,
        )  # fmt: skip


def owns_image(routing: Routing, Nv: int, *, is_masked: bool, drops: bool) -> bool:
    """Whether the kernels compute x_v themselves: one visual vector per sample, as it is.

    Nv > 1 tokens count as one vector where the route pools them: the pool of x_r is projected,
    which is the pool of x_v, unless dropout hits tokens one by one.
    """
    name = routing.route.name
    if is_masked or routing.normalize != "none" or ROUTES.get(name) is not routing.route:
        return False
    pools = routing.route.takes == "vector" and routing.transpose == "exact" and not drops
    return name in OF_ONE_VECTOR and (Nv == 1 or pools)
