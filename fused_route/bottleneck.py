"""What both layers have: down- and up-projection, their initial values, a route, a context."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of, probability, truth, whole
from .context import RoutingContext
from .functional import IMPLS, Impl
from .fused import product_dtype
from .routes import Route
from .routing import Routing, as_routing
from .routing_input import RoutingInput
from .together import Projected, is_captured, is_plain, state_of

ROUTED_BY = ("image", "text")
More = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a call beside x_h
NO_MORE: More = ((), {})
NO_REPLICAS = (
    "nn.DataParallel is not supported with routed layers, whose image is set in the calling "
    "thread: use DistributedDataParallel (torchrun or accelerate launch), or make one GPU visible "
    "(CUDA_VISIBLE_DEVICES=0)"
)


class Routed:
    """What a layer does with its parameters, wherever these are kept.

    Whoever inherits it has the attributes below; `Bottleneck` keeps them as a module of its own.
    """

    d: int
    A: Any
    U: Any
    A_v: Any
    U_v: Any
    b_A: Any
    B: Any
    routing: Routing
    routed_by: str
    dropout: float
    context: RoutingContext
    recompute: bool
    impl: Impl
    label: str
    training: bool
    project: str
    folded: "Callable[..., Tensor] | None"

    def around(
        self, x_h: Tensor, A: Tensor, b_A: Any, more: More = NO_MORE, **arguments: Any
    ) -> Tensor:
        """The layer with this down-projection; other arguments are those of its function."""
        raise NotImplementedError

    def down(self) -> Tensor:
        """The down-projection of the text, (R, d): A, or U A.

        Raises:
            ValueError: A is here in part: FSDP or ZeRO shard it beneath the layer.
        """
        A = self.A
        if type(A) is not nn.Parameter or A.dim() != 2 or not A.numel():  # 0.13 µs
            self._refuse_shard(A)
        return A if self.U is None else self.U @ A

    def _refuse_shard(self, A: Tensor) -> None:
        # The layer reads its parameters; only a call of a module that holds them gathers them.
        if torch.compiler.is_compiling():
            return
        if A.dim() != 2 or A.numel() == 0 or hasattr(A, "placements"):
            raise ValueError(
                f"{self.label}: A is a shard, {tuple(A.shape)}: shard whole blocks "
                "(fully_shard(block)) or whole routed layers, not what is inside of them"
            )

    def routing_input(self, x_h: Tensor) -> RoutingInput | None:
        """What x_h is routed with, x_v included where this layer's A does not make it."""
        if self.routing.route.takes == "nothing":
            return None
        if self.routed_by == "text":
            given = self.context.pooled(x_h, self.label)
        else:
            given = self.context.get(self.d, self.label, getattr(x_h, "device", None))
        if self.A_v is not None and self.U_v is not None:
            x_r = given.x_r.to(x_h.dtype)
            if self.training and self.dropout:
                x_r = F.dropout(x_r, self.dropout)
            return given.projected(F.linear(F.linear(x_r, self.A_v), self.U_v, self.b_A))
        if self.project == "layer" or torch.compiler.is_compiling():
            return given
        made = self.context.projected(self)
        if made is None or not self._can_use(made, given, x_h):
            return given
        return given.projected(made.x_v)

    def projects_as_is(self) -> bool:
        """Whether x_v = x_r Aᵀ + b_A of the context's x_r, so that others may compute it."""
        is_plain = self.A_v is None and self.routed_by == "image" and self.folded is None
        drops = self.training and self.dropout > 0.0
        return is_plain and not drops and self.routing.route.takes != "nothing"

    def _can_use(self, made: Projected, given: RoutingInput, x_h: Tensor) -> bool:
        """Whether x_v is what this layer would compute now, with the gradients it would have."""
        if torch._C._are_functorch_transforms_active() or not self.projects_as_is():
            return False
        if not is_plain(self) or made.state != state_of(self, given.x_r):
            return False
        # A graph that reads an x_v from before it would not see another image at its replay. One
        # x_v in two captures is not told apart: the context is set in each.
        if made.x_v.dtype != product_dtype(x_h) or made.is_captured != is_captured(made.x_v):
            return False
        if not torch.is_grad_enabled():
            return True
        if not made.x_v.requires_grad:
            trains_b_A = self.b_A is not None and self.b_A.requires_grad
            return not (self.A.requires_grad or trains_b_A or given.x_r.requires_grad)
        self.context.taken(self)  # its graph serves one backward
        return True

    def _route_arguments(self, x_h: Tensor) -> dict[str, Any]:
        return {
            "x_r": self.routing_input(x_h),
            "route": self.routing,
            "dropout": self.dropout if self.training else 0.0,
            "recompute": self.recompute,
            "impl": self.impl,
        }


class Bottleneck(Routed, nn.Module):
    """What `RoutedLinear` and `RoutedAdapter` share.

    Parameters: A (R, d), the down-projection of text and image; or, split through an inner rank k
    for each of g segments, A (g·k, d) and U (R, g·k) for the text, A_v and U_v for the image:
    x_t = x_h Aᵀ Uᵀ, x_v = x_r A_vᵀ U_vᵀ. The up-projection B, and biases, are the layer's.
    """

    A: nn.Parameter
    U: nn.Parameter | None
    A_v: nn.Parameter | None
    U_v: nn.Parameter | None
    b_A: nn.Parameter | None
    B: nn.Parameter

    def __init__(
        self,
        d: int,
        rank: int,
        route: str | Route | Routing,
        *,
        groups: int,
        inner_rank: int | None,
        routed_by: str,
        dropout: float,
        context: RoutingContext | None,
        recompute: bool,
        impl: Impl,
        kind: dict[str, Any],
    ) -> None:
        super().__init__()
        if not isinstance(context, (RoutingContext, type(None))):
            raise ValueError(f"context must be a RoutingContext, got {type(context).__name__}")
        self.d = whole("d", d)
        self.rank = whole("rank", rank)
        self.inner_rank = None if inner_rank is None else whole("inner_rank", inner_rank)
        one_of("impl", impl, IMPLS)
        one_of("routed_by", routed_by, ROUTED_BY)
        self.routing = as_routing(route)
        self.routed_by = routed_by
        self.dropout = probability("dropout", dropout)
        self.context = RoutingContext() if context is None else context
        self.recompute = truth("recompute", recompute)
        self.impl: Impl = impl
        self.label = type(self).__name__
        self.project = "layer"  # or whether the context projects for several layers at once
        self.folded: Callable[..., Tensor] | None = None  # what runs instead: see `fold`
        self.is_merged = False  # whether `merge` has added the update to the base
        self._is_empty = False
        self._make_down(groups, kind)

    def _make_down(self, g: int, kind: dict[str, Any]) -> None:
        R, d = g * self.rank, self.d
        if self.inner_rank is None:
            self.A = nn.Parameter(torch.empty(R, d, **kind))
            self.U = self.A_v = self.U_v = None
            return
        if self.routing.route.takes == "nothing":
            raise ValueError(
                f"inner_rank={self.inner_rank} splits the projections of text and image; route "
                f"{self.routing.route.name!r} takes no image"
            )
        inner = g * self.inner_rank
        self.A = nn.Parameter(torch.empty(inner, d, **kind))
        self.U = nn.Parameter(torch.empty(R, inner, **kind))
        self.A_v = nn.Parameter(torch.empty(inner, d, **kind))
        self.U_v = nn.Parameter(torch.empty(R, inner, **kind))

    def reset_parameters(self) -> None:
        """Projections as nn.Linear starts, uniform in ±1/√(their input width); B, b_B at zero.

        With norm="after" B is drawn and norm_weight zero; with "before" norm_weight is one.
        """
        for name in self._parameters:
            self._reset(name)
        self._is_empty = self.A.is_meta

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_folded("loading")
        super()._load_from_state_dict(*args, **kwargs)
        self._is_empty = self.A.is_meta

    @torch.no_grad()
    def _reset(self, name: str) -> None:
        # Tensor methods, not nn.init: transformers' from_pretrained replaces those by nothing.
        parameter = self._parameters[name]
        if parameter is not None and name in self._drawn():
            width = self.d if name == "b_A" else parameter.shape[1]
            parameter.uniform_(-1.0 / math.sqrt(width), 1.0 / math.sqrt(width))
        elif parameter is not None:
            parameter.fill_(self._filled_with(name))

    def _drawn(self) -> tuple[str, ...]:
        """Parameters that start at random."""
        return ("A", "U", "A_v", "U_v", "b_A")

    def _filled_with(self, name: str) -> float:
        """What the others start at."""
        return 0.0

    def _replicate_for_data_parallel(self) -> "Bottleneck":
        raise ValueError(NO_REPLICAS)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bottleneck":
        self._refuse_folded("moving or converting it")
        super()._apply(fn, recurse)
        return self

    def _refuse_folded(self, what: str) -> None:
        if self.folded is not None:
            raise ValueError(
                f"{self.label} has an image folded in: unfold it before {what}, and do that again "
                "for the whole model, of which other parts may have been done already"
            )

    def extra_repr(self) -> str:
        modes = {k: v for k, v in self.routing.modes().items() if v not in ("none", "exact")}
        shown = {"route": self.routing.route.name, "rank": self.rank, "d": self.d, **modes}
        if self.inner_rank is not None:
            shown["inner_rank"] = self.inner_rank
        if self.routed_by != "image":
            shown["routed_by"] = self.routed_by
        folded = "" if self.folded is None else ", folded"
        return ", ".join(f"{name}={value}" for name, value in shown.items()) + folded
