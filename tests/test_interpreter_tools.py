"""The repaired interpreter against torch, and what the counters of traffic see."""
# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself and knows none for tiles.

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from interpreter import Moved, Traffic, repair
from tiny_kernels import store_mask
from triton.runtime import interpreter

pytestmark = pytest.mark.interpret
N = 32


@triton.jit
def multiply(a, b, c, out, N: tl.constexpr, HAS_C: tl.constexpr):
    """out (N, N) = a b (+ c): accumulated in float32."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.float32)
    if HAS_C:
        total += tl.load(c + at)
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), total))


@triton.jit
def convert(x, out, N: tl.constexpr, ROUNDING: tl.constexpr):
    """out (N,) = x in the dtype of out."""
    at = tl.arange(0, N)
    if ROUNDING is None:
        converted = tl.load(x + at).to(out.dtype.element_ty)
    else:
        converted = tl.load(x + at).to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(out + at, converted)


@triton.jit
def combine(x, y, out, N: tl.constexpr, OPERATION: tl.constexpr):
    """out (N,) from x and y, in their dtype."""
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "subtract":
        result = a - b
    elif OPERATION == "multiply":
        result = a * b
    elif OPERATION == "divide":
        result = a / b
    elif OPERATION == "fma":
        result = tl.fma(a, b, a)
    elif OPERATION == "negate":
        result = -a
    elif OPERATION == "absolute":
        result = tl.abs(a)
    elif OPERATION == "constant":
        result = a * 1.3
    elif OPERATION == "full":
        result = tl.full((N,), 0.3, tl.bfloat16)
    elif OPERATION == "where":
        result = tl.where(a < b, a, b)
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "less":
        result = (a < b).to(tl.float32)
    elif OPERATION == "sum":
        result = a + tl.sum(b, 0)
    tl.store(out + at, result)


@triton.jit
def shift(x, y, M, offset, BLOCK: tl.constexpr):
    """y[i] = x[i + offset], zero from outside, BLOCK of M elements a program."""
    to = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = to + offset
    tl.store(y + to, tl.load(x + at, mask=(at >= 0) & (at < M), other=0.0), mask=to < M)


@triton.jit
def all_load_one_stores(x, N: tl.constexpr, WRITER: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at), mask=tl.program_id(0) == WRITER)


@triton.jit
def store_then_load(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))
    tl.store(x + at, tl.load(y + at))


@triton.jit
def add_up(x, y, N: tl.constexpr):
    tl.atomic_add(y, tl.load(x + tl.program_id(0)))


def test_a_launch_patches_the_language_once() -> None:
    """However many device functions it calls; and behind it the language is as it was before."""
    out, seed = torch.empty(64, 32, dtype=torch.bool), torch.tensor(1)
    store_mask[4, 1](seed, out, 0, 32, BM=16, BK=32)  # what calls leave behind, they leave now
    before, counts = dict(vars(tl)), []
    for programs in (1, 4):
        look = interpreter._patch_builtin
        with mock.patch.object(interpreter, "_patch_builtin", wraps=look) as looks:
            store_mask[programs, 1](seed, out, 0, 32, BM=16, BK=32)
        counts.append(looks.call_count)
    assert vars(tl) == before and counts[0] == counts[1] > 0


def test_repair_happens_once() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_dot
    repair()
    assert InterpreterBuilder.create_dot is before


@pytest.mark.parametrize(("name", "dtype"), [
    ("create_icmpEQ", tl.int32), ("create_fcmpOEQ", tl.float32), ("create_fcmpOEQ", tl.bfloat16),
])  # fmt: skip
def test_comparisons_give_truth_values(name: str, dtype: tl.dtype) -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    bits = {tl.int32: np.int32, tl.float32: np.float32, tl.bfloat16: np.uint16}[dtype]
    one = TensorHandle(np.ones(1, bits), dtype)
    found = getattr(InterpreterBuilder(), name)(one, one)
    assert found.dtype == tl.int1 and found.data.all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot(dtype: torch.dtype, accumulate: bool) -> None:
    a, b = torch.randn(2, N, N).to(dtype)
    c, out = torch.randn(N, N), torch.empty(N, N)
    multiply[(1,)](a, b, c, out, N, accumulate)
    truth = a.double() @ b.double() + (c if accumulate else 0.0)
    # N products and N sums of float32, the largest partial sum below 8 N^0.5.
    assert (out - truth).abs().max() < 8 * N**0.5 * 2**-23


TIES = [1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1.0 - 2**-8, 3.4e38, -3.4e38]
EDGES = [0.0, -0.0, float("inf"), -float("inf"), 1e-40, 2**-133, 1.1754944e-38]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("rounding", [None, "rtne"])
def test_rounding_to_nearest_even(rounding: str | None) -> None:
    special = torch.tensor(TIES + EDGES)
    x = torch.cat([special, torch.randn(1024 - len(special)) * 10.0 ** torch.randint(-9, 9, ())])
    out = torch.empty(1024, dtype=torch.bfloat16)
    convert[(1,)](x, out, 1024, rounding)
    assert same_bits(out, x.bfloat16())


def test_every_nan_stays_nan() -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)
    out = torch.empty(4, dtype=torch.bfloat16)
    convert[(1,)](bits.view(torch.float32), out, 4, None)
    assert out.isnan().all()


def test_rounding_toward_zero_stays() -> None:
    x, out = torch.tensor(TIES[:4]), torch.empty(4, dtype=torch.bfloat16)
    convert[(1,)](x, out, 4, "rtz")
    assert torch.equal(out.float(), torch.tensor([1.0, 1.0 + 2**-7, 1.0, -1.0]))


@pytest.mark.parametrize(
    "other", ["float16", "float32", "float64", "bool", "int8", "int32", "int64"]
)
def test_conversions(other: str) -> None:
    x = (torch.randn(N) * 100).to(getattr(torch, other))
    there, back = torch.empty(N, dtype=torch.bfloat16), torch.empty_like(x)
    convert[(1,)](x, there, N, None)
    assert same_bits(there, x.bfloat16())
    if other != "bool":
        convert[(1,)](there, back, N, None)
        assert torch.equal(back, there.to(x.dtype))


COMBINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "divide": torch.divide,
    "fma": lambda x, y: (x.float() * y.float() + x.float()).bfloat16(),
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "constant": lambda x, y: x * torch.tensor(1.3).bfloat16(),
    "full": lambda x, y: torch.full_like(x, 0.3),
    "where": torch.minimum,
    "maximum": torch.maximum,
    "less": torch.lt,
}


@pytest.mark.parametrize("operation", COMBINED)
def test_elementwise_bfloat16(operation: str) -> None:
    x, y = torch.randn(2, N).bfloat16()
    expected = COMBINED[operation](x, y)
    out = torch.empty(N, dtype=torch.bfloat16)
    combine[(1,)](x, y, out, N, operation)
    assert torch.equal(out, expected.bfloat16())


def test_sum_of_bfloat16_is_refused() -> None:
    x = torch.ones(N).bfloat16()
    with pytest.raises(Exception, match="convert it to float32 first"):
        combine[(1,)](x, x, torch.empty_like(x), N, "sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_bytes_of_a_copy(dtype: torch.dtype) -> None:
    """8 programs of 16, the last one empty and the one before cut; both tensors in one memory."""
    memory, width = torch.zeros(4, 256, dtype=dtype), dtype.itemsize
    x, y = memory[0, :100], memory[2, :100]
    with Traffic() as traffic:
        traffic.watch("x", x)
        traffic.watch("y", y)
        shift[(8,)](x, y, 100, 0, 16)
        # torch aligns memory to lines; float32, for one, has 400 bytes here, 6.25 lines.
        once = Moved(100 * width, 100 * width, -(-100 * width // 64) * 64)
        moved = {"x:ld": once, "y:st": once}
        assert traffic.table() == moved
        shift[(8,)](x, y, 100, 1, 16)
        assert traffic.table()["x:ld"] == once._replace(requested=199 * width)
        traffic.reset()
        assert traffic.table() == {} and traffic.launches == 0
        shift[(8,)](x, y, 100, 0, 16)
        assert traffic.table() == moved and traffic.launches == 1


def test_bytes_of_strided_views_and_of_what_nobody_watches() -> None:
    pairs, y = torch.arange(64.0).view(32, 2), torch.empty(64)
    with Traffic() as traffic:
        traffic.watch("left", pairs[:, 0])
        traffic.watch("right", pairs[:, 1])
        shift[(1,)](pairs, y, 64, 0, 64)
    half = Moved(128, 128, 256)
    expected = {"left:ld": half, "right:ld": half, "unwatched:st": Moved(256, 256, 256)}
    assert traffic.table() == expected and torch.equal(y, pairs.flatten())


def test_operations_and_atomics() -> None:
    x, total = torch.ones(N, N), torch.zeros(1)
    with Traffic() as traffic:
        traffic.watch("total", total)
        multiply[(1,)](x, x, x, torch.empty_like(x), N, False)
        add_up[(3,)](x, total, N)
    assert traffic.flops == 2 * N**3
    assert traffic.atomics == 3 and traffic.table()["total:atomic"] == Moved(12, 4, 64)
    assert traffic.launches == 2 and total.item() == 3


@pytest.mark.parametrize(
    "offset, races",
    [
        pytest.param(0, set(), id="in place, each program its own"),
        pytest.param(-8, {"x"}, id="from the program before"),
        pytest.param(8, {"x"}, id="from the program after, intact by luck here"),
    ],
)
def test_loads_of_what_another_program_stores(offset: int, races: set[str]) -> None:
    x = torch.randn(64)
    with Traffic() as traffic:
        traffic.watch("x", x)
        shift[(8,)](x, x, 64, offset, 8)
        assert traffic.loads_after_stores == races
        traffic.reset()
        assert traffic.loads_after_stores == set()


@pytest.mark.parametrize("writer", [0, 1, 2])
def test_loads_of_several_programs_are_told_from_those_of_one(writer: int) -> None:
    x = torch.randn(N)
    with Traffic() as traffic:
        traffic.watch("x", x)
        all_load_one_stores[(3,)](x, N, writer)
        assert traffic.loads_after_stores == {"x"}
        traffic.reset()
        all_load_one_stores[(1,)](x, N, 0)
    assert traffic.loads_after_stores == set()


def test_load_after_store_in_one_program_and_in_two_launches() -> None:
    x, y = torch.ones(2, N)
    with Traffic() as traffic:
        traffic.watch("x", x)
        traffic.watch("y", y)
        shift[(1,)](x, y, N, 0, N)
        shift[(1,)](y, x, N, 0, N)
        assert traffic.loads_after_stores == set()
        store_then_load[(1,)](x, y, N)
    assert traffic.loads_after_stores == {"y"}


def test_counting_ends_with_the_context() -> None:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    watched = (InterpreterBuilder.create_masked_load, GridExecutor.__call__)
    x = torch.ones(N)
    with pytest.raises(ZeroDivisionError), Traffic() as traffic:
        traffic.watch("x", x)
        assert InterpreterBuilder.create_masked_load is not watched[0]
        raise ZeroDivisionError
    shift[(1,)](x, torch.empty(N), N, 0, N)
    assert traffic.table() == {} and traffic.launches == 0
    assert (InterpreterBuilder.create_masked_load, GridExecutor.__call__) == watched


def test_new_memory_is_poisoned() -> None:
    like = torch.ones(2, dtype=torch.bfloat16)
    for made in (torch.empty(3), torch.empty_like(like), like.new_empty(2, 2)):
        assert made.isnan().all()
    assert torch.empty(2, dtype=torch.int32).eq(2**31 - 1).all()


def test_hardware_does_not_trap() -> None:
    x, out = torch.tensor([1e6, -1e6, 0.0, 1.0]), torch.empty(4, dtype=torch.float16)
    convert[(1,)](x, out, 4, None)
    assert out.tolist() == [float("inf"), -float("inf"), 0.0, 1.0]
