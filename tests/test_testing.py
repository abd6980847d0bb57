"""The tester: honest implementations pass whatever the draw, and every kind of fault fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_route.testing import NORMS, assert_as_good_as_eager, roundoff

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1), (1, 4, 2), (3, 2, 1), (2000, 2, 1), (37, 48, 16)]  # M, d, r
Named = dict[str, Tensor]


def blocked(a: Tensor, b: Tensor) -> Tensor:
    """a b with the terms of each sum in another order, 16 at a time, accumulated in float32."""
    terms = torch.randperm(a.shape[1])
    total = torch.zeros(a.shape[0], b.shape[1])
    for block in terms.split(16):
        total += a[:, block].float() @ b[block].float()
    return total


def low_rank(leaves: list[Tensor], product: Callable[[Tensor, Tensor], Tensor]) -> Named:
    """y = (x Aᵀ) Bᵀ + b and its gradients for dy, by two products each; x_t as x is stored."""
    x, A, B, b, dy = leaves
    x_t, dx_t = product(x, A.T).to(x.dtype), product(dy, B).to(x.dtype)
    return {
        "y": product(x_t, B.T) + b,
        "x": product(dx_t, A),
        "A": product(dx_t.T, x),
        "B": product(dy.T, x_t),
        "b": product(torch.ones(1, dy.shape[0], dtype=dy.dtype), dy)[0],
    }


def draw(seed: int, dtype: torch.dtype, M: int, d: int, r: int) -> tuple[Named, Named, Named]:
    """(honest implementation, truth, eager) of one draw."""
    torch.manual_seed(seed)
    shapes = [(M, d), (r, d), (d, r), (d,), (M, d)]
    leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    honest = {name: x.to(dtype) for name, x in low_rank(leaves, blocked).items()}
    truth = low_rank([x.double() for x in leaves], torch.matmul)
    return honest, truth, low_rank(leaves, torch.matmul)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_honest_implementations_pass(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Also beside an eager that is exact, as it is by luck where elements are few."""
    for seed in range(40):
        honest, truth, eager = draw(seed, dtype, *shape)
        assert_as_good_as_eager(honest, truth, eager)
        exact = {name: x.to(dtype) for name, x in truth.items()}
        ratios = assert_as_good_as_eager(honest, truth, exact)
        assert ratios.keys() == truth.keys() and max(ratios.values()) < 2


def test_ratio_of_eager_itself() -> None:
    _, truth, eager = draw(0, torch.bfloat16, 48, 64, 16)
    eager["y"].requires_grad_()
    assert all(0.1 < ratio < 1 for ratio in assert_as_good_as_eager(eager, truth, eager).values())


def zero_tile(x: Tensor) -> Tensor:
    x[-16:, 16:32] = 0
    return x


def fill_row(value: float) -> Callable[[Tensor], Tensor]:
    def fill(x: Tensor) -> Tensor:
        x[5] = value
        return x

    return fill


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "5 % off": lambda x: x * 1.05,
    "zeroed tile": zero_tile,
    "unwritten row": fill_row(float("nan")),
    "zeroed row": fill_row(0.0),
    "infinite row": fill_row(float("inf")),
    "swapped rows": lambda x: torch.cat([x[:3], x[[4, 3]], x[5:]]),
    "other shape": lambda x: x.unsqueeze(0),
    "other dtype": lambda x: x.double(),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["y", "x", "A", "B"])
def test_faults_fail(name: str, fault: str, dtype: torch.dtype) -> None:
    honest, truth, eager = draw(0, dtype, 48, 64, 32)
    assert_as_good_as_eager(honest, truth, eager)
    honest[name] = FAULTS[fault](honest[name].clone())
    with pytest.raises(AssertionError, match=f"^{name}: "):
        assert_as_good_as_eager(honest, truth, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, d", [(1, 1), (1, 3), (300, 320)])
def test_zeros_fail_at_any_size(M: int, d: int, dtype: torch.dtype) -> None:
    honest, truth, eager = draw(1, dtype, M, d, 1)
    with pytest.raises(AssertionError, match=r"^y: "):
        assert_as_good_as_eager(honest | {"y": torch.zeros_like(honest["y"])}, truth, eager)


@pytest.mark.parametrize("dtype, smaller", [*zip(DTYPES, (1e-4, 1e-2, 0.1), strict=True)])
def test_a_small_row_among_large_ones_is_seen(dtype: torch.dtype, smaller: float) -> None:
    large = torch.randn(300, 320, dtype=torch.float64)
    large[7] *= smaller
    rounded = large.to(dtype)
    assert_as_good_as_eager({"x": rounded}, {"x": large}, {"x": rounded})
    rows = rounded.clone()
    rows[7] = 0
    with pytest.raises(AssertionError, match="in row 7: "):
        assert_as_good_as_eager({"x": rows}, {"x": large}, {"x": rounded})


def everywhere(truth: Tensor) -> Tensor:
    """An error that is small beside one large row and column, which set the scale of blocks."""
    truth[3] *= 10
    truth[:, 4] *= 10
    return truth + 0.05


def added(block: tuple[int | slice, int | slice], error: float) -> Callable[[Tensor], Tensor]:
    def add(truth: Tensor) -> Tensor:
        x = truth.clone()
        x[block] += error
        return x

    return add


SEEN_BY: dict[str, Callable[[Tensor], Tensor]] = {
    "whole 0": everywhere,
    "row 7": added((7, slice(None)), 0.06),
    "column 9": added((slice(None), 9), 0.06),
    "tile 21": added((slice(16, 32), slice(16, 32)), 0.06),
    "element 645": added((2, 5), 0.3),
}


@pytest.mark.parametrize("where", SEEN_BY)
def test_each_norm_sees_what_no_other_does(where: str) -> None:
    truth = torch.randn(300, 320, dtype=torch.float64)
    actual, eager = SEEN_BY[where](truth).bfloat16(), truth.bfloat16()
    norm, _ = where.split()
    with pytest.raises(AssertionError, match=f"in {where}: "):
        assert_as_good_as_eager({"x": actual}, {"x": truth}, {"x": eager})
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(NORMS, norm)
        assert_as_good_as_eager({"x": actual}, {"x": truth}, {"x": eager})


@pytest.mark.parametrize("make", [torch.randn, torch.rand])
def test_the_order_of_summation_is_no_fault(make: Callable[..., Tensor]) -> None:
    """2000 terms one by one, the worst order, beside pairs."""
    terms = make(2000, 4000)
    one_by_one = torch.zeros(4000)
    for row in terms:
        one_by_one += row
    truth = {"x": terms.double().sum(0)}
    assert_as_good_as_eager({"x": one_by_one}, truth, {"x": terms.sum(0)})


@pytest.mark.parametrize("whose", ["actual", "truth", "eager"])
def test_a_missing_tensor_fails(whose: str) -> None:
    names = ("actual", "truth", "eager")
    given = draw(0, torch.float32, 3, 4, 2)
    tensors = given[names.index(whose)]
    missing = tensors.pop("B")
    with pytest.raises(AssertionError, match=f"^B: missing in {whose}$"):
        assert_as_good_as_eager(*given)
    tensors |= {"B": missing, "C": missing}
    others = ", ".join(name for name in names if name != whose)
    with pytest.raises(AssertionError, match=f"^C: missing in {others}$"):
        assert_as_good_as_eager(*given)


def test_a_truth_that_is_rounded_fails() -> None:
    x = {"x": torch.ones(3)}
    with pytest.raises(AssertionError, match=r"^x: truth must be float64"):
        assert_as_good_as_eager(x, x, x)


def test_a_truth_that_is_zero() -> None:
    zero = {"x": torch.zeros(4, 4)}
    truth = {"x": torch.zeros(4, 4, dtype=torch.float64)}
    assert assert_as_good_as_eager(zero, truth, zero) == {"x": 0.0}
    with pytest.raises(AssertionError, match=r"^x: "):
        assert_as_good_as_eager({"x": torch.full((4, 4), 1e-30)}, truth, zero)


def test_nothing_is_asked_where_the_truth_is_not_finite() -> None:
    truth = {"x": torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)}
    actual = {"x": torch.tensor([1.0, 2.0, float("nan")])}
    assert_as_good_as_eager(actual, truth, actual)
    with pytest.raises(AssertionError, match=r"^x: "):
        assert_as_good_as_eager({"x": actual["x"] + 1}, truth, actual)


def test_an_eager_that_overflows_is_no_measure() -> None:
    truth = {"x": torch.tensor([1e5, 1.0], dtype=torch.float64)}
    eager = {"x": truth["x"].half()}
    with pytest.raises(AssertionError, match=r"^x: eager is not finite"):
        assert_as_good_as_eager({"x": torch.ones(2).half()}, truth, eager)


def test_scalars_and_empty_tensors() -> None:
    truth = {"x": torch.tensor(0.1).double(), "none": torch.empty(0, 3).double()}
    exact = {name: x.float() for name, x in truth.items()}
    assert assert_as_good_as_eager(exact, truth, exact) == {"x": 0.0, "none": 0.0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_roundoff_falls_to_eps(dtype: torch.dtype) -> None:
    by_size = [roundoff(dtype, n) for n in (1, 2, 4, 32, 10**5)]
    assert by_size == sorted(by_size, reverse=True) and by_size[0] <= 0.25
    assert 1 <= by_size[-1] / torch.finfo(dtype).eps < 10
