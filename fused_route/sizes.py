"""What a plan keeps of a call's sizes: rows, samples, grids, and the gradients that are wanted."""

from typing import Any, NamedTuple

Grid = tuple[int, int, int]
Numbers = tuple[int | float, ...]


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


class Wanted(NamedTuple):
    """Which gradients are to be computed."""

    x_h: bool
    x_r: bool
    u: bool
    w: bool
    A: bool
    b_A: bool
    B: bool
    b_B: bool


class Sizes(NamedTuple):
    """What follows from M rows of S samples: T each, or packed and `longest` at most.

    `pairs` counts the rows of the partial sums that K2 writes for one vector operand, `is_long`
    says whether a sample has many of them; the gradient of a matrix operand is summed in `splits`
    of a sample's rows. `rows` are the numbers that kernels over rows take, but for s. The grid of
    K1 has parts of columns on its third axis, that of K1 up to the bottleneck has not.
    """

    M: int
    S: int
    T: int
    pairs: int
    is_long: bool
    splits: int
    forward_grid: Grid
    bottleneck_grid: Grid
    backward_grid: Grid
    rows: Numbers


class Sums(NamedTuple):
    """How K3 splits the sums over rows for the wanted gradients, and K4 adds them up."""

    length: int
    partials: Any
    partials_grid: Grid
    partials_numbers: Numbers
    add: Any
    add_grid: Grid
    add_numbers: Numbers
