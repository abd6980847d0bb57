"""The two layers as modules: parameters and their initial values; the functions do the rest."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_segments
from .checks import finite, one_of, probability, whole
from .context import RoutingContext
from .functional import IMPLS, Impl, routed_adapter, routed_linear
from .reference import ACTIVATIONS
from .routes import Route
from .routing import Routing, as_routing


class Bottleneck(nn.Module):
    """What `RoutedLinear` and `RoutedAdapter` share: A, B, their biases, the route, the context."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self,
        d: int,
        rank: int,
        route: str | Route | Routing,
        dropout: float,
        context: RoutingContext | None,
        recompute: bool,
        impl: Impl,
    ) -> None:
        super().__init__()
        if not isinstance(context, (RoutingContext, type(None))):
            raise ValueError(f"context must be a RoutingContext, got {type(context).__name__}")
        self.d = whole("d", d)
        self.rank = whole("rank", rank)
        one_of("impl", impl, IMPLS)
        self.routing = as_routing(route)
        self.dropout = probability("dropout", dropout)
        self.context = RoutingContext() if context is None else context
        self.recompute = recompute
        self.impl: Impl = impl
        self.label = type(self).__name__
        self._is_empty = False

    def reset_parameters(self) -> None:
        """A and b_A as nn.Linear starts, uniform in ±1/√d; B and b_B at zero."""
        for name in self._parameters:
            self._reset(name)
        self._is_empty = self.A.is_meta

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_empty = self.A.is_meta

    @torch.no_grad()
    def _reset(self, name: str) -> None:
        # Tensor methods, not nn.init: transformers' from_pretrained replaces those by nothing.
        parameter = self._parameters[name]
        if parameter is not None and name in ("A", "b_A"):
            bound = 1.0 / math.sqrt(self.d)
            parameter.uniform_(-bound, bound)
        elif parameter is not None:
            parameter.zero_()

    @property
    def _is_hf_initialized(self) -> bool:
        return False

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, _: bool) -> None:
        # transformers' from_pretrained builds on the meta device, gives parameters that the
        # checkpoint lacks empty memory, and sets this flag on every module it walks; parameters it
        # has loaded carry the flag too. Other callers set it on layers that have their values.
        if not self._is_empty or self.A.is_meta:
            return
        for name, parameter in self._parameters.items():
            if not getattr(parameter, "_is_hf_initialized", False):
                self._reset(name)
        self._is_empty = False

    def _route_arguments(self) -> dict[str, Any]:
        takes_image = self.routing.route.takes != "nothing"
        return {
            "x_r": self.context.get(self.d, self.label) if takes_image else None,
            "route": self.routing,
            "dropout": self.dropout if self.training else 0.0,
            "recompute": self.recompute,
            "impl": self.impl,
        }

    def extra_repr(self) -> str:
        modes = {k: v for k, v in self.routing.modes().items() if v not in ("none", "exact")}
        shown = {"route": self.routing.route.name, "rank": self.rank, "d": self.d, **modes}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def base_features(
    base: object, in_features: int | None = None, out_features: int | None = None
) -> tuple[int, int]:
    """(input, output) width of an nn.Linear, a Hugging Face Conv1D or a layer that tells both.

    Raises:
        ValueError: neither the base nor the caller tells, or they disagree.
    """
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # no Conv1D without it
    if pytorch_utils is not None and isinstance(base, pytorch_utils.Conv1D):
        told: tuple[Any, Any] = base.weight.shape[0], base.weight.shape[1]
    else:
        told = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not all(isinstance(width, int) for width in told):
        if in_features is None or out_features is None:
            raise ValueError(
                f"base={type(base).__name__} does not tell its widths (in_features, "
                "out_features): give in_features and out_features"
            )
        told = in_features, out_features
    for name, given, width in zip(
        ("in_features", "out_features"), (in_features, out_features), told, strict=True
    ):
        if given not in (None, width):
            raise ValueError(f"{name}={given}, but the base has {width}")
    return told


def plain_base(base: object) -> tuple[Tensor | None, Tensor | None]:
    """(weight (of·n, d), bias) of a base that is F.linear of them and nothing else; else Nones.

    Subclasses (quantised layers are some), hooks and tensors that are not torch's own (shards) mean
    that the base must be called.
    """
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    is_conv1d = pytorch_utils is not None and type(base) is pytorch_utils.Conv1D
    if not is_conv1d and type(base) is not nn.Linear:
        return None, None
    assert isinstance(base, nn.Module)
    everywhere = torch.nn.modules.module
    hooks = (
        base._forward_hooks,
        base._forward_pre_hooks,
        base._backward_hooks,
        base._backward_pre_hooks,
        everywhere._global_forward_hooks,
        everywhere._global_forward_pre_hooks,
        everywhere._global_backward_hooks,
        everywhere._global_backward_pre_hooks,
    )
    weight, bias = base.weight, base.bias
    is_plain = type(weight) in (nn.Parameter, Tensor) and "forward" not in vars(base)
    if any(hooks) or not is_plain:
        return None, None
    assert isinstance(weight, Tensor) and isinstance(bias, (Tensor, type(None)))
    return (weight.T if is_conv1d else weight), bias


class RoutedLinear(Bottleneck):
    """A linear layer with routed LoRA: y = base(x_h) + (alpha/r) · φ(x_h Aᵀ, x_r Aᵀ) Bᵀ.

    Args:
        base: nn.Linear, Hugging Face Conv1D, or any callable from (…, d) to (…, of·n); it is kept.
            Where it is a frozen nn.Linear or Conv1D without hooks, its product is part of the
            kernels' operation, which then adds to it in place; any other base is called.
        rank: r, per adapted segment.
        alpha: scale of the update, s = alpha / r; None: alpha = r.
        route: a name in `ROUTES`, a `Route` or a `Routing`.
        adapted, of: the base's output is `of` equal segments; these get an update. A fused QKV
            adapts (0, 2) of 3.
        dropout: on the inputs of A, in training mode.
        context: holds the routing input; shared among layers. None: one of its own.
        in_features, out_features: for a base that does not tell.
        device, dtype: of A and B; None: those of the base's weight.
        recompute: the kernels compute x_t anew in the backward pass instead of saving it.
        impl: "auto", "reference" or "triton", as in `routed_linear`.

    Shapes: (B, …, d) to (B, …, of·n). Parameters: A (g·r, d), B (g·n, r).

    Raises:
        ValueError: widths, segments, rank or names that do not fit.
    """

    def __init__(
        self,
        base: Callable[..., Tensor],
        rank: int,
        alpha: float | None = None,
        route: str | Route | Routing = "mul",
        *,
        adapted: tuple[int, ...] = (0,),
        of: int = 1,
        dropout: float = 0.0,
        context: RoutingContext | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        impl: Impl = "auto",
    ) -> None:
        if not callable(base):
            raise ValueError(f"base must be callable, got {type(base).__name__}")
        in_features, out_features = base_features(base, in_features, out_features)
        super().__init__(in_features, rank, route, dropout, context, recompute, impl)
        check_segments(adapted, of, out_features)
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.alpha = finite("alpha", rank if alpha is None else alpha)
        self.adapted, self.of = tuple(adapted), of
        kind = weight_kind(base, device, dtype)
        g, n = len(adapted), out_features // of
        self.A = nn.Parameter(torch.empty(g * rank, in_features, **kind))
        self.B = nn.Parameter(torch.empty(g * n, rank, **kind))
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at it."""
        return self.base.weight  # type: ignore[attr-defined]

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias  # type: ignore[attr-defined]

    def forward(self, x_h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = (None, None) if args or kwargs else plain_base(self.base)
        return routed_linear(
            x_h,
            self.A,
            self.B,
            weight=weight,
            bias=bias,
            base_out=self.base(x_h, *args, **kwargs) if weight is None else None,
            s=self.alpha / self.rank,
            adapted=self.adapted,
            of=self.of,
            **self._route_arguments(),
        )

    def extra_repr(self) -> str:
        segments = "" if self.of == 1 else f", adapted={self.adapted}, of={self.of}"
        return f"{super().extra_repr()}, alpha={self.alpha:g}{segments}"


class RoutedAdapter(Bottleneck):
    """A bottleneck adapter with routing: y = act(φ(x_h Aᵀ + b_A, x_r Aᵀ + b_A)) Bᵀ + b_B + x_h.

    Args:
        d: width of the hidden states.
        rank, route, dropout, context, device, dtype, recompute, impl: as in `RoutedLinear`.
        activation: none, relu, gelu, gelu_tanh or silu.
        bias: whether there are b_A and b_B.
        residual: whether x_h is added.

    Shapes: (B, …, d) to the same. Parameters: A (r, d), b_A (r,), B (d, r), b_B (d,). With the
    residual it starts as the identity.

    Raises:
        ValueError: a rank or name that is not accepted.
    """

    def __init__(
        self,
        d: int,
        rank: int,
        route: str | Route | Routing = "mul",
        activation: str = "gelu",
        *,
        bias: bool = True,
        residual: bool = True,
        dropout: float = 0.0,
        context: RoutingContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(d, rank, route, dropout, context, recompute, impl)
        one_of("activation", activation, ACTIVATIONS)
        self.activation, self.residual = activation, residual
        kind = weight_kind(None, device, dtype)
        self.A = nn.Parameter(torch.empty(rank, d, **kind))
        self.b_A = nn.Parameter(torch.empty(rank, **kind)) if bias else None
        self.B = nn.Parameter(torch.empty(d, rank, **kind))
        self.b_B = nn.Parameter(torch.empty(d, **kind)) if bias else None
        self.reset_parameters()

    def forward(self, x_h: Tensor) -> Tensor:
        return routed_adapter(
            x_h,
            self.A,
            self.B,
            b_A=self.b_A,
            b_B=self.b_B,
            activation=self.activation,
            residual=self.residual,
            **self._route_arguments(),
        )

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, activation={self.activation}"
        return shown if self.residual else f"{shown}, residual=False"


class AdaptedModule(nn.Module):
    """A module of a model followed by an adapter: y = adapter(base(…)).

    Where the base returns a tuple, its first element, the hidden states, is adapted.
    """

    def __init__(self, base: nn.Module, adapter: RoutedAdapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.in_features, self.out_features = base_features(base)

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.adapter(out[0]), *out[1:])
        return self.adapter(out)


def weight_kind(
    base: object, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Device and dtype for parameters beside a base: as asked, else as its weight."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor):
        device = weight.device if device is None else device
        if dtype is None and weight.is_floating_point():
            dtype = weight.dtype
    return {"device": device, "dtype": dtype}
