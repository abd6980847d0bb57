"""Which calls the kernels cover. Each function returns what stands in the way, or None."""

import importlib.util
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .reference import Dropout
from .routes import Route, is_built_in
from .routing import Routing
from .routing_input import RoutingInput
from .sizes import cdiv

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_R = 256  # as in kernels/config.py, which is not imported for a question
# Rows and the pairs (block, sample) of them, up to M + M / 16, are counted in 32 bits.
MAX_ROWS = 2**30
LEAST_ROWS = 16  # of a block
MAX_OF_SAMPLE = (2**16 - 1) * LEAST_ROWS  # a grid's second axis
MOST_BLOCKS = 2**31  # of a grid, the smallest ones; of so many Triton launches none
MOST_WEIGHTS = 2**31  # elements of A or B, whose offsets have 32 bits

# AMD's chips with matrix cores that Triton supports.
AMD = ("gfx908", "gfx90a", "gfx942", "gfx950")


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _rows_of_sample(x_h: Tensor, given: RoutingInput, route: Route) -> int:
    """The most rows of a sample, where kernels may give it blocks of its own; else 0."""
    is_vector = given.x_r.shape[1] == 1 and is_built_in(route)  # a user's may make a matrix
    if is_vector and given.operand is None:
        return 0
    return given.longest if given.offsets is not None else x_h.shape[1:-1].numel()


def is_long(given: RoutingInput) -> bool:
    """Whether packed samples may be too long for blocks of their own."""
    blocks = given.batch_size * cdiv(given.longest, LEAST_ROWS)
    return given.longest > MAX_OF_SAMPLE or blocks >= MOST_BLOCKS


@cache
def gpu_obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on this GPU, or None."""
    if torch.version.hip is not None:
        chip = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if chip in AMD else f"{chip} is none of {', '.join(AMD)}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"sm_{capability[0]}{capability[1]} is below sm_80"


def device_obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on this device, or None."""
    if not has_triton():
        return "Triton is not installed"
    if device.type == "cuda":
        return gpu_obstacle(device)
    return None if emulates(device) else f"tensors are on {device}, not on a GPU"


# Compilers call it instead of tracing it: what torch.compiler.assume_constant_result sets, which
# would import the whole compiler with this file.
device_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def emulates(device: torch.device) -> bool:
    """Whether Triton runs on this device without a GPU: interpreted, or with a driver for tests."""
    if device.type != "cpu":
        return False
    from triton import knobs
    from triton.runtime import driver

    return bool(knobs.runtime.interpret) or driver._active is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether kernels can read a tensor; while a compiler traces, which shows its own, it is."""
    return type(tensor) in (Tensor, Parameter) or torch.compiler.is_compiling()


def takes_derivatives() -> bool:
    """Whether derivatives may be taken that kernels do not have: by torch.func, or forward mode."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def interpreter_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels with products of this dtype cannot run on this device, or None."""
    if device.type != "cpu" or dtype != torch.bfloat16 or _adds_bfloat16():
        return None
    return "Triton's interpreter computes with the bits of bfloat16 as if they were whole numbers"


# As `device_obstacle`.
interpreter_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _adds_bfloat16() -> bool:
    """Whether Triton's interpreter, if there is one, finds that 1 + 1 is 2 (3.6 to 3.9 do not)."""
    from triton import knobs, language

    if not knobs.runtime.interpret:
        return True
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    one = TensorHandle(np.array([0x3F80], np.uint16), language.bfloat16)
    return bool(InterpreterBuilder().binary_op(one, one, np.add).data[0] == 0x4000)


def obstacle(
    tensors: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    routing: Routing,
    routing_input: RoutingInput | None,
    dropout: float | Dropout,
) -> str | None:
    """Why the kernels do not cover a call whatever the device, or None.

    `tensors` are the call's, by name, x_h, A and B among them; `dtype` is that of the products:
    that of x_h, or autocast's.
    """
    x_h, A, B = tensors["x_h"], tensors["A"], tensors["B"]
    assert x_h is not None and A is not None and B is not None
    if torch.compiler.is_compiling():
        tensors = {"x_h": x_h, "A": A}
    elif takes_derivatives():
        return "torch.func and forward mode need derivatives that kernels do not have"
    route = routing.route
    image: dict[str, Tensor | None] = {}
    if routing_input is not None:
        image = {"x_r": routing_input.x_r, "x_v": routing_input.x_v}
        if routing_input.operand is not None:
            image |= {f"operand {n}": x for n, x in enumerate(routing_input.operand.tensors)}
    for name, tensor in {**tensors, **image}.items():
        if tensor is None:
            continue
        if not is_plain(tensor):
            return f"{name} is a {type(tensor).__name__}; kernels read plain tensors"
        if name in ("x_h", "base_out") and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not one of {DTYPES}"
    if dtype not in DTYPES:
        return f"products are of {dtype}, not one of {DTYPES}"
    if x_h.shape[-1] == 0 or B.shape[0] == 0:
        return f"x_h {tuple(x_h.shape)} or B {tuple(B.shape)} has no columns"
    if max(A.shape[0] * A.shape[1], B.shape[0] * B.shape[1]) >= MOST_WEIGHTS:
        return f"A {tuple(A.shape)} or B {tuple(B.shape)} has {MOST_WEIGHTS} elements or more"
    if A.shape[0] > MAX_R:
        return f"R = {A.shape[0]} bottleneck columns are more than {MAX_R}"
    if x_h.shape[:-1].numel() > MAX_ROWS:
        return f"{x_h.shape[:-1].numel()} rows are more than {MAX_ROWS}"
    if routing_input is not None and (of_one := _rows_of_sample(x_h, routing_input, route)):
        if of_one > MAX_OF_SAMPLE:
            return f"{of_one} rows of one sample with a matrix of its own > {MAX_OF_SAMPLE}"
        if cdiv(of_one, LEAST_ROWS) * routing_input.batch_size >= MOST_BLOCKS:
            return f"{routing_input.batch_size} samples of up to {of_one} rows are too many"
    if isinstance(dropout, Dropout):
        return "masks of dropout are given; the kernels draw their own from a seed"
    if route.scores == "text":
        return f"route {route.name!r} mixes tokens with each other"
    return None if routing_input is None else _pairing_obstacle(routing, routing_input)


def _pairing_obstacle(routing: Routing, given: RoutingInput) -> str | None:
    """Whether each visual token may meet a text token of its own, which kernels do not know."""
    route, operand = routing.route, given.operand
    if operand is not None:
        vectors = () if operand.mix == "matrix" else operand.tensors
        rows = max((t.shape[-2] for t in vectors), default=1)
        return f"operand {operand.mix} has {rows} rows a sample" if rows > 1 else None
    # A user's published form is not known to be one vector or matrix a sample.
    pairs = not is_built_in(route) or route.name in ("add", "mul")
    if pairs and routing.transpose == "eccv24" and given.x_r.shape[1] > 1:
        return f"route {route.name!r} under transpose='eccv24' pairs visual with text tokens"
    return None
