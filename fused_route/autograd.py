"""Two doors to `ops`: an autograd.Function for eager calls, torch operators for everything else.

Calling an operator costs the host as much as the kernels save at small sizes, so eager code goes
through the Function; torch.compile, export and opcheck see `fused_route::forward` and
`fused_route::backward`. Both give the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .fusion import Fusion
from .layout import readable
from .ops import Inputs
from .plan import Plan
from .sizes import Wanted

# The first eight of `Inputs` have gradients, in the order of `Wanted`; that of base_out is dy.
BASE_OUT = 10


def all_readable(t: Inputs) -> Inputs:
    """The same with everything that kernels read contiguous and aligned: all but weight, bias."""
    for tensor in (*t[:8], *t[10:]):  # `is_readable`, without the calls
        if tensor is not None and (tensor.data_ptr() & 15 or not tensor.is_contiguous()):
            break
    else:
        return t
    read = set(Inputs._fields) - {"weight", "bias"}
    return t._replace(
        **{
            name: readable(tensor)
            for name, tensor in t._asdict().items()
            if name in read and tensor is not None
        }
    )


def kept_for_backward(
    t: Inputs, x_t: Tensor | None, x_v: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """What backward reads for the needed gradients: of the inputs, then x_t and x_v.

    x only for dA or to compute x_t anew, and then b_A too; never b_B, bias, base_out.
    """
    needs_x_h, needs_A = needs[0], needs[4]
    x = t.x if needs_A or x_t is None else None
    b_A = t.b_A if x_t is None else None
    weight = t.weight if needs_x_h else None
    return (x, *t[1:5], b_A, t.B, None, weight, None, None, *t[11:], x_t, x_v)


class Routed(torch.autograd.Function):
    """y (…, of·N) of `Inputs`; differentiable once, in each of the first eight and base_out."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, longest: int, s: float, *tensors: Tensor | None) -> Tensor:
        t = all_readable(Inputs(*tensors))  # type: ignore[arg-type]
        needs = ctx.needs_input_grad[3:]
        is_trained = any(needs[:8])
        want_x_t = is_trained and plan.f.x_t == "saved"
        y, x_t, x_v = ops.forward(plan, t, longest, s, want_x_t, is_trained)
        ctx.plan, ctx.longest, ctx.s = plan, longest, s
        ctx.save_for_backward(*kept_for_backward(t, x_t, x_v, needs))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # once_differentiable would leave a gap where dy has no graph
            raise RuntimeError(
                "the kernels are differentiable once, and create_graph=True asks for a graph of "
                "their gradients: use impl='reference' for second derivatives"
            )
        *tensors, x_t, x_v = ctx.saved_tensors
        # Hooks of saved tensors, such as offload them, may give them back with other strides.
        t, needs = all_readable(Inputs(*tensors)), ctx.needs_input_grad[3:]
        if x_t is not None:
            x_t = readable(x_t)
        if x_v is not None:
            x_v = readable(x_v)
        wanted = Wanted(*needs[:8])
        g = ops.backward(ctx.plan, t, ctx.longest, ctx.s, readable(dy), x_t, x_v, wanted)
        base_out = dy if needs[BASE_OUT] else None
        return None, None, None, *g, None, None, base_out, None, None, None


def _present(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Operators return tensors, never None: an empty one stands for what is not there."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


@torch.library.custom_op("fused_route::forward", mutates_args=())
def forward_op(
    x: Tensor, x_r: Tensor | None, u: Tensor | None, w: Tensor | None,
    A: Tensor, b_A: Tensor | None, B: Tensor, b_B: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, base_out: Tensor | None,
    seed: Tensor | None, row_sample: Tensor | None, offsets: Tensor | None,
    longest: int, fusion: str, s: float, want_x_t: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, x_t, x_v) of `ops.forward` for the Fusion with this text; x_t and x_v may be empty."""
    t = Inputs(x, x_r, u, w, A, b_A, B, b_B, weight, bias, base_out, seed, row_sample, offsets)
    t = all_readable(t)
    plan = ops.plan_for(Fusion.of_text(fusion), t)
    y, x_t, x_v = ops.forward(plan, t, longest, s, want_x_t, True)
    if x_v is not None:  # an output of an operator holds nothing by chance
        x_v = ops.all_written(plan, t, x_v)
    x_t, x_v = _present((x_t, x_v), A)
    return y, x_t, x_v


@forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    t, f, want_x_t = Inputs(*arguments[:14]), Fusion.of_text(arguments[15]), arguments[17]
    columns = f.of * t.B.shape[0] // len(f.segments)
    like = {"frozen": t.x, "given": t.base_out, "residual": t.x, "none": t.A}[f.base]
    assert like is not None
    M = t.x.numel() // t.x.shape[-1]  # a product of sizes would fix them while a compiler traces
    return (
        like.new_empty(*t.x.shape[:-1], columns),
        t.A.new_empty(M, t.A.shape[0]) if want_x_t else t.A.new_empty(0),
        t.A.new_empty(0) if t.x_r is None else t.A.new_empty(t.x_r.shape[0], t.A.shape[0]),
    )


@torch.library.custom_op("fused_route::backward", mutates_args=())
def backward_op(
    dy: Tensor, x_t: Tensor, x_v: Tensor,
    x: Tensor, x_r: Tensor | None, u: Tensor | None, w: Tensor | None,
    A: Tensor, b_A: Tensor | None, B: Tensor, b_B: Tensor | None,
    weight: Tensor | None, seed: Tensor | None, row_sample: Tensor | None, offsets: Tensor | None,
    longest: int, fusion: str, s: float, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """`ops.backward`: eight gradients in the order of `Wanted`, empty where not wanted."""
    f = Fusion.of_text(fusion)
    t = Inputs(x, x_r, u, w, A, b_A, B, b_B, weight, None, None, seed, row_sample, offsets)
    saved_x_t = x_t if x_t.numel() else None  # exported without gradients, it was not wanted
    saved_x_v = x_v if f.image == "owned" else None
    t = all_readable(t)
    g = ops.backward(
        ops.plan_for(f, t), t, longest, s, readable(dy), saved_x_t, saved_x_v, Wanted(*wanted)
    )
    if f.image == "operand" and g.u is not None and wanted[2]:
        g = g._replace(u=g.u.clone())  # du and dw share memory, which outputs of operators may not
    return _present([t if is_wanted else None for t, is_wanted in zip(g, wanted, strict=True)], A)


@backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    tensors, wanted = arguments[3:11], arguments[18]
    A = tensors[4]
    return [
        A.new_empty(0) if tensor is None or not is_wanted else tensor.new_empty(tensor.shape)
        for tensor, is_wanted in zip(tensors, wanted, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    t = Inputs(*inputs[:14])
    ctx.settings = inputs[14:17]
    _, x_t, x_v = output
    # x, biases and all: the operator's arguments; a compiler saves what its backward pass reads
    ctx.save_for_backward(*t[:9], *t[11:], x_t, x_v)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    nothing = (None,) * len(needs)
    if dy is None:
        return nothing
    *tensors, x_t, x_v = ctx.saved_tensors
    wanted = list(needs[:8])
    gradients = backward_op(dy, x_t, x_v, *tensors, *ctx.settings, wanted)
    by_place = [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]
    base_out = dy if needs[BASE_OUT] else None
    return *by_place, None, None, base_out, *nothing[BASE_OUT + 1 :]


forward_op.register_autograd(_backward, setup_context=_setup)


# Places of what is multiplied, and cast under autocast: u, w, A, b_A, B, b_B, weight and bias.
FACTORS = range(2, 10)


def _autocasting(device: str) -> Callable[..., Any]:
    """The operator under autocast: factors, and x of a frozen base, in autocast's dtype."""

    def cast(*arguments: Any) -> Any:
        places = {*FACTORS, 0} if Fusion.of_text(arguments[15]).base == "frozen" else {*FACTORS}
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return forward_op(
                *(
                    value.to(dtype) if place in places and isinstance(value, Tensor) else value
                    for place, value in enumerate(arguments)
                )
            )

    return cast


_library = torch.library.Library("fused_route", "FRAGMENT")
for _device in ("cpu", "cuda"):
    _library.impl("forward", _autocasting(_device), f"Autocast{_device.upper()}")


def traced(f: Fusion, longest: int, s: float, t: Inputs) -> Tensor:
    """y by the operator, for compilers."""
    is_trained = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in t[:8]
    )
    return forward_op(*t, longest, f.text(), s, is_trained and f.x_t == "saved")[0]


def eager(plan: Plan, longest: int, s: float, t: Inputs) -> Tensor:
    """y by the Function, or by nothing around the launches where no gradient is recorded."""
    if torch.is_grad_enabled():
        return Routed.apply(plan, longest, s, *t)
    return ops.forward(plan, all_readable(t), longest, s, False, False)[0]
