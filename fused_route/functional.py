"""The two operations as functions: checks what it is given, chooses an implementation, calls it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused, known, reference
from .arguments import as_routing_input, check_adapter, check_linear
from .checks import finite, one_of, probability, segments, truth, whole
from .reference import ACTIVATIONS, NO_DROPOUT, Dropout
from .routes import Route
from .routing import Routing, as_routing
from .routing_input import RoutingInput

Impl = Literal["auto", "reference", "triton"]
IMPLS = ("auto", "reference", "triton")
ProductPlan = Literal["auto", "p1", "p3"]
PLANS = ("auto", "p1", "p3")


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
    recompute: bool = False,
    impl: Impl = "auto",
    plan: ProductPlan = "auto",
) -> Tensor:
    """A linear layer with routed LoRA: y = x_h Wᵀ + b + s · φ(x̂_h Aᵀ, x̂_r Aᵀ) Bᵀ.

    Args:
        x_h: (B, …, d) hidden states; with packed sequences, M rows of any shape (…, d).
        A: (R, d) down-projection, R = g·r for g adapted segments; the same for x_h and x_r.
        B: (g·n, r) up-projection, segment by segment.
        x_r: (B, Nv, d) or (B, d) routing input; a `RoutingInput` adds a mask of valid tokens,
            packed sequences, or what was made of x_r already. Not needed by route "none".
        weight, bias: of the base, (of·n, d) and (of·n,); or
        base_out: (…, of·n), what a base of your own made of x_h.
        route: a name in `ROUTES`, a `Route`, or a `Routing` (a route in given modes).
        s: scale of the update, alpha / r.
        adapted: which of the `of` equal column blocks of y the update is added to, in the order of
            B's segments: (0, 2) of 3 adapts query and value of a fused projection.
        dropout: probability, drawn from torch's generator, for x_h first, then for x_r; or
            `Dropout` with masks of your own.
        recompute: the kernels do not save x_t (M, R) for the backward pass but compute it anew.
        impl: "triton", the kernels; "reference", plain torch; or "auto": the kernels on a GPU where
            they cover the call (docs/kernels.md has the table).
        plan: of the kernels, for a frozen `weight`: "p1", the base's product by torch, to which a
            kernel adds the update; "p3", one product over x_h and the bottleneck, forward and
            backward; or "auto", "p3" at sizes like those at which it was measured to be faster
            (docs/kernels.md). A weight that is neither stored by rows nor by columns runs by
            "p1"; without a frozen one "p3" is refused.

    Returns:
        (…, of·n), in the dtype of the base's output.

    Raises:
        ValueError: an argument that does not fit; the message names it and what is accepted.
    """
    routing, s = as_routing(route), finite("s", s)
    # True is 1 to a look-up of what is known, and 0.0 is 0: other types are not looked up.
    if type(adapted) is not tuple or any(type(index) is not int for index in adapted):
        adapted = segments("adapted", adapted)
    if type(of) is not int:
        of = whole("of", of)
    if type(recompute) is not bool:
        truth("recompute", recompute)
    if type(dropout) is bool:
        probability("dropout", dropout)
    given = as_routing_input(x_r, routing)
    base = "frozen" if weight is not None and _is_frozen(weight, bias) else "given"
    settings = ("linear", routing, base, adapted, of, dropout, recompute, impl, plan)
    signature = known.signature((x_h, A, B, weight, bias, base_out), given, settings)
    prepared = known.prepared(signature)
    if prepared is None:
        one_of("impl", impl, IMPLS)
        one_of("plan", plan, PLANS)
        check_linear(x_h, A, B, given, routing, weight, bias, base_out, adapted, of)
        tensors = {"x_h": x_h, "A": A, "B": B, "base_out": base_out}
        if base == "frozen":
            tensors |= {"weight": weight, "bias": bias}
        prepared = fused.prepare(
            impl, tensors, routing, given, dropout, base=base, activation="none",
            segments=adapted, of=of, recompute=recompute, plan=plan,
        )  # fmt: skip
        known.remember(signature, prepared)
    if weight is not None and (base == "given" or prepared.fusion is None):
        base_out = F.linear(x_h, weight, bias)
    if prepared.fusion is not None:
        if base == "given":
            weight = bias = None
        return fused.run(prepared, routing, given, s, x_h, A, None, B, None, weight, bias, base_out)
    assert base_out is not None
    return reference.routed_linear(
        x_h, base_out, given, A, B, routing=routing, s=s, adapted=adapted, of=of,
        dropout=_masks(dropout, x_h, given),
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
    recompute: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """A bottleneck adapter with routing: y = act(φ(x_h Aᵀ + b_A, x_r Aᵀ + b_A)) Bᵀ + b_B + x_h.

    Args:
        x_h, x_r, route, dropout, recompute, impl: as in `routed_linear`.
        A, b_A: (r, d) and (r,) down-projection, the same for x_h and x_r.
        B, b_B: (d, r) and (d,) up-projection.
        activation: none, relu, gelu, gelu_tanh or silu.
        residual: whether x_h is added (the published GPT-2 does, its RoBERTa does not).

    Returns:
        y, of the shape of x_h; in its dtype, or without residual that of the products (autocast's).

    Raises:
        ValueError: an argument that does not fit; the message names it and what is accepted.
    """
    routing = as_routing(route)
    if type(residual) is not bool or type(recompute) is not bool:
        truth("residual", residual), truth("recompute", recompute)
    if type(dropout) is bool:
        probability("dropout", dropout)
    given = as_routing_input(x_r, routing)
    settings = ("adapter", routing, activation, residual, dropout, recompute, impl)
    signature = known.signature((x_h, A, B, b_A, b_B), given, settings)
    prepared = known.prepared(signature)
    if prepared is None:
        one_of("impl", impl, IMPLS)
        one_of("activation", activation, ACTIVATIONS)
        check_adapter(x_h, A, B, b_A, b_B, given, routing)
        prepared = fused.prepare(
            impl, {"x_h": x_h, "A": A, "B": B, "b_A": b_A, "b_B": b_B}, routing, given, dropout,
            base="residual" if residual else "none",
            activation=activation, segments=(0,), of=1, recompute=recompute,
        )  # fmt: skip
        known.remember(signature, prepared)
    if prepared.fusion is not None:
        return fused.run(prepared, routing, given, 1.0, x_h, A, b_A, B, b_B)
    return reference.routed_adapter(
        x_h, given, A, b_A, B, b_B, routing=routing, activation=activation, residual=residual,
        dropout=_masks(dropout, x_h, given),
    )  # fmt: skip


def _is_frozen(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether no gradient of the base is wanted: its product is then part of the operation."""
    is_trained = getattr(weight, "requires_grad", False) or getattr(bias, "requires_grad", False)
    return not (is_trained and torch.is_grad_enabled())


def _masks(dropout: float | Dropout, x_h: Tensor, given: RoutingInput | None) -> Dropout:
    """Masks for this call: one for x_h, drawn first, and one for x_r."""
    if isinstance(dropout, Dropout):
        x_r = None if given is None else given.x_r
        is_raw = given is None or (given.x_v is None and given.operand is None)
        if dropout.keep_r is not None and not is_raw:
            raise ValueError("keep_r is given, and x_v or operand, which x_r has become already")
        for name, keep, x in (("keep_h", dropout.keep_h, x_h), ("keep_r", dropout.keep_r, x_r)):
            if keep is None or x is None:
                continue
            if keep.shape != x.shape or keep.device != x.device:
                raise ValueError(
                    f"{name} must be {tuple(x.shape)} on {x.device}, got {tuple(keep.shape)} on "
                    f"{keep.device}"
                )
        return dropout
    if probability("dropout", dropout) == 0.0:
        return NO_DROPOUT
    keep_h = _keep(x_h, dropout)
    if given is None or given.x_v is not None or given.operand is not None:
        return Dropout(dropout, keep_h, None)
    return Dropout(dropout, keep_h, _keep(given.x_r, dropout))


def _keep(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
