"""Forward and backward of a routed layer by Triton kernels: what is allocated, launched and saved.

    forward     K0 x_v = x̂_r Aᵀ + b_A       K1 x_t, z, y
    backward    K2 dz, dx_t, z, dx          operands du, dw, dK, dx_v, dx_r
                K3 partial dA, dB, …        K4 their sums

Plain functions of tensors and a `Fusion`, without autograd and without checks; `functional` made
those. All tensors but weight are contiguous; leading axes of x, y and dy are rows, M of them.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed as draw_seed
from .dropout import keep_mask as keep_mask
from .fusion import Fusion
from .layout import layout_of, readable
from .plan import Plan, chosen_plan, is_many, major_of
from .sizes import Sizes, Sums, Wanted

P = ParamSpec("P")
T = TypeVar("T")


class Inputs(NamedTuple):
    """The tensors of a call, as the operators take them; None is what this Fusion does not have.

    x (…, D), x_r (S, D) or (S, 1, D), u and w (S, R) or w = K (S, G, C, C), A (R, D), b_A (R,),
    B (g·N, r), b_B (N,); weight (of·N, D) and bias (of·N,) of a frozen base; base_out (…, of·N) of
    a given one; seed (1,) of dropout; row_sample (M,) and offsets (S + 1,) of packed sequences.
    The backward pass may be without x, biases and base_out, where it does not read them.
    """

    x: Tensor
    x_r: Tensor | None
    u: Tensor | None
    w: Tensor | None
    A: Tensor
    b_A: Tensor | None
    B: Tensor
    b_B: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    base_out: Tensor | None
    seed: Tensor | None
    row_sample: Tensor | None
    offsets: Tensor | None


@lru_cache(1024)  # a schedule of dropout makes ever new ones, of 13 KB each
def _plan(
    f: Fusion, D: int, N: int, R: int, many: bool, major: int | None, *dtypes: torch.dtype | None
) -> Plan:
    """The plan for a Fusion, widths, a GPU, and the dtypes of its tensors (A's and x's first)."""
    assert dtypes[0] is not None and dtypes[1] is not None
    return Plan(f, D, N, R, dtypes[0], dtypes[1], many, major)


def plan_for(f: Fusion, t: Inputs) -> Plan:
    """The plan of a call."""
    R, D = t.A.shape
    M, N = t.x.numel() // D, t.B.shape[0] // len(f.segments)
    if f.plan == "auto":
        f = f._replace(plan=chosen_plan(f, t.A, N, M))
    return _plan(
        f, D, N, R, is_many(M), major_of(t.A.device),
        t.A.dtype, t.x.dtype, t.B.dtype,
        *(
            None if tensor is None else tensor.dtype
            for tensor in (t.x_r, t.u, t.w, t.b_A, t.b_B, t.base_out, t.row_sample)
        ),
    )  # fmt: skip


def sizes_of(plan: Plan, t: Inputs, M: int, longest: int) -> Sizes:
    """How M rows belong to samples."""
    per_sample = t.x_r if t.x_r is not None else t.w
    S = 1 if per_sample is None else per_sample.shape[0]
    return plan.sizes(M, S, longest)


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """A function of (plan, inputs, …), run with the device of A current: kernels launch there."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        A = args[1].A  # type: ignore[attr-defined]
        if A.is_cuda and A.get_device() != torch.cuda.current_device():
            with torch.cuda.device(A.device):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@on_its_device
def forward(
    plan: Plan, t: Inputs, longest: int, s: float, want_x_t: bool, want_x_v: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y (…, of·N), and what was wanted for the backward pass: x_t (M, R), and x_v (S, R) if owned.

    Where K1 makes x_v (`plan.is_along`) a row of a sample without rows of x is never written.
    """
    f, R = plan.f, plan.R
    sizes = sizes_of(plan, t, t.x.numel() // plan.D, longest)
    by_p3 = extends(plan, t.weight)
    is_along = plan.is_along and not by_p3
    # Before K0, behind which K1 need not wait for what came before (`Plan.late`): the frozen
    # product, and all new memory, which an older kernel may still have read when K1 writes it.
    y, base = _output(plan, t, by_p3)
    x_t, z = (t.A.new_empty(sizes.M, R) if has else None for has in (want_x_t, by_p3))
    u, w, x_v = t.u, t.w, None
    if f.image == "owned" and (want_x_v or not is_along):
        x_v = t.A.new_empty(sizes.S, R)
    if f.image == "owned" and not is_along:
        assert t.x_r is not None and x_v is not None
        plan.project(t.x_r, t.A, t.b_A, t.seed, x_v, "x_r")
        u, w = _of_x_v(f, x_v)
    if z is not None:
        _extended_forward(plan, t, sizes, s, u, w, x_t, z, y)
        return y, x_t, x_v
    x_r, made = (t.x_r, x_v) if is_along else (None, None)
    read = (t.x, x_r, t.A, t.b_A, u, w, t.B, t.b_B, base)
    written = (y, x_t, made, t.seed, t.row_sample, t.offsets)
    plan.routed_forward(sizes, (want_x_t, made is not None), (*read, *written), s)
    return y, x_t, x_v


def all_written(plan: Plan, t: Inputs, x_v: Tensor) -> Tensor:
    """x_v as `forward` returned it, with zeros for samples that have no rows of x."""
    if not plan.is_along:
        return x_v
    if t.offsets is not None:
        return torch.where(t.offsets.diff()[:, None] > 0, x_v, 0.0)
    return x_v if t.x.numel() else x_v.zero_()


def extends(plan: Plan, weight: Tensor | None) -> bool:
    """Whether P3 runs: it was chosen, and the weight lies as its product reads it."""
    return plan.f.plan == "p3" and weight is not None and layout_of(weight) is not None


def _extended_forward(
    plan: Plan,
    t: Inputs,
    sizes: Sizes,
    s: float,
    u: Tensor | None,
    w: Tensor | None,
    x_t: Tensor | None,
    z: Tensor,
    y: Tensor,
) -> None:
    """P3: z (M, R), then y (…, of·N) by one product over x and z."""
    assert t.weight is not None
    plan.bottleneck(
        x_t is None,
        sizes.bottleneck_grid,
        (t.x, t.A, t.b_A, u, w, x_t, z, t.seed, t.row_sample, t.offsets),
        sizes.rows,
    )
    bias = None if t.bias is None else readable(t.bias)  # torch's product takes any layout
    plan.extended_product("forward", t.x, t.weight, bias, z, t.B, y, None, s)


def _of_x_v(f: Fusion, x_v: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where kernels read u and w of an owned image."""
    return None if f.u == "one" else x_v, None if f.w == "one" else x_v


def _output(plan: Plan, t: Inputs, by_p3: bool) -> tuple[Tensor, Tensor | None]:
    """y, and the base that K1 reads, which P3 has not: y itself where it is written in place."""
    base = plan.f.base
    if by_p3:
        return t.x.new_empty(*t.x.shape[:-1], plan.f.of * plan.N), None
    if base == "residual":
        return torch.empty_like(t.x), t.x
    if base == "frozen":
        assert t.weight is not None
        # In three dimensions it is a view, and views that a Function returns are read-only.
        y = F.linear(t.x, t.weight, t.bias).data
        return y, y
    if base == "none":
        return torch.empty_like(t.x, dtype=t.A.dtype), None
    assert t.base_out is not None
    if plan.g == plan.f.of:
        return torch.empty_like(t.base_out), t.base_out
    y = t.base_out.clone()  # the segments that are not adapted
    return y, y


class Gradients(NamedTuple):
    """One for each field of `Wanted`; None where it is not wanted."""

    x: Tensor | None
    x_r: Tensor | None
    u: Tensor | None
    w: Tensor | None
    A: Tensor | None
    b_A: Tensor | None
    B: Tensor | None
    b_B: Tensor | None


class OfImage(NamedTuple):
    """What K3 gets of the gradient of an owned image: dx_v (S, R), or K2's partial sums of it
    (1, pairs, R), and then also dx_r to fill, where that is wanted.
    """

    dx_v: Tensor | None = None
    pairs: Tensor | None = None
    dx_r: Tensor | None = None


NO_IMAGE = OfImage()


@on_its_device
def backward(
    plan: Plan,
    t: Inputs,
    longest: int,
    s: float,
    dy: Tensor,
    x_t: Tensor | None,
    x_v: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """The wanted gradients from dy (…, of·N); x_t and x_v as `forward` returned them."""
    f, new = plan.f, t.A.new_empty
    sizes = sizes_of(plan, t, dy.numel() // dy.shape[-1], longest)
    M, R = sizes.M, plan.R
    if M == 0:
        return _zeros(plan, t, dy, wanted)
    needs_dx_t = wanted.A or wanted.b_A
    needs_operand = wanted.u or wanted.w if f.image == "operand" else wanted.x_r or needs_dx_t
    needs_operand = needs_operand and f.mix != "identity"
    if not (wanted.x_h or wanted.B or needs_dx_t or needs_operand):  # b_B alone
        sums = _weight_sums(plan, t, sizes, wanted, False)
        return Gradients(None, None, None, None, *_weights(plan, t, sums, wanted, s, dy))

    if x_t is None:
        x_t = new(M, R)
        assert t.x is not None
        plan.project(t.x, t.A, t.b_A, t.seed, x_t, "x_h")
    by_p3 = wanted.x_h and extends(plan, t.weight)
    dx_t = new(M, R) if needs_dx_t or by_p3 else None
    z = new(M, R) if wanted.B else None
    dz = partial = None
    if needs_operand and f.mix == "matrix":
        dz = new(M, R)
    elif needs_operand:
        count = 2 if f.image == "operand" and f.mix == "rank1" else 1
        partial = new(count, sizes.pairs, R, dtype=torch.float32)
    dx, base = _input_gradient(plan, t, dy, wanted.x_h and not by_p3)
    u, w = (t.u, t.w) if f.image != "owned" else _of_x_v(f, x_v)
    du, dw = _du_dw(partial)
    plan.backward(
        (wanted, by_p3),
        sizes.backward_grid,
        (dy, x_t, t.A, u, w, t.B, base, dx, dx_t, z, dz, du, dw, t.seed, t.row_sample, t.offsets),
        (*sizes.rows, s),
    )
    if by_p3:
        assert t.weight is not None and dx_t is not None
        dx = dy.new_empty(*dy.shape[:-1], plan.D)
        keep_scale = plan.dropout[1]
        plan.extended_product("backward", dy, t.weight, None, dx_t, t.A, dx, t.seed, keep_scale)
    # Before the image's sums, behind which K3 writes early, as K1 behind K0.
    has_x_r = f.image == "owned" and partial is not None and needs_dx_t
    sums = _weight_sums(plan, t, sizes, wanted, has_x_r)
    du, dw, dx_r, of_image = _operand_gradients(plan, t, sizes, x_t, dz, partial, wanted)
    of_weights = _weights(plan, t, sums, wanted, s, dy, z, dx_t, of_image)
    return Gradients(dx, dx_r, du, dw, *of_weights)


def _du_dw(stacked: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """dw is first: one-operand mixes have no other."""
    if stacked is None or stacked.shape[0] == 1:
        return None, stacked
    return stacked[1], stacked[0]


def _input_gradient(
    plan: Plan, t: Inputs, dy: Tensor, is_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and the base that K2 adds to: dy (residual), or dx as the frozen layer's GEMM left it."""
    if not is_wanted:
        return None, None
    if plan.f.base == "frozen":
        assert t.weight is not None
        dx = product(dy, t.weight)
        return dx, dx
    dx = dy.new_empty(*dy.shape[:-1], plan.D, dtype=plan.x_dtype)
    return dx, dy if plan.f.base == "residual" else None


def product(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W in their own dtype, which K2 adds to.

    A backward pass may run under an autocast that its forward pass did not: seen by what comes out,
    since to ask takes the host 3 µs.
    """
    dx = dy @ weight
    if dx.dtype != dy.dtype:
        with torch.autocast(dy.device.type, enabled=False):
            dx = dy @ weight
    return dx


def _operand_gradients(
    plan: Plan,
    t: Inputs,
    sizes: Sizes,
    x_t: Tensor,
    dz: Tensor | None,
    partial: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, OfImage]:
    """du, dw (or dK), dx_r, and what K3 gets; dx_r may be filled only there."""
    if dz is not None:
        assert t.w is not None
        dK = torch.empty_like(t.w)
        plan.matrix_gradients(sizes, x_t, dz, dK, t.row_sample, t.offsets)
        return None, dK, None, NO_IMAGE
    if partial is None:
        return None, None, None, NO_IMAGE
    dx_r = torch.empty_like(t.x_r) if t.x_r is not None and wanted.x_r else None
    if plan.is_along and wanted.A:
        return None, None, dx_r, OfImage(pairs=partial, dx_r=dx_r)
    out = t.A.new_empty(partial.shape[0], sizes.S, plan.R)
    plan.vector_gradients(sizes, partial, out, t.A, dx_r, t.seed, t.offsets)
    if plan.f.image == "owned":
        return None, None, dx_r, OfImage(out)
    du, dw = _du_dw(out)
    return du, None if dw is None else dw.view(sizes.S, plan.R), None, NO_IMAGE


class WeightSums(NamedTuple):
    """How K3 and K4 make dA, db_A, dB and db_B, those that are wanted, and where."""

    sums: Sums
    partial: Tensor
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _weight_sums(
    plan: Plan, t: Inputs, sizes: Sizes, wanted: Wanted, has_x_r: bool
) -> WeightSums | None:
    """The splits of K3 and new memory for both; None where nothing that they make is wanted."""
    if not (wanted.A or wanted.b_A or wanted.B or wanted.b_B):
        return None
    sums = plan.sums(sizes, wanted, has_x_r)
    outputs = (
        torch.empty_like(t.A) if wanted.A else None,
        t.A.new_empty(plan.R) if wanted.b_A else None,
        torch.empty_like(t.B) if wanted.B else None,
        t.B.new_empty(plan.g * plan.N) if wanted.b_B else None,
    )
    return WeightSums(sums, t.A.new_empty(sums.length, dtype=torch.float32), outputs)


def _weights(
    plan: Plan,
    t: Inputs,
    of: WeightSums | None,
    wanted: Wanted,
    s: float,
    dy: Tensor,
    z: Tensor | None = None,
    dx_t: Tensor | None = None,
    of_image: OfImage = NO_IMAGE,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dA, db_A, dB, db_B."""
    if of is None:
        return None, None, None, None
    dx_v, pairs, dx_r = of_image if wanted.A or wanted.b_A else NO_IMAGE
    has_x_r = dx_v is not None or pairs is not None
    A, offsets = (None, None) if pairs is None else (t.A, t.offsets)
    inputs = (
        *(t.x if wanted.A else None, dx_t, t.x_r if has_x_r else None, dx_v),
        *(pairs, A, dx_r, dy, z, t.seed, offsets),
    )
    plan.weight_gradients(of.sums, (*inputs, of.partial), of.outputs, s)
    return of.outputs


def _zeros(plan: Plan, t: Inputs, dy: Tensor, wanted: Wanted) -> Gradients:
    """No rows: every gradient is zero."""
    dx = dy.new_zeros(*dy.shape[:-1], plan.D, dtype=plan.x_dtype) if wanted.x_h else None
    of_operands = (
        torch.zeros_like(tensor) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip((t.x_r, t.u, t.w), wanted[1:4], strict=True)
    )
    shapes = (t.A.shape, (plan.R,), t.B.shape, (plan.g * plan.N,))
    of_weights = (
        t.A.new_zeros(shape) if is_wanted else None
        for shape, is_wanted in zip(shapes, wanted[4:], strict=True)
    )
    return Gradients(dx, *of_operands, *of_weights)
