"""A call by kernels: whether it is one, its Fusion and plan, then its tensors to `autograd`."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from . import autograd, coverage, ops
from .checks import autocasts, probability
from .dropout import draw_seed
from .fusion import OF_ONE_VECTOR, Fusion, owns_image
from .ops import Inputs
from .plan import Plan
from .reference import NO_DROPOUT, Dropout, image_operand
from .routes import Operand
from .routing import Routing
from .routing_input import RoutingInput

T = TypeVar("T", Tensor, Tensor | None)


class Prepared:
    """What is known of a call before its tensors: who runs it, and how.

    Args:
        fusion: None where the reference runs it; its mix is still open for an image "operand".
        dtype: of the products.
        casts: whether a tensor has another.
    """

    __slots__ = ("casts", "dtype", "fusion", "plan")

    def __init__(self, fusion: Fusion | None, dtype: torch.dtype, casts: bool = False) -> None:
        self.fusion = fusion
        self.dtype = dtype
        self.casts = casts
        self.plan: Plan | None = None  # made by the first call, where the mix is not open


def product_dtype(x_h: Tensor) -> torch.dtype:
    """The dtype that A and B are multiplied in: autocast's, or that of x_h."""
    return torch.get_autocast_dtype(x_h.device.type) if autocasts(x_h.device) else x_h.dtype


def products(dtype: torch.dtype, device: torch.device) -> str:
    """How fp32 products are made: "tf32" where torch's own matmuls may be."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# As `coverage.device_obstacle`: compilers call it, and keep what it said while they traced.
products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_kernels(
    impl: str,
    tensors: Mapping[str, Tensor | None],
    device: torch.device,
    dtype: torch.dtype,
    routing: Routing,
    given: RoutingInput | None,
    dropout: float | Dropout,
) -> bool:
    """Whether the kernels run this call; ValueError if they were asked for and cannot."""
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return False
    why_not = coverage.obstacle(tensors, dtype, routing, given, dropout)
    why_not = why_not or coverage.device_obstacle(device)
    why_not = why_not or coverage.interpreter_obstacle(device, dtype)
    if impl == "triton" and why_not is not None:
        raise ValueError(
            f"impl='triton' cannot be honoured: {why_not}; use impl='reference' or 'auto'"
        )
    return why_not is None


def prepare(
    impl: str,
    tensors: Mapping[str, Tensor | None],
    routing: Routing,
    given: RoutingInput | None,
    dropout: float | Dropout,
    *,
    base: str,
    activation: str,
    segments: tuple[int, ...],
    of: int,
    recompute: bool,
    plan: str = "p1",
) -> Prepared:
    """What a call that was checked is found to be; `tensors` are its own, by name.

    Raises:
        ValueError: kernels were asked for and do not cover it, dropout is no probability, or the
            plan is not for this base.
    """
    x_h = tensors["x_h"]
    assert x_h is not None
    dtype, device = product_dtype(x_h), x_h.device
    plan = _plan(plan, base)
    if not isinstance(dropout, Dropout):
        dropout = probability("dropout", dropout)
    if not takes_kernels(impl, tensors, device, dtype, routing, given, dropout):
        return Prepared(None, dtype)
    assert not isinstance(dropout, Dropout)  # covers no masks
    mix, u, w, first, image = "identity", "one", "plain", "none", "none"
    if given is not None:
        first, image, u = routing.route.first, "operand", "plain"
        is_masked = given.mask is not None
        is_raw = given.x_v is None and given.operand is None
        Nv, drops = given.x_r.shape[1], dropout > 0.0
        if is_raw and owns_image(routing, Nv, is_masked=is_masked, drops=drops):
            image, (mix, u, w) = "owned", OF_ONE_VECTOR[routing.route.name]
    fusion = Fusion(
        mix, u, w, first, 1 if routing.segments == "joint" else len(segments), image, base,
        activation, dropout, segments, of, "recomputed" if recompute else "saved",
        products(dtype, device), plan,
    )  # fmt: skip
    casts = any(t is not None and t.dtype != dtype for t in tensors.values())
    return Prepared(fusion, dtype, casts)


def _plan(plan: str, base: str) -> str:
    """The plan of a base; ValueError where the one that was asked for is of a frozen base alone."""
    if base == "frozen":
        return plan
    if plan == "p3":
        raise ValueError(
            "plan='p3' needs the weight of a frozen base, got one that is trained, or its output: "
            "use plan='auto'"
        )
    return "p1"


def run(
    known: Prepared,
    routing: Routing,
    given: RoutingInput | None,
    s: float,
    x_h: Tensor,
    A: Tensor,
    b_A: Tensor | None,
    B: Tensor,
    b_B: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
) -> Tensor:
    """y of a call that was prepared, as the functions of `reference` define it."""
    f, dtype = known.fusion, known.dtype
    assert f is not None
    if known.casts:
        A, b_A, B, b_B = cast(A, dtype), cast(b_A, dtype), cast(B, dtype), cast(b_B, dtype)
        if f.base == "frozen":
            x_h, weight, bias = cast(x_h, dtype), cast(weight, dtype), cast(bias, dtype)
    seed = draw_seed(x_h.device) if f.p > 0.0 else None
    x_r = u = w = row_sample = offsets = None
    longest = 0
    if given is not None:
        row_sample, offsets = given.row_sample, given.offsets
        if f.image == "owned":
            x_r = given.x_r
            if x_r.element_size() == 1:  # fp8, which torch does not add up, and not all chips load
                x_r = x_r.to(dtype)
            x_r = one_vector(x_r, routing.pool)
        else:
            operand = prepared_operand(given, A, b_A, routing, f)
            f = f._replace(mix=operand.mix)
            u, w = vectors(operand, dtype)
            if operand.mix == "matrix":  # the only one whose grid is by sample
                longest = given.longest
    t = Inputs(x_h, x_r, u, w, A, b_A, B, b_B, weight, bias, base_out, seed, row_sample, offsets)
    if torch.compiler.is_compiling():
        return autograd.traced(f, longest, s, t)
    plan = known.plan
    if plan is None:
        plan = ops.plan_for(f, t)
        if f is known.fusion:
            known.plan = plan
    return autograd.eager(plan, longest, s, t)


def cast(tensor: T, dtype: torch.dtype) -> T:
    """The tensor in this dtype, which it nearly always has."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def one_vector(x_r: Tensor, pool: str) -> Tensor:
    """(S, 1, d): the one token of each sample, or the pool of several."""
    if x_r.shape[1] == 1:
        return x_r
    return x_r[:, :1] if pool == "first" else x_r.mean(1, keepdim=True)


def prepared_operand(
    given: RoutingInput, A: Tensor, b_A: Tensor | None, routing: Routing, f: Fusion
) -> Operand:
    """The operand as the reference computes it, from x_v in torch."""
    dropout = NO_DROPOUT
    if f.p > 0.0 and given.x_v is None and given.operand is None:
        x_r = given.x_r  # a mask in the order of its elements, whatever that of its memory
        keep_r = torch.empty(x_r.shape, dtype=torch.bool, device=x_r.device).bernoulli_(1.0 - f.p)
        dropout = Dropout(f.p, None, keep_r)
    return image_operand(given, A, b_A, routing=routing, G=f.groups, dropout=dropout)


def vectors(operand: Operand, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """u and w (S, R), or w = K (S, G, C, C), in the order the kernels take them."""
    if operand.mix == "identity":
        return None, None
    for tensor in operand.tensors:
        if not coverage.is_plain(tensor):
            raise ValueError(
                f"the route's operand is a {type(tensor).__name__}, and kernels read plain "
                "tensors: use impl='reference'"
            )
    *u, w = (tensor.to(dtype) for tensor in operand.tensors)
    if operand.mix == "matrix":
        return None, w
    return u[0].flatten(1) if u else None, w.flatten(1)
