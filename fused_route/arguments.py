"""Checks of the tensors of a call against each other: each names the argument that does not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import autocasts, segments, shown, whole
from .routing import Routing
from .routing_input import RoutingInput


def check_linear(
    x_h: Tensor,
    A: Tensor,
    B: Tensor,
    given: RoutingInput | None,
    routing: Routing,
    weight: Tensor | None,
    bias: Tensor | None,
    base_out: Tensor | None,
    adapted: tuple[int, ...],
    of: int,
) -> None:
    """The tensors of `routed_linear` fit each other; else a ValueError."""
    if (weight is None) == (base_out is None):
        raise ValueError("give exactly one of weight and base_out")
    if bias is not None and weight is None:
        raise ValueError("bias belongs to weight; base_out has its own in it already")
    check_tensors(x_h, {"A": A, "B": B}, {"weight": weight, "bias": bias})
    if base_out is not None:
        check_base_out(x_h, base_out)
    check_routing_input(x_h, given, routing, A, len(adapted))
    width = check_base(x_h, weight, bias, base_out)
    check_segments(adapted, of, width)
    check_matrices(A, B, x_h.shape[-1], width // of, len(adapted))


def check_adapter(
    x_h: Tensor,
    A: Tensor,
    B: Tensor,
    b_A: Tensor | None,
    b_B: Tensor | None,
    given: RoutingInput | None,
    routing: Routing,
) -> None:
    """The tensors of `routed_adapter` fit each other; else a ValueError."""
    check_tensors(x_h, {"A": A, "B": B}, {"b_A": b_A, "b_B": b_B})
    check_routing_input(x_h, given, routing, A, 1)
    check_matrices(A, B, x_h.shape[-1], x_h.shape[-1], 1)
    check_bias("b_A", b_A, A.shape[0])
    check_bias("b_B", b_B, x_h.shape[-1])


def check_segments(adapted: tuple[int, ...], of: int, width: int) -> None:
    """The adapted segments exist, once each, and divide the output evenly; else a ValueError."""
    whole("of", of)
    if width % of:
        raise ValueError(f"of={of} does not divide the base's {width} output columns")
    segments("adapted", adapted, of)


def check_base(
    x_h: Tensor, weight: Tensor | None, bias: Tensor | None, base_out: Tensor | None
) -> int:
    """The base's output columns."""
    if weight is not None:
        if weight.dim() != 2 or weight.shape[1] != x_h.shape[-1]:
            raise ValueError(
                f"weight must be (of·n, d) with d = {x_h.shape[-1]}, got {tuple(weight.shape)}"
            )
        check_bias("bias", bias, weight.shape[0])
        return weight.shape[0]
    assert base_out is not None
    return base_out.shape[-1]


def check_base_out(x_h: Tensor, base_out: Tensor) -> None:
    """A base's output fits x_h; else a ValueError."""
    if not isinstance(base_out, Tensor) or not base_out.is_floating_point() or base_out.dim() < 1:
        raise ValueError(
            f"base_out must be a floating-point tensor (…, of·n), got {shown(base_out)}"
        )
    if base_out.shape[:-1] != x_h.shape[:-1] or base_out.device != x_h.device:
        raise ValueError(
            f"base_out must be {(*x_h.shape[:-1], 'of·n')} on {x_h.device}, got "
            f"{tuple(base_out.shape)} on {base_out.device}"
        )


def as_routing_input(x_r: Tensor | RoutingInput | None, routing: Routing) -> RoutingInput | None:
    """The routing input; None for a route that takes none."""
    if routing.route.takes == "nothing":
        return None
    if x_r is None:
        raise ValueError(f"x_r is missing: route {routing.route.name!r} needs a routing input")
    return x_r if isinstance(x_r, RoutingInput) else RoutingInput(x_r)


def check_routing_input(
    x_h: Tensor, given: RoutingInput | None, routing: Routing, A: Tensor, g: int
) -> None:
    """The routing input fits x_h, and what was made of it already fits A; else a ValueError."""
    if given is None:
        return
    _check_prepared(given, routing, A, g)
    if given.width != x_h.shape[-1]:
        raise ValueError(f"x_r has width {given.width}, x_h has {x_h.shape[-1]}; both meet A")
    if given.x_r.device != x_h.device:
        raise ValueError(f"x_r is on {given.x_r.device}, x_h on {x_h.device}")
    if given.sample_index is not None:
        _check_packing(x_h, given, given.sample_index, routing)
    elif given.batch_size != x_h.shape[0]:
        turned = x_h.dim() == 3 and x_h.shape[1] == given.batch_size
        raise ValueError(
            f"x_r is for a batch of {given.batch_size}, x_h is a batch of {x_h.shape[0]}"
            f"{' (samples come first: is it (T, B, d)?)' if turned else ''}; nothing "
            "is broadcast (for beams: RoutingInput(x_r).repeated(beams); an encoder runs before "
            "that, with x_r: generate(encoder_outputs=…))"
        )


def _check_prepared(given: RoutingInput, routing: Routing, A: Tensor, g: int) -> None:
    x_v, operand, R = given.x_v, given.operand, A.shape[0]
    if x_v is not None and (x_v.shape[-1] != R or x_v.device != given.x_r.device):
        raise ValueError(
            f"x_v has {x_v.shape[-1]} columns on {x_v.device}, A has R = {R} rows and x_r is on "
            f"{given.x_r.device}"
        )
    if x_v is not None and x_v.dtype != A.dtype and not autocasts(A.device):
        raise ValueError(f"x_v is {x_v.dtype}, A is {A.dtype}: convert one")
    if operand is not None:
        G = 1 if routing.segments == "joint" else g
        B, Nv = given.x_r.shape[:2]
        routing.check(operand, torch.Size((B, G, Nv, R // G)), given.x_r.device)


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


def check_tensors(
    x_h: Tensor, needed: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None]
) -> None:
    """Tensors of one device, and of one dtype unless autocast converts them; else a ValueError."""
    if isinstance(x_h, Tensor) and x_h.is_nested and x_h.layout is torch.strided:
        raise ValueError("x_h must have a shape (B, …, d), got a nested tensor: pad it")
    if not isinstance(x_h, Tensor) or x_h.dim() < 2 or not x_h.is_floating_point():
        raise ValueError(f"x_h must be a floating-point tensor (B, …, d), got {shown(x_h)}")
    for name, tensor in {**needed, **others}.items():
        if tensor is None and name not in needed:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {shown(tensor)}")
        if tensor.device != x_h.device:
            raise ValueError(f"{name} is on {tensor.device}, x_h is on {x_h.device}")
        if tensor.dtype != x_h.dtype and not autocasts(x_h.device):
            raise ValueError(
                f"{name} is {tensor.dtype}, x_h is {x_h.dtype}: convert one, or run under "
                "torch.autocast"
            )


def check_matrices(A: Tensor, B: Tensor, d: int, n: int, g: int) -> None:
    if A.dim() != 2 or A.shape[1] != d or A.shape[0] == 0 or A.shape[0] % g:
        raise ValueError(
            f"A must be (R, d) with d = {d} and R a positive multiple of {g} adapted segments, "
            f"got {tuple(A.shape)}"
        )
    if B.shape != (g * n, A.shape[0] // g):
        raise ValueError(f"B must be (g·n, r) = {(g * n, A.shape[0] // g)}, got {tuple(B.shape)}")


def check_bias(name: str, bias: Tensor | None, length: int) -> None:
    if bias is not None and bias.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got {tuple(bias.shape)}")
