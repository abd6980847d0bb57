"""The two layers as modules; the functions do the rest."""

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_segments
from .bases import are_all_hooked, base_features, plain_base, weight_kind
from .bottleneck import NO_MORE, Bottleneck, More, Routed
from .checks import finite, one_of, shown, truth
from .context import RoutingContext
from .functional import PLANS, Impl, ProductPlan, routed_adapter, routed_linear
from .recording import Recorders
from .reference import ACTIVATIONS
from .routes import Route
from .routing import Routing

NORMS = ("none", "before", "after")
POSITIONS = ("after", "before")


class LinearCall(Routed):
    """What a `RoutedLinear` computes."""

    base: Any
    rank: int
    alpha: float
    adapted: tuple[int, ...]
    of: int
    plan: ProductPlan

    @property
    def s(self) -> float:
        """Scale of the update."""
        return self.alpha / self.rank

    def call(self, x_h: Tensor, more: More = NO_MORE) -> Tensor:
        """y of x_h; the base is called with `more` beside it."""
        if self.folded is not None:
            return self.folded(x_h, more)
        return self.around(x_h, self.down(), None, more, **self._route_arguments(x_h))

    def onto(self, x_h: Tensor, y: Tensor) -> Tensor:
        """y and the update, where another layer has called the base."""
        if self.folded is not None:
            return self.folded(x_h, NO_MORE, base_out=y)
        return self.around(x_h, self.down(), None, base_out=y, **self._route_arguments(x_h))

    def around(
        self,
        x_h: Tensor,
        A: Tensor,
        b_A: None,
        more: More = NO_MORE,
        base_out: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The layer with this down-projection; the base is called with `more` beside x_h."""
        args, kwargs = more
        weight = bias = None
        plan = self.plan
        if base_out is None:
            weight, bias = (None, None) if args or kwargs else plain_base(self.base)
        if base_out is None and weight is None:
            # what watches all modules, or an export, calls a base that p3 could read
            if are_all_hooked() or torch.compiler.is_exporting():
                plan = "auto"
            if plan == "p3":
                raise ValueError(
                    f"{self.label}: plan='p3' needs a base whose weight it reads, an nn.Linear or "
                    f"Conv1D without hooks and other arguments; base={type(self.base).__name__} is "
                    "called here: use plan='auto'"
                )
            base_out = self.base(x_h, *args, **kwargs)
        return routed_linear(
            x_h,
            A,
            self.B,
            weight=weight,
            bias=bias,
            base_out=base_out,
            s=self.s,
            adapted=self.adapted,
            of=self.of,
            plan=plan,
            **arguments,
        )


class RoutedLinear(LinearCall, Bottleneck):
    """A linear layer with routed LoRA: y = base(x_h) + (alpha/r) · φ(x_h Aᵀ, x_r Aᵀ) Bᵀ.

    Args:
        base: nn.Linear, Hugging Face Conv1D, or any callable from (…, d) to (…, of·n); it is kept,
            and not frozen (`attach` does that; else `base.requires_grad_(False)`).
            Where it is a frozen nn.Linear or Conv1D without hooks, its product is part of the
            kernels' operation, by `plan`; any other base is called.
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
        plan: "auto", "p1" or "p3", as in `routed_linear`.
        inner_rank: None, one A for text and image; or k, a projection of each through k columns for
            every adapted segment.
        routed_by: "image", the context's routing input; or "text", the mean of the layer's own
            input x_h (B, T, d) over the tokens of the context's text_mask. That reads later
            tokens, and takes each row of the batch for one text: not for decoders, nor for packed
            sequences.

    Shapes: (B, …, d) to (B, …, of·n). Parameters: A (g·r, d), B (g·n, r); with an inner rank
    A, A_v (g·k, d) and U, U_v (g·r, g·k): x_t = x_h Aᵀ Uᵀ, x_v = x_r A_vᵀ U_vᵀ.

    Raises:
        ValueError: widths, segments, rank or names that do not fit; when it is called, plan="p3"
            with a base that is trained or has no plain weight.
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
        plan: ProductPlan = "auto",
        inner_rank: int | None = None,
        routed_by: str = "image",
    ) -> None:
        if not callable(base):
            raise ValueError(f"base must be callable, got {type(base).__name__}")
        in_features, out_features = base_features(base, in_features, out_features)
        check_segments(adapted, of, out_features)
        kind = weight_kind(base, device, dtype)
        super().__init__(
            in_features, rank, route, groups=len(adapted), inner_rank=inner_rank,
            routed_by=routed_by, dropout=dropout, context=context, recompute=recompute, impl=impl,
            kind=kind,
        )  # fmt: skip
        one_of("plan", plan, PLANS)
        self.plan: ProductPlan = plan
        self.b_A = None
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.alpha = finite("alpha", rank if alpha is None else alpha)
        self.adapted, self.of = tuple(adapted), of
        self.B = nn.Parameter(torch.empty(len(adapted) * (out_features // of), rank, **kind))
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def forward(self, x_h: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if x_h is None:  # a model may name it as its own layer does
            x_h = by_name(self.base, kwargs)
        return self.call(x_h, (args, kwargs))

    def extra_repr(self) -> str:
        segments = "" if self.of == 1 else f", adapted={self.adapted}, of={self.of}"
        return f"{super().extra_repr()}, alpha={self.alpha:g}{segments}"


class AdapterCall(Routed):
    """What a `RoutedAdapter` computes."""

    activation: str
    residual: bool
    norm: str
    b_B: Any
    norm_weight: Any
    norm_bias: Any

    def call(self, x_h: Tensor) -> Tensor:
        """y of x_h."""
        if self.folded is not None:
            return self.folded(x_h, NO_MORE)
        pools = self.norm == "before" and self.routed_by == "text"
        arguments = self._route_arguments(self._normed(x_h) if pools else x_h)
        return self.around(x_h, self.down(), self.b_A, **arguments)

    def around(
        self, x_h: Tensor, A: Tensor, b_A: Tensor | None, more: More = NO_MORE, **arguments: Any
    ) -> Tensor:
        """The adapter with this down-projection: `routed_adapter`, and the norm before or after."""
        if isinstance(x_h, Tensor) and (x_h.dim() == 0 or x_h.size(-1) != self.d):
            raise ValueError(f"x_h must be (…, {self.d}) for {self.label}, got {shown(x_h)}")
        y = routed_adapter(
            self._normed(x_h) if self.norm == "before" else x_h,
            A,
            self.B,
            b_A=b_A,
            b_B=self.b_B,
            activation=self.activation,
            residual=self.residual and self.norm == "none",
            **arguments,
        )
        if self.norm == "after":
            y = self._normed(y)
        return x_h + y if self.residual and self.norm != "none" else y

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d,), self.norm_weight, self.norm_bias)


class RoutedAdapter(AdapterCall, Bottleneck):
    """A bottleneck adapter with routing: y = act(φ(x_h Aᵀ + b_A, x_r Aᵀ + b_A)) Bᵀ + b_B + x_h.

    Args:
        d: width of the hidden states.
        rank, route, dropout, context, recompute, impl, inner_rank, routed_by: as in `RoutedLinear`.
        device, dtype: of its parameters; None: torch's defaults.
        activation: none, relu, gelu, gelu_tanh or silu.
        bias: whether there are b_A and b_B.
        residual: whether x_h is added.
        norm: "none"; "before", a layer norm of x_h in front of A; or "after", of y in front of the
            residual. Either costs kernels of its own.

    Shapes: (B, …, d) to the same. Parameters: A (r, d), b_A (r,), B (d, r), b_B (d,), norm_weight
    and norm_bias (d,). With the residual it starts as the identity: B is zero, or with a norm
    after it norm_weight, whose norm would make any first step one of unit size.

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
        norm: str = "none",
        dropout: float = 0.0,
        context: RoutingContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
        impl: Impl = "auto",
        inner_rank: int | None = None,
        routed_by: str = "image",
    ) -> None:
        kind = weight_kind(None, device, dtype)
        super().__init__(
            d, rank, route, groups=1, inner_rank=inner_rank, routed_by=routed_by, dropout=dropout,
            context=context, recompute=recompute, impl=impl, kind=kind,
        )  # fmt: skip
        one_of("activation", activation, ACTIVATIONS)
        one_of("norm", norm, NORMS)
        truth("bias", bias)
        self.activation, self.residual, self.norm = activation, truth("residual", residual), norm

        def vector(width: int, has: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(width, **kind)) if has else None

        self.b_A = vector(rank, bias)
        self.B = nn.Parameter(torch.empty(d, rank, **kind))
        self.b_B = vector(d, bias)
        self.norm_weight = vector(d, norm != "none")
        self.norm_bias = vector(d, norm != "none")
        self.reset_parameters()

    def _drawn(self) -> tuple[str, ...]:
        return (*super()._drawn(), *(("B",) if self.norm == "after" else ()))

    def _filled_with(self, name: str) -> float:
        return 1.0 if (name, self.norm) == ("norm_weight", "before") else 0.0

    def forward(self, x_h: Tensor) -> Tensor:
        return self.call(x_h)

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, activation={self.activation}"
        shown = shown if self.norm == "none" else f"{shown}, norm={self.norm}"
        return shown if self.residual else f"{shown}, residual=False"


# With what accelerate has done to the base, a layer would run as the base did before.
OWN = ("base", "base_layer", "_hf_hook", "_old_forward")


def is_own(name: str) -> bool:
    """Whether an attribute is asked of a layer, not of the base: its __deepcopy__ copies that."""
    return name in OWN or name.startswith("__")


class AdaptedModule(nn.Module):
    """A module of a model with an adapter behind it, y = adapter(base(…)), or in front of it.

    Args:
        base: the module. Behind it, the tensor that it returns is adapted, the first of a tuple or
            list, or the last_hidden_state of a dataclass (transformers' ModelOutput), whose other
            fields stay; in front, the keyword argument hidden_states, or else the first argument.
        adapter: the adapter; may be shared with other modules.
        position: "after" or "before" the base.
    """

    def __init__(self, base: nn.Module, adapter: RoutedAdapter, position: str = "after") -> None:
        super().__init__()
        one_of("position", position, POSITIONS)
        if position == "before" and isinstance(base, nn.MultiheadAttention):
            raise ValueError(
                "position='before' nn.MultiheadAttention would adapt the query and neither key nor "
                "value: adapt the norm in front of it, with position='after'"
            )
        self.base = base
        self.adapter = adapter
        self.position = position
        self.recorders = Recorders()

    def __getattr__(self, name: str) -> Any:
        # Models look at weight, in_features and other attributes of what is adapted here.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if is_own(name):
                raise
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base, adapter = self.base, self.adapter
        if base._forward_hooks:
            self.recorders.take(base)
        if self.position == "after":
            out = behind(adapter, adapter.label, base(*args, **kwargs))
        else:
            inside, more = in_front(adapter, adapter.label, (args, kwargs))
            out = base(*inside, **more)
        if self.recorders.hooks:
            self.recorders.run(self, args, out)
        return out


def by_name(base: Any, given: dict[str, Any]) -> Tensor:
    """Takes out of keyword arguments the hidden states, by the name that the base has for them.

    Raises:
        ValueError: they are not there.
    """
    named = inspect.signature(getattr(base, "forward", base)).parameters
    x_h = given.pop(next(iter(named), ""), None)
    if x_h is None:
        raise ValueError("x_h must be a floating-point tensor (B, …, d), got None")
    return x_h


def in_front(adapter: Callable[[Tensor], Tensor], label: str, call: More) -> More:
    """The arguments of a call, the hidden states among them adapted."""
    args, kwargs = call
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": adapter(kwargs["hidden_states"])}
    if not args:
        raise ValueError(
            f"{label}: called without positional arguments or hidden_states, so that there is "
            "nothing to adapt in front of it"
        )
    return (adapter(args[0]), *args[1:]), kwargs


def behind(adapter: Callable[[Tensor], Tensor], label: str, out: Any) -> Any:
    """What a module returned, of the same type, the hidden states in it adapted."""
    if isinstance(out, Tensor):
        return adapter(out)
    is_sequence = isinstance(out, (tuple, list))
    if is_sequence:
        states = out[0] if out else None
    else:
        states = getattr(out, "last_hidden_state", None) if is_dataclass(out) else None
    if not isinstance(states, Tensor):
        inside = f", the first of it {type(out[0]).__name__}" if is_sequence and out else ""
        raise ValueError(
            f"{label} returned {type(out).__name__}{inside}: an adapter stands behind modules that "
            "return a tensor, a tuple or list whose first element is one, or a dataclass such as "
            "transformers' ModelOutput with a last_hidden_state"
        )
    if not is_sequence:
        return replace(out, last_hidden_state=adapter(states))
    made = (adapter(states), *out[1:])
    return made if type(out) is tuple else getattr(out, "_make", type(out))(made)
