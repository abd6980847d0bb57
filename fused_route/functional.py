"""The two operations as functions: checks what it is given, chooses an implementation, calls it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import finite, one_of, probability, whole
from .context import RoutingInput
from .reference import ACTIVATIONS, NO_DROPOUT, Dropout
from .routes import Route
from .routing import Routing, as_routing

Impl = Literal["auto", "reference", "triton"]
IMPLS = ("auto", "reference", "triton")


def routed_linear(
    x_h: Tensor,
    A: Tensor,
    B: Tensor,
    x_r: Tensor | RoutingInput | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
    route: str | Route | Routing = "mul",
    s: float = 1.0,
    adapted: tuple[int, ...] = (0,),
    of: int = 1,
    dropout: float | Dropout = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """A linear layer with routed LoRA: y = x_h Wᵀ + b + s · φ(x̂_h Aᵀ, x̂_r Aᵀ) Bᵀ.

    Args:
        x_h: (B, …, d) hidden states; with packed sequences, M rows of any shape (…, d).
        A: (R, d) down-projection, R = g·r for g adapted segments; the same for x_h and x_r.
        B: (g·n, r) up-projection, segment by segment.
        x_r: (B, Nv, d) or (B, d) routing input; a `RoutingInput` adds a mask of valid tokens or
            packed sequences. Not needed by route "none".
        weight, bias: of the base, (of·n, d) and (of·n,); or
        base_out: (…, of·n), what a base of your own made of x_h.
        route: a name in `ROUTES`, a `Route`, or a `Routing` (a route in given modes).
        s: scale of the update, alpha / r.
        adapted: which of the `of` equal column blocks of y the update is added to, in the order of
            B's segments: (0, 2) of 3 adapts query and value of a fused projection.
        dropout: probability, drawn from torch's generator, for x_h first, then for x_r; or
            `Dropout` with masks of your own.
        impl: "reference", or "auto", which chooses.

    Returns:
        (…, of·n), in the dtype of the base's output.

    Raises:
        ValueError: an argument that does not fit; the message names it and what is accepted.
    """
    routing = as_routing(route)
    _implementation(impl)
    if (weight is None) == (base_out is None):
        raise ValueError("give exactly one of weight and base_out")
    if bias is not None and weight is None:
        raise ValueError("bias belongs to weight; base_out has its own in it already")
    _check_tensors(x_h, A=A, B=B, weight=weight, bias=bias)
    routing_input = _routing_input(x_h, x_r, routing)
    if base_out is None:
        assert weight is not None
        base_out = _base(x_h, weight, bias)
    elif base_out.shape[:-1] != x_h.shape[:-1] or base_out.device != x_h.device:
        raise ValueError(
            f"base_out must be {(*x_h.shape[:-1], 'of·n')} on {x_h.device}, got "
            f"{tuple(base_out.shape)} on {base_out.device}"
        )
    check_segments(adapted, of, base_out.shape[-1])
    _check_matrices(A, B, x_h.shape[-1], base_out.shape[-1] // of, len(adapted))
    drop = _dropout(dropout, x_h, routing_input)
    return reference.routed_linear(
        x_h, base_out, routing_input, A, B,
        routing=routing, s=finite("s", s), adapted=tuple(adapted), of=of, dropout=drop,
    )  # fmt: skip


def routed_adapter(
    x_h: Tensor,
    A: Tensor,
    B: Tensor,
    x_r: Tensor | RoutingInput | None = None,
    *,
    b_A: Tensor | None = None,
    b_B: Tensor | None = None,
    route: str | Route | Routing = "mul",
    activation: str = "gelu",
    residual: bool = True,
    dropout: float | Dropout = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """A bottleneck adapter with routing: y = act(φ(x_h Aᵀ + b_A, x_r Aᵀ + b_A)) Bᵀ + b_B + x_h.

    Args:
        x_h, x_r, route, dropout, impl: as in `routed_linear`.
        A, b_A: (r, d) and (r,) down-projection, the same for x_h and x_r.
        B, b_B: (d, r) and (d,) up-projection.
        activation: none, relu, gelu, gelu_tanh or silu.
        residual: whether x_h is added (the published GPT-2 does, its RoBERTa does not).

    Returns:
        y, of the shape of x_h.

    Raises:
        ValueError: an argument that does not fit; the message names it and what is accepted.
    """
    routing = as_routing(route)
    _implementation(impl)
    one_of("activation", activation, ACTIVATIONS)
    _check_tensors(x_h, A=A, B=B, b_A=b_A, b_B=b_B)
    routing_input = _routing_input(x_h, x_r, routing)
    _check_matrices(A, B, x_h.shape[-1], x_h.shape[-1], 1)
    _check_bias("b_A", b_A, A.shape[0])
    _check_bias("b_B", b_B, x_h.shape[-1])
    return reference.routed_adapter(
        x_h, routing_input, A, b_A, B, b_B,
        routing=routing, activation=activation, residual=residual,
        dropout=_dropout(dropout, x_h, routing_input),
    )  # fmt: skip


def check_segments(adapted: tuple[int, ...], of: int, width: int) -> None:
    """The adapted segments exist, once each, and divide the output evenly; else a ValueError."""
    whole("of", of)
    if width % of:
        raise ValueError(f"of={of} does not divide the base's {width} output columns")
    known = range(of)
    if not adapted or len(set(adapted)) < len(adapted) or any(i not in known for i in adapted):
        raise ValueError(f"adapted={adapted} must be distinct segments from 0 to {of - 1}")


def _base(x_h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() != 2 or weight.shape[1] != x_h.shape[-1]:
        raise ValueError(
            f"weight must be (of·n, d) with d = {x_h.shape[-1]}, got {tuple(weight.shape)}"
        )
    _check_bias("bias", bias, weight.shape[0])
    return F.linear(x_h, weight, bias)


def _implementation(impl: str) -> None:
    one_of("impl", impl, IMPLS)
    if impl == "triton":
        raise ValueError(
            "impl='triton' cannot be honoured: this version has no Triton kernels; "
            "use 'reference' or 'auto'"
        )


def _routing_input(
    x_h: Tensor, x_r: Tensor | RoutingInput | None, routing: Routing
) -> RoutingInput | None:
    """The routing input, checked against x_h; None for a route that takes none."""
    if routing.route.takes == "nothing":
        return None
    if x_r is None:
        raise ValueError(f"x_r is missing: route {routing.route.name!r} needs a routing input")
    given = x_r if isinstance(x_r, RoutingInput) else RoutingInput(x_r)
    if given.width != x_h.shape[-1]:
        raise ValueError(f"x_r has width {given.width}, x_h has {x_h.shape[-1]}; both meet A")
    if given.x_r.device != x_h.device:
        raise ValueError(f"x_r is on {given.x_r.device}, x_h on {x_h.device}")
    if given.sample_index is not None:
        _check_packing(x_h, given, given.sample_index, routing)
    elif given.batch_size != x_h.shape[0]:
        raise ValueError(
            f"x_r is for a batch of {given.batch_size}, x_h is a batch of {x_h.shape[0]}; nothing "
            "is broadcast (for beams: RoutingInput(x_r).repeated(beams))"
        )
    return given


def _check_packing(
    x_h: Tensor, given: RoutingInput, sample_index: Tensor, routing: Routing
) -> None:
    rows = x_h.shape[:-1].numel()
    if sample_index.numel() != rows:
        raise ValueError(f"sample_index is for {sample_index.numel()} rows, x_h has {rows}")
    if routing.transpose == "eccv24" and (given.x_r.shape[1] > 1 or routing.route.scores == "text"):
        raise ValueError(
            "sample_index with transpose='eccv24': the published code pairs and reshapes padded "
            "batches, which packed sequences are not; use transpose='exact'"
        )


def _check_tensors(x_h: Tensor, **others: Tensor | None) -> None:
    """Tensors of one device, and of one dtype unless autocast converts them."""
    if not isinstance(x_h, Tensor) or x_h.dim() < 2:
        given = tuple(x_h.shape) if isinstance(x_h, Tensor) else type(x_h).__name__
        raise ValueError(f"x_h must be a tensor (B, …, d), got {given}")
    converts = torch.is_autocast_enabled(x_h.device.type)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != x_h.device:
            raise ValueError(f"{name} is on {tensor.device}, x_h is on {x_h.device}")
        if tensor.dtype != x_h.dtype and not converts:
            raise ValueError(
                f"{name} is {tensor.dtype}, x_h is {x_h.dtype}: convert one, or run under "
                "torch.autocast"
            )


def _check_matrices(A: Tensor, B: Tensor, d: int, n: int, g: int) -> None:
    if A.dim() != 2 or A.shape[1] != d or A.shape[0] == 0 or A.shape[0] % g:
        raise ValueError(
            f"A must be (R, d) with d = {d} and R a positive multiple of {g} adapted segments, "
            f"got {tuple(A.shape)}"
        )
    if B.shape != (g * n, A.shape[0] // g):
        raise ValueError(f"B must be (g·n, r) = {(g * n, A.shape[0] // g)}, got {tuple(B.shape)}")


def _check_bias(name: str, bias: Tensor | None, length: int) -> None:
    if bias is not None and bias.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got {tuple(bias.shape)}")


def _dropout(dropout: float | Dropout, x_h: Tensor, routing_input: RoutingInput | None) -> Dropout:
    """Masks for this call: one for x_h, drawn first, and one for x_r."""
    if isinstance(dropout, Dropout):
        x_r = None if routing_input is None else routing_input.x_r
        for name, keep, x in (("keep_h", dropout.keep_h, x_h), ("keep_r", dropout.keep_r, x_r)):
            if keep is not None and x is not None and keep.shape != x.shape:
                raise ValueError(f"{name} must be {tuple(x.shape)}, got {tuple(keep.shape)}")
        return dropout
    if probability("dropout", dropout) == 0.0:
        return NO_DROPOUT
    keep_h = _keep(x_h, dropout)
    return Dropout(
        dropout, keep_h, None if routing_input is None else _keep(routing_input.x_r, dropout)
    )


def _keep(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
