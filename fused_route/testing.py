"""Whether an implementation is as good as plain torch at the same dtype.

No tolerance is chosen for a case: both are compared with a float64 truth, and the error of the
implementation may be `factor` times that of eager torch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Each norm of a matrix (M, N) is its largest root mean square over blocks of this many rows and
#: columns, None being all: "whole" is the RMS norm, "element" the max norm. Between them, one bad
#: row, column or tile neither drowns among all elements nor hides below the largest.
NORMS: dict[str, tuple[int | None, int | None]] = {
    "whole": (None, None),
    "row": (1, None),
    "column": (None, 1),
    "tile": (16, 16),
    "element": (1, 1),
}
# 2000 float32 terms added one after the other err by 7 eps of the sum's RMS (measured), in blocks
# or pairs by 1: another order of summation is no fault.
SUM_ROUNDINGS = 8
# What happens by accident with less than about this probability is held to be a fault.
ACCIDENT = 1e-4


def assert_as_good_as_eager(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    eager: dict[str, Tensor],
    *,
    factor: float = 2.0,
) -> dict[str, float]:
    """Hold outputs and gradients, by name, to the errors of eager torch at the same dtype.

    With the errors a = actual − truth and e = eager − truth, every tensor must satisfy

        ‖a‖ ≤ factor · (‖e‖ + ε ‖truth‖)        ε ≥ eps(dtype of actual): see `roundoff`

    in each norm of `NORMS`. Tensors (…, N) are read as matrices (M, N), vectors as one row.
    Nothing is asked where the truth is not finite; elsewhere actual must be finite.

    One row or tile that is wrong altogether fails while its values exceed about 3 % of those of
    the largest row or tile in bfloat16, 0.4 % in float16, 1e-5 in float32: test all three. Tensors
    of fewer than 16 elements are held to less (`roundoff`), the less the fewer they are.

    Errors count as independent draws. Where a single row of text, or one in which a route near zero
    amplifies rounding, decides a whole gradient, luck does too: measured on honest adapters in
    half precision, one tensor in 10 000 fails. Test several rows, and another seed before blaming.

    Returns:
        The ratio ‖a‖ / (‖e‖ + ε ‖truth‖) by name, the largest over the norms, at most `factor`.

    Raises:
        AssertionError: for the first tensor, by name, that is missing, of another shape or dtype
            than its counterparts, not finite or too far from the truth; with norm and block.
    """
    for name in (names := sorted({*actual, *truth, *eager})):
        given = {"actual": actual, "truth": truth, "eager": eager}
        missing = [whose for whose, tensors in given.items() if name not in tensors]
        require(not missing, f"{name}: missing in {', '.join(missing)}")
    return {name: ratio(name, actual[name], truth[name], eager[name], factor) for name in names}


@torch.no_grad()
def ratio(name: str, actual: Tensor, truth: Tensor, eager: Tensor, factor: float) -> float:
    """The largest ratio of errors over the norms; AssertionError where it exceeds factor."""
    check_comparable(name, actual, truth, eager)
    if not truth.numel():
        return 0.0
    asked = truth.isfinite()
    t, a, e = (rows(torch.where(asked, x, 0.0)) for x in (truth, actual - truth, eager - truth))
    epsilon, smallest = roundoff(actual.dtype, t.numel()), torch.finfo(actual.dtype).smallest_normal
    worst, where = 0.0, ""
    for norm, block in NORMS.items():
        errors = rms(a, block)
        error, reference = float(errors.max()), float(rms(e, block).max())
        # Below the smallest normal number the spacing of floats no longer shrinks with them.
        scale = max(float(rms(t, block).max()), smallest)
        found = error / (reference + epsilon * scale)
        if found > worst:
            sides = f"{error:.2e} against {reference:.2e} + {epsilon:.1e} × {scale:.2e}"
            worst, where = found, f"{norm} {int(errors.argmax())}: {sides}"
    require(worst <= factor, f"{name}: {worst:.3g} times eager's error, not {factor:g}, in {where}")
    return worst


def check_comparable(name: str, actual: Tensor, truth: Tensor, eager: Tensor) -> None:
    """Equal shapes, a float64 truth, one dtype for the other two, finite where the truth is."""
    shapes = [tuple(x.shape) for x in (actual, truth, eager)]
    require(len(set(shapes)) == 1, f"{name}: shapes of actual, truth, eager differ: {shapes}")
    require(truth.dtype == torch.float64, f"{name}: truth must be float64, got {truth.dtype}")
    same = actual.dtype == eager.dtype
    require(same, f"{name}: actual is {actual.dtype}, but eager {eager.dtype}")
    for whose, given in (("actual", actual), ("eager", eager)):
        lost = truth.isfinite() & ~given.isfinite()
        require(
            not lost.any(),
            f"{name}: {whose} is not finite in {int(lost.sum())} of {lost.numel()} elements",
        )


def roundoff(dtype: torch.dtype, n: int) -> float:
    """ε: the error relative to the truth that n honest elements may have beyond eager's.

    eps(dtype) for the last rounding and SUM_ROUNDINGS eps of the accumulator for the sum before
    it. A sum may also cancel to a part δ of its terms' magnitude, of which its error is a part;
    all n do so with probability about δⁿ, so ε grows by ACCIDENT^(-1/n): 1.3 at 32 elements, 10 at
    four. It ends at 1/4, so that even a single element cannot be twice its value, or missing.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    epsilon = torch.finfo(dtype).eps + SUM_ROUNDINGS * torch.finfo(accumulator).eps
    return min(epsilon * ACCIDENT ** (-1 / n), 0.25)


def rows(x: Tensor) -> Tensor:
    """(…, N) as (M, N); a scalar as (1, 1)."""
    return x.reshape(math.prod(x.shape[:-1]), -1)


def rms(x: Tensor, block: tuple[int | None, int | None]) -> Tensor:
    """Root mean square of each block of x (M, N), row by row; ragged blocks are filled with 0."""
    M, N = x.shape
    height, width = block[0] or M, block[1] or N
    filled = F.pad(x, (0, -N % width, 0, -M % height))
    blocks = filled.unflatten(0, (-1, height)).unflatten(-1, (-1, width))
    return blocks.square().mean((1, 3)).sqrt().flatten()


def require(condition: bool, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not condition:
        raise AssertionError(message)
