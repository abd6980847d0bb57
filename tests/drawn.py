"""Calls of the reference for hypothesis to draw: any shape, dtype, layout, route and mode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import BUILT_IN, VALID_MODES, takes
from hypothesis import strategies as st
from torch import Tensor

from fused_route import Routing, RoutingInput, routed_adapter, routed_linear

SEGMENTS = (((0,), 1), ((0, 2), 3), ((2, 0), 3), ((1,), 2), ((1, 0, 2), 3))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: torch.stack([x, x.new_full((), 7.0).expand_as(x)], -1)[..., 0],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape) if len(x) else x,
    "rows apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


def layouts(name: str) -> st.SearchStrategy[str]:
    """For a leaf. Of equal rows in A or B gradients cancel to nothing, and rounding decides."""
    return st.sampled_from([k for k in LAYOUTS if k != "expanded" or name not in ("A", "B")])


@dataclass(frozen=True)
class Drawn:
    """One call: its tensors by name, and how it is called."""

    host: str
    routing: Routing
    t: dict[str, Tensor]
    mask: Tensor | None
    adapted: tuple[int, ...]
    of: int

    def __repr__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in self.t.items()}
        modes = self.routing.modes()
        return f"Drawn({self.host}, {self.routing.route.name}, {modes}, {shapes}, {self.mask})"

    def __call__(self, s: float = 0.5, mask: Tensor | None = None, **other: Tensor) -> Tensor:
        """y, with some of the tensors replaced."""
        t = {**self.t, **other}
        given = RoutingInput(t["x_r"], self.mask if mask is None else mask)
        arguments: dict[str, Any] = {"route": self.routing}
        if self.host == "adapter":
            return routed_adapter(
                t["x_h"], t["A"], t["B"], given, b_A=t["b_A"], b_B=t["b_B"], **arguments
            )
        return routed_linear(
            t["x_h"], t["A"], t["B"], given, weight=t["weight"], bias=t["bias"], s=s,
            adapted=self.adapted, of=self.of, **arguments,
        )  # fmt: skip


def sizes(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def routings(draw: Any, Nv: int, T: int, r: int, g: int, masked: bool) -> Routing:
    """Any built-in route in any modes that take this many tokens."""
    fitting = [
        (route, modes)
        for route in BUILT_IN
        for modes in VALID_MODES
        if takes(route, modes, Nv, T, r if modes["segments"] == "per_group" else r * g)
        and not (masked and Nv > 1 and modes["transpose"] == "eccv24")
    ]
    route, modes = draw(st.sampled_from(fitting))
    return Routing(route, **modes)


@st.composite
def calls(draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float64,), least: int = 0) -> Drawn:
    """A call; samples and tokens at least `least`."""
    host, masked = draw(st.sampled_from(("linear", "adapter"))), draw(st.booleans())
    adapted, of = draw(st.sampled_from(SEGMENTS)) if host == "linear" else ((0,), 1)
    S, T, Nv = draw(sizes(least, 3)), draw(sizes(least, 4)), draw(sizes(1, 5))
    d, r, n, g = draw(sizes(1, 6)), draw(sizes(1, 4)), draw(sizes(1, 3)), len(adapted)
    routing = draw(routings(Nv, T, r, g, masked))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n = d if host == "adapter" else n
    t = {"x_h": randn(S, T, d), "x_r": randn(S, Nv, d), "A": randn(g * r, d), "B": randn(g * n, r)}
    if host == "adapter":
        t |= {"b_A": randn(r), "b_B": randn(d)}
    else:
        t |= {"weight": randn(of * n, d), "bias": randn(of * n)}
    mask = torch.rand(S, Nv, generator=generator) < 0.6 if masked else None
    return Drawn(host, routing, t, mask, adapted, of)


def error(one: Tensor, other: Tensor) -> float:
    """Greatest difference relative to the greatest value."""
    assert one.shape == other.shape and one.dtype == other.dtype
    if not one.numel():
        return 0.0
    scale = other.double().abs().max().clamp_min(1e-300)
    return float((one.double() - other.double()).abs().max() / scale)
