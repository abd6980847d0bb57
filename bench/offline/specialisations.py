"""What the library really launches: kernels with the types of their arguments and their constants.

    with recorded() as seen:
        ops.forward(…)  # on meta tensors: of any size, and nothing is computed
    seen                # {Specialisation: None, …}, in the order of the launches

`fused_route.ops` runs whole, on tensors without memory; only the launch itself is replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.configured import along_with_few_rows, configured, wherever_it_can
from fused_route import ops
from fused_route.fusion import Fusion
from fused_route.kernels.config import Tile
from fused_route.kernels.launch import Launch
from fused_route.ops import Inputs
from fused_route.sizes import Wanted

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Specialisation(NamedTuple):
    """All that decides what Triton compiles for a chip.

    Args:
        kernel: where the jitted function is, "module:name".
        arguments: (parameter, its type as Triton writes it, or None for an absent pointer), …
        constants: (constexpr parameter, its value), …
        tile: whose warps, stages and registers the compiler is told.
    """

    kernel: str
    arguments: tuple[tuple[str, str | None], ...]
    constants: tuple[tuple[str, Any], ...]
    tile: Tile

    @property
    def function(self) -> Any:
        """The jitted function."""
        module, _, name = self.kernel.partition(":")
        return getattr(import_module(module), name)

    @property
    def types(self) -> dict[str, str | None]:
        return dict(self.arguments)

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.constants)


def _type(argument: Any) -> str | None:
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def specialisation(launch: Launch, arguments: tuple[Any, ...]) -> Specialisation:
    """That of one launch with these tensors and numbers."""
    kernel = launch.kernel
    names = kernel.arg_names[: len(arguments)]
    return Specialisation(
        f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        tuple((name, _type(value)) for name, value in zip(names, arguments, strict=True)),
        tuple(launch.constants.items()),
        launch.tile,
    )


@contextmanager
def recorded() -> Iterator[dict[Specialisation, None]]:
    """The specialisations that are launched in this block, each once; none of them runs."""
    seen: dict[Specialisation, None] = {}

    def note(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        seen[specialisation(self, (*tensors, *numbers))] = None

    launch = Launch.__call__
    Launch.__call__ = note  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Launch.__call__ = launch  # type: ignore[method-assign]


# (dtype of x, y and their gradients; of A, B and the bottleneck; products)
NUMBERS = {
    "bf16": (torch.bfloat16, torch.bfloat16, "ieee"),
    "fp16": (torch.float16, torch.float16, "ieee"),
    "amp": (torch.float32, torch.bfloat16, "ieee"),  # hidden states that autocast leaves in fp32
    "amp16": (torch.bfloat16, torch.float16, "ieee"),  # or in the other 16 bits
    "fp32": (torch.float32, torch.float32, "ieee"),
    "tf32": (torch.float32, torch.float32, "tf32"),
}

# (base, of how many segments, which are adapted)
HOSTS = {
    "adapter": ("residual", 1, (0,)),
    "frozen": ("frozen", 1, (0,)),
    "given": ("given", 1, (0,)),
    "frozen_qv": ("frozen", 3, (0, 2)),
    "given_qv": ("given", 3, (0, 2)),
}

# With the fewest the columns of K1 are in parts where a GPU has them, whatever the tile.
ROWS = {"fewest": 16, "few": 4224, "many": 16384}
# Of a sample at most: with many rows enough for kernels that take those of one another way.
LONGEST = {"fewest": 16, "few": 64, "many": 16384}
SAMPLES = {"fewest": 4, "few": 80, "many": 4}  # few rows are blocks enough for K1's columns whole


@dataclass(frozen=True)
class Layer:
    """A routed layer of widths d → d with dropout p, packed rows and all gradients wanted.

    An adapter has biases and gelu; of two segments each is routed by itself. x_t goes through relu
    before the mix. Every mix but "matrix" can own its image; "along" is such an image, made by K1
    where rows are few, on any chip. plan: of a frozen base, whose weight lies by rows or by columns
    (by_columns). starts: whether kernels start "after" the one before them, or "early".
    """

    host: str
    mix: str
    image: str
    R: int
    d: int
    numbers: str
    rows: str
    p: float = 0.1
    x_t: str = "saved"
    plan: str = "p1"
    by_columns: bool = False
    starts: str = "after"

    def fusion(self) -> Fusion:
        base, of, segments = HOSTS[self.host]
        owned = self.image in ("owned", "along")
        return Fusion(
            mix=self.mix,
            u="relu" if owned and self.mix == "rank1" else "plain",
            w="plain",
            first="none" if self.mix == "identity" else "relu",
            groups=len(segments),
            image="owned" if owned else self.image,
            base=base,
            activation="gelu" if self.host == "adapter" else "none",
            p=self.p,
            segments=segments,
            of=of,
            x_t=self.x_t,
            products=NUMBERS[self.numbers][2],
            plan=self.plan,
        )

    def inputs(self, f: Fusion) -> Inputs:
        of_x, of_A, _ = NUMBERS[self.numbers]
        M, S, R, d, g = ROWS[self.rows], SAMPLES[self.rows], self.R, self.d, f.groups

        def x(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=of_x, device="meta")

        def a(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=of_A, device="meta")

        def index(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        vector = a(S, R) if self.image == "operand" and self.mix != "identity" else None
        frozen, adapter = f.base == "frozen", f.base == "residual"
        weight = None
        if frozen:
            weight = x(d, f.of * d).mT if self.by_columns else x(f.of * d, d)
        return Inputs(
            x=x(M, d),
            x_r=x(S, d) if f.image == "owned" else None,
            u=vector if self.mix == "rank1" else None,
            w=a(S, g, R // g, R // g) if self.mix == "matrix" else vector,
            A=a(R, d),
            b_A=a(R) if adapter else None,
            B=a(len(f.segments) * d, R // len(f.segments)),
            b_B=a(d) if adapter else None,
            weight=weight,
            bias=x(f.of * d) if frozen else None,
            base_out=x(M, f.of * d) if f.base == "given" else None,
            seed=index(1) if self.p > 0.0 else None,
            row_sample=index(M, dtype=torch.int32),
            offsets=index(S + 1),
        )


def launched_by(layer: Layer, major: int | None = None) -> dict[Specialisation, None]:
    """What one forward and one backward pass launch, on a GPU of this major compute capability."""
    f, longest = layer.fusion(), LONGEST[layer.rows]
    t = layer.inputs(f)
    entries: dict[str, Any] = {}
    if layer.image == "along":
        entries["image"] = along_with_few_rows
    if layer.starts == "early":
        entries["overlaps"] = wherever_it_can
    with (
        recorded() as seen,
        mock.patch.object(ops, "major_of", lambda device: major),
        configured(**entries) if entries else nullcontext(),
    ):
        plan = ops.plan_for(f, t)
        y, x_t, x_v = ops.forward(plan, t, longest, 0.5, layer.x_t == "saved", True)
        wanted = Wanted(*(tensor is not None for tensor in t[:8]))
        ops.backward(plan, t, longest, 0.5, torch.empty_like(y), x_t, x_v, wanted)
    return seen
