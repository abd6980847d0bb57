"""Bytes that each kernel moves, tensor by tensor, are those of the table in kernels/README.md."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from interpreter import LINE, Moved, Traffic
from kernel_cases import P
from tile_tables import tiles
from torch import Tensor

from bench.configured import configured
from fused_route import Route, Routing, rank1, routed_adapter, routed_linear

pytest.importorskip("triton")

from fused_route.kernels.launch import Launch
from fused_route.sizes import cdiv

pytestmark = pytest.mark.interpret

BYTES = 2  # of an element of every tensor but the fp32 partial sums
SUMS = 4

# Rows of D, N and R elements begin at whole lines; tiles of 32 or 64 divide neither T nor D.
S, T, D, N = 3, 35, 96, 64
M = S * T

own_rank1 = Route("own", lambda x_v: rank1(x_v.tanh(), x_v), takes="vector")
ROUTES: dict[str, tuple[str | Route, int]] = {  # by mix: a route, and the Nv that gives this mix
    "identity": ("none", 1),
    "shift": ("add", 1),
    "scale": ("mul", 1),
    "rank1": ("gram", 1),
    "rank1_operand": (own_rank1, 1),
    "matrix": ("gram", 3),
}
SEGMENTS = {"linear": ((0,), 1), "given": ((0,), 1), "qkv": ((0, 2), 3)}
SEGMENTS |= {f"{host}_p3": SEGMENTS[host] for host in ("linear", "qkv")}

# X: bytes of x; Y: of the adapted columns of y; H: of a bottleneck tensor (M, R). P3's product has
# all columns of y, the ones that are not adapted too.
DESIGN: dict[str, dict[str, Callable[[int, int, int], int]]] = {
    "routed_forward": {
        "adapter": lambda X, Y, H: 2 * X + H,
        "linear": lambda X, Y, H: X + 2 * Y + H,
        "qkv": lambda X, Y, H: X + 2 * Y + H,
        "given": lambda X, Y, H: X + 2 * Y + H,
    },
    "routed_backward": {
        "adapter": lambda X, Y, H: 2 * X + 3 * H,
        "linear": lambda X, Y, H: Y + 2 * X + 3 * H,
        "qkv": lambda X, Y, H: Y + 2 * X + 3 * H,
        "given": lambda X, Y, H: Y + X + 3 * H,  # autograd adds the base's own dx: 3X more
        "linear_p3": lambda X, Y, H: Y + 3 * H,
        "qkv_p3": lambda X, Y, H: Y + 3 * H,
    },
    "weight_partials": dict.fromkeys(
        ("adapter", "linear", "qkv", "given", "linear_p3", "qkv_p3"),
        lambda X, Y, H: X + Y + 2 * H,
    ),
    "routed_bottleneck": dict.fromkeys(("linear_p3", "qkv_p3"), lambda X, Y, H: X + 2 * H),
    "extended_product": {
        "linear_p3": lambda X, Y, H: X + H + Y,
        "qkv_p3": lambda X, Y, H: X + H + Y * 3 // 2,
    },
}
DESIGN["extended_product, backward"] = DESIGN["extended_product"]
HOSTS_IN_PARTS = {"adapter": 2, "linear": 1}
OF_ALL_ROWS = {
    *("wide", "narrow", "out"),
    *("x", "x=base", "base", "y", "y=base", "x_t"),
    *("dy", "dy=base", "dx", "dx=base", "dx_t", "z"),
}


@pytest.fixture(autouse=True)
def few_rows_in_parts() -> Iterator[None]:
    """As where that was measured to be faster."""
    with configured(FORWARD_PROGRAMS={0: 132}):
        yield


class Seen(NamedTuple):
    """What one launch moved: bytes by "name:ld" and "name:st", and its blocks of rows.

    parts: of the columns of K1, each with programs of its own.
    """

    programs: int
    parts: int
    moved: dict[str, Moved]
    rows: int  # BM


@contextmanager
def traffic() -> Iterator[dict[str, Seen]]:
    """The launches of this block by kernel; none uses atomics or loads what it stored.

    A tensor that is given for several parameters has all their names, base last.
    """
    seen: dict[str, Seen] = {}
    launch = Launch.__call__

    def counted(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        names: dict[int, list[str]] = {}
        parameters = zip(self.kernel.arg_names, tensors, strict=False)
        given = {name.removesuffix("_ptr"): t for name, t in parameters if t is not None}
        for name in sorted(given, key=lambda name: name == "base"):
            names.setdefault(given[name].data_ptr(), []).append(name)
        with Traffic() as counter:
            for together in names.values():
                counter.watch("=".join(together), given[together[0]])
            launch(self, absent, grid, tensors, numbers)
        assert counter.launches == 1 and counter.atomics == 0
        # An element of y or dx is loaded, as the base, before the same program stores it.
        assert counter.loads_after_stores == set()
        kernel = self.kernel.fn.__name__
        if kernel == "extended_product" and kernel in seen:
            kernel += ", backward"
        assert kernel not in seen
        programs, parts = grid[0] * grid[1] * grid[2], grid[2] if kernel == "routed_forward" else 1
        seen[kernel] = Seen(programs, parts, counter.table(), self.constants.get("BM", 1))

    with mock.patch.object(Launch, "__call__", counted):
        yield seen


@dataclass(frozen=True)
class Case:
    """A layer whose every gradient is wanted, base and image included."""

    host: str
    mix: str
    R: int
    drops: bool = False
    dtype: torch.dtype = torch.bfloat16
    image: str = "apart"  # of the tiles
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def g(self) -> int:
        return len(SEGMENTS.get(self.host, ((0,), 1))[0])

    @property
    def is_p3(self) -> bool:
        return self.host.endswith("_p3")

    @property
    def of(self) -> int:
        return SEGMENTS.get(self.host, ((0,), 1))[1]

    @property
    def n(self) -> int:
        return D if self.host == "adapter" else N

    @property
    def XYH(self) -> tuple[int, int, int]:
        return BYTES * M * D, BYTES * M * self.g * self.n, BYTES * M * self.R

    @property
    def owns_image(self) -> bool:
        return self.mix in ("shift", "scale", "rank1")

    @property
    def is_along(self) -> bool:
        return self.owns_image and self.image == "along"

    @property
    def operand(self) -> int:
        """Bytes of a vector operand, or of K."""
        C = self.R // self.g
        return BYTES * S * (self.g * C * C if self.mix == "matrix" else self.R)

    @cached_property
    def seen(self) -> dict[str, Seen]:
        route, Nv = ROUTES[self.mix]
        named: dict[str, Any] = {"route": Routing(route), "dropout": P if self.drops else 0.0}
        named |= {"impl": "triton", **self.settings}

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape) * scale).to(self.dtype).requires_grad_()

        x, x_r = leaf(S, T, D), leaf(S, Nv, D)
        A, B = leaf(self.R, D, scale=D**-0.5), leaf(self.g * self.n, self.R // self.g)
        with tiles(image=self.image), traffic() as seen:
            if self.host == "adapter":
                y = routed_adapter(x, A, B, x_r, b_A=leaf(self.R), b_B=leaf(D), **named)
            else:
                adapted, of = SEGMENTS[self.host]
                if self.host == "given":
                    named["base_out"] = leaf(S, T, of * N)
                else:
                    named["weight"] = torch.randn(of * N, D, dtype=self.dtype)
                    named["bias"] = torch.randn(of * N, dtype=self.dtype)
                    named["plan"] = "p3" if self.is_p3 else "auto"
                y = routed_linear(x, A, B, x_r, adapted=adapted, of=of, **named)
            y.backward(torch.randn_like(y))
        return seen


def used(expected: Mapping[str, int | None]) -> dict[str, int]:
    """Without the tensors that this case does not have."""
    return {name: size for name, size in expected.items() if size}


def weights(case: Case) -> dict[str, int]:
    """Bytes of the parameters of a layer."""
    biases = {"b_A": BYTES * case.R, "b_B": BYTES * D} if case.host == "adapter" else {}
    B = BYTES * case.n * case.R
    return {"A": BYTES * case.R * D, "B": B, **biases}


def operands(case: Case) -> dict[str, int]:
    """What K2, and K1 where it does not make x_v, reads of the image."""
    names = {"identity": (), "rank1": ("u=w",), "rank1_operand": ("u", "w")}.get(case.mix, ("w",))
    return {f"{name}:ld": case.operand for name in names}


def forward(case: Case) -> dict[str, dict[str, int]]:
    """K1; by P3 as far as the bottleneck, then the product."""
    X, Y, H = case.XYH
    moved = {f"{name}:ld": size for name, size in weights(case).items()}
    if case.is_along:
        moved |= {"x_r:ld": BYTES * S * D, "x_v:st": case.operand}
    else:
        moved |= operands(case)
    if case.is_p3:
        B = moved.pop("B:ld")
        z = {**moved, "x:ld": X, "x_t:st": H, "z:st": H, "seed:ld": case.drops and 8}
        ours = {"wide:ld": X, "narrow:ld": H, "factor:ld": B, **base(case)}
        ours |= {"out:st": Y * case.of // case.g, "bias:ld": BYTES * case.of * N}
        return {"routed_bottleneck": used(z), "extended_product": ours}
    y = {
        "adapter": {"x=base:ld": X, "y:st": X},
        "given": {"x:ld": X, "base:ld": Y, "y:st": Y},
    }.get(case.host, {"x:ld": X, "y=base:ld": Y, "y=base:st": Y})
    return {"routed_forward": used({**moved, **y, "x_t:st": H, "seed:ld": case.drops and 8})}


def base(case: Case) -> dict[str, int]:
    """P3's product reads the frozen weight, all segments of it, in either direction."""
    return {"weight:ld": BYTES * case.of * N * D}


def pairs(case: Case, block: int) -> int:
    """Bytes of the partial sums of a vector operand: a row for each (block, sample) that meet."""
    return SUMS * case.R * len({(m // block, m // T) for m in range(M)})


def backward(case: Case) -> dict[str, dict[str, int]]:
    """K2. Of one vector x_v for both operands there is one sum; of K none, but dz for it.

    By P3 dx, and the mask of dropout, are the product's.
    """
    X, Y, H = case.XYH
    dx = {
        "adapter": {"dy=base:ld": Y, "dx:st": X},
        "given": {"dy:ld": Y, "dx:st": X},
    }.get(case.host, {"dy:ld": Y, "dx=base:ld": X, "dx=base:st": X})
    A_and_B = {f"{name}:ld": weights(case)[name] for name in "AB"}
    moved = {**A_and_B, **operands(case), **dx, "x_t:ld": H, "dx_t:st": H, "z:st": H}
    partial = pairs(case, case.seen["routed_backward"].rows)
    if case.mix == "matrix":
        moved["dz:st"] = H
    elif case.mix != "identity":
        moved["dw:st"] = partial
        moved["du:st"] = partial if case.mix == "rank1_operand" else 0
    seed = {"seed:ld": case.drops and 8}
    if not case.is_p3:
        return {"routed_backward": used({**moved, **seed})}
    for name in ("A:ld", "dx=base:ld", "dx=base:st"):
        del moved[name]
    ours: dict[str, int | None] = {
        "wide:ld": Y * case.of // case.g,
        "narrow:ld": H,
        "out:st": X,
        **base(case),
        **seed,
    }
    ours["factor:ld"] = weights(case)["A"]
    return {"routed_backward": used(moved), "extended_product, backward": used(ours)}


def operand_gradients(case: Case) -> dict[str, dict[str, int]]:
    """Of vectors: their partial sums; x_v's gradient goes on to x_r. Of K: x_t and dz."""
    H = case.XYH[2]
    if case.mix == "identity":
        return {}
    if case.mix == "matrix":
        return {"matrix_gradient": {"x_t:ld": H, "dz:ld": H, "dK:st": case.operand}}
    if case.is_along:  # K3 does it
        return {}
    partial = pairs(case, case.seen["routed_backward"].rows)
    if case.mix == "rank1_operand":
        return {"vector_gradient": {"partial:ld": 2 * partial, "out:st": 2 * case.operand}}
    moved = {"partial:ld": partial, "out:st": case.operand}
    moved |= {"A:ld": weights(case)["A"], "dx_r:st": BYTES * S * D, "seed:ld": case.drops and 8}
    return {"vector_gradient": used({**moved})}


def weight_gradients(case: Case) -> dict[str, dict[str, int]]:
    """K3 and K4. At these sizes the rows make one split, and those of x_r one more."""
    X, Y, H = case.XYH
    image = {"x_r:ld": BYTES * S * D, "dx_v:ld": case.operand} if case.owns_image else {}
    if case.is_along:
        image = {
            "x_r:ld": BYTES * S * D,
            "pairs:ld": pairs(case, case.seen["routed_backward"].rows),
            "A:ld": weights(case)["A"],
            "dx_r:st": BYTES * S * D,
        }
    dy = {"x:ld": X, "dx_t:ld": H, "dy:ld": Y, "z:ld": H, "seed:ld": case.drops and 8}
    sizes = weights(case)
    splits = {name: 2 if case.owns_image and name in ("A", "b_A") else 1 for name in sizes}
    partial = sum(size * splits[name] for name, size in sizes.items()) // BYTES * SUMS
    return {
        "weight_partials": used({**dy, **image, "partial:st": partial}),
        "add_partials": {
            "partial:ld": partial,
            **{f"d{name}:st": size for name, size in sizes.items()},
        },
    }


def image(case: Case) -> dict[str, dict[str, int]]:
    """K0, where the kernels compute x_v, and K1 does not."""
    if not case.owns_image or case.is_along:
        return {}
    moved = {f"{name}:ld": size for name, size in weights(case).items() if name in ("A", "b_A")}
    moved |= {"x:ld": BYTES * S * D, "out:st": case.operand, "seed:ld": case.drops and 8}
    return {"project": used({**moved})}


CASES = [
    Case(host, mix, R)
    for host in ("adapter", "linear", "qkv")
    for mix in ROUTES
    for R in (16, 64, 128)
]
CASES += [Case(host, mix, 16, drops=True) for host in ("adapter", "qkv") for mix in ROUTES]
CASES += [Case("given", mix, 64) for mix in ROUTES]
CASES += [Case("adapter", "scale", 64, dtype=torch.float16)]
CASES += [
    Case(host, mix, R, drops=drops, image="along")
    for mix in ("shift", "scale", "rank1")
    for host, R, drops in (("adapter", 16, True), ("linear", 64, False), ("qkv", 128, False))
]
CASES += [Case("linear_p3", mix, 64) for mix in ROUTES]
CASES += [Case("qkv_p3", mix, R, drops=drops) for mix in ("scale", "matrix")
          for R, drops in ((16, True), (128, False))]  # fmt: skip


def requested(case: Case, kernel: str) -> dict[str, int]:
    """How often tensors are asked for, from the L2 cache if not from memory: A and B by everyone.

    K1 of an adapter comes back to x as its base, K2 to x_t for the operand's gradient. Where K1
    makes x_v, each row comes for its own sample of x_r. With few rows every part of K1's columns
    reads x and A, and all of a block's parts B once. Every column
    tile of P3's product comes back to x and, where it is adapted, to z; every row block to W.
    """
    if kernel.startswith("extended_product"):
        launch = case.seen[kernel]
        blocks = cdiv(M, launch.rows)
        tiles, of_z = launch.programs // blocks, launch.programs // blocks
        if kernel == "extended_product":  # z's columns are their own segment's
            of_z = tiles // case.of
        return {"wide:ld": tiles, "narrow:ld": of_z, "weight:ld": blocks, "factor:ld": blocks}
    if kernel not in ("routed_forward", "routed_bottleneck", "routed_backward"):
        return {"x:ld": 1, "dy:ld": 1} if kernel == "weight_partials" else {}
    programs, parts = case.seen[kernel].programs, case.seen[kernel].parts
    again = case.mix not in ("identity", "matrix")
    of_rows = {"x:ld": parts, "x=base:ld": parts + 1, "y=base:ld": 1, "x_r:ld": parts * T}
    of_rows |= {"dy:ld": 1, "dy=base:ld": 2, "dx=base:ld": 1, "x_t:ld": 1 + again}
    return {**of_rows, "A:ld": programs, "B:ld": programs // parts}


def case_id(case: Case) -> str:
    drops = [*(["drops"] if case.drops else []), *(["along"] if case.image == "along" else [])]
    return "-".join([case.host, case.mix, str(case.R), *drops, str(case.dtype)[6:]])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bytes_of_each_tensor(case: Case) -> None:
    expected = image(case) | forward(case) | backward(case)
    expected |= operand_gradients(case) | weight_gradients(case)
    assert case.seen.keys() == expected.keys()
    for kernel, (_, _, moved, _) in case.seen.items():
        assert {name: size.distinct for name, size in moved.items()} == expected[kernel], kernel
        for name, size in moved.items():
            assert size.lines - size.distinct < LINE, (kernel, name)
        for name, times in requested(case, kernel).items():
            if name in moved:
                assert moved[name].requested == times * moved[name].distinct, (kernel, name)
        if kernel in DESIGN:
            of_rows = sum(size.distinct for name, size in moved.items() if name[:-3] in OF_ALL_ROWS)
            assert of_rows == DESIGN[kernel][case.host](*case.XYH), kernel


def test_few_rows_have_columns_in_parts() -> None:
    """As many as there are steps of columns: two of d, one of a segment."""
    parts = {host: Case(host, "scale", 16).seen["routed_forward"].parts for host in HOSTS_IN_PARTS}
    assert parts == HOSTS_IN_PARTS
