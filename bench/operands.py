"""The tensors of one routed operation, from which every formulation computes the same."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.subject import Subject
from fused_route import RoutedAdapter, RoutedLinear, Routing, RoutingInput
from fused_route.functional import ProductPlan

S_SCALE = 2.0  # s = alpha / r
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """What is computed.

    Args:
        host: "adapter"; "linear" or "qkv" (2 of 3 segments adapted) with a frozen base that the
            operation owns; "given" or "given_qkv" with the base's output given.
        route: a name in `ROUTES`.
        Nv: visual tokens.
        dropout, recompute: as in `routed_linear`.
        trains_image: whether x_r wants a gradient.
        plan: of a base that the operation owns.
    """

    host: str
    route: str = "mul"
    Nv: int = 1
    dropout: float = 0.0
    recompute: bool = False
    trains_image: bool = False
    plan: ProductPlan = "auto"


class Operands:
    """One layer's tensors: S samples of T tokens, widths d → d, rank r; equal for equal arguments.

    Values are drawn in float32 on the device and rounded, of the size that training has: x and dy
    of mean square 1, weights so that they keep it.
    """

    def __init__(
        self,
        layer: Layer,
        S: int,
        T: int,
        d: int,
        r: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0, is_trained: bool = True) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(dtype).requires_grad_(is_trained)

        self.layer, self.r = layer, r
        self.adapted: tuple[int, ...] = (0, 2) if layer.host.endswith("qkv") else (0,)
        self.of = 3 if layer.host.endswith("qkv") else 1
        g = len(self.adapted)
        self.x = draw(S, T, d)
        self.x_r = draw(S, layer.Nv, d, is_trained=layer.trains_image)
        self.A, self.B = draw(g * r, d, scale=d**-0.5), draw(g * d, r, scale=r**-0.5)
        self.b_A = self.b_B = self.weight = self.bias = None
        if layer.host == "adapter":
            self.b_A, self.b_B = draw(r), draw(d)
        else:
            self.weight = draw(self.of * d, d, scale=d**-0.5, is_trained=False)
            self.bias = draw(self.of * d, is_trained=False)
        self.dy = draw(S, T, self.of * d, is_trained=False)

    @classmethod
    def of_case(cls, case: Case, device: torch.device | str, seed: int = 0) -> "Operands":
        """The operands of an operation in the table."""
        layer = Layer(case.host, case.route, case.Nv, case.dropout)
        return cls(layer, case.S, case.T, case.d, case.r, DTYPES[case.dtype], device, seed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All but dy, by name."""
        names = ("x", "x_r", "A", "b_A", "B", "b_B", "weight", "bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def inputs(self) -> list[Tensor]:
        """What exists anyway: nothing saves it for the backward pass."""
        return list(self.tensors.values())

    def in_float64(self) -> "Operands":
        """The same values in float64: the truth is computed from these."""
        found = object.__new__(Operands)
        found.__dict__ = dict(self.__dict__)
        for name, tensor in self.tensors.items():
            wide = tensor.detach().double().requires_grad_(tensor.requires_grad)
            setattr(found, name, wide)
        found.dy = self.dy.double()
        return found

    def subject(self, way: Any) -> Subject:
        """A formulation of these operands, to time: `way` makes y of them."""
        leaves = {name: t for name, t in self.tensors.items() if t.requires_grad}
        return Subject(partial(way, self), leaves, self.dy, live=self.inputs)

    def module(self) -> nn.Module:
        """The layer as a module that shares these tensors."""
        layer, d = self.layer, self.x.shape[-1]
        named: dict[str, Any] = {"route": Routing(layer.route), "dropout": layer.dropout}
        named |= {"recompute": layer.recompute, "impl": "triton"}
        if layer.host == "adapter":
            assert self.b_A is not None and self.b_B is not None
            made: RoutedAdapter | RoutedLinear = RoutedAdapter(d, self.r, **named)
            made.b_A, made.b_B = nn.Parameter(self.b_A), nn.Parameter(self.b_B)
        else:
            assert self.weight is not None and self.bias is not None
            base = nn.Linear(d, self.of * d).requires_grad_(False)
            base.weight.data, base.bias.data = self.weight, self.bias
            alpha = S_SCALE * self.r
            named |= {"adapted": self.adapted, "of": self.of, "plan": layer.plan}
            made = RoutedLinear(base, self.r, alpha, **named)
        made.A, made.B = nn.Parameter(self.A), nn.Parameter(self.B)
        made.context.set(RoutingInput(self.x_r))
        return made
