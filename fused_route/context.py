"""How the image reaches the layers: a routing input, and the holder that attached layers share."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)  # signed: −1 marks padding


@dataclass(frozen=True)
class RoutingInput:
    """What the hidden states are routed with.

    Args:
        x_r: (B, Nv, d) features, usually of the image, one set per sample; (B, d) means Nv = 1.
        mask: (B, Nv) bool, True where a visual token is valid; None: all are.
        sample_index: (M,) integers, for packed sequences: the sample that each of the M rows of
            x_h belongs to, non-decreasing; −1 marks padding rows, which pass unrouted (z = x_t).

    From sample_index follow `offsets` (B + 1,): the rows of sample b, and the padding after them
    (before the first sample too), lie in offsets[b]:offsets[b + 1]; `longest`, the most rows of a
    sample; and `row_sample` (M,) int32: the sample b of a row, or −1 − b for padding.

    Raises:
        ValueError: shapes or values other than these.
    """

    x_r: Tensor
    mask: Tensor | None = None
    sample_index: Tensor | None = None
    offsets: Tensor | None = field(init=False, default=None)
    row_sample: Tensor | None = field(init=False, default=None)
    longest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not isinstance(self.x_r, Tensor) or not self.x_r.is_floating_point():
            given = self.x_r.dtype if isinstance(self.x_r, Tensor) else type(self.x_r).__name__
            raise ValueError(f"x_r must be a floating-point tensor, got {given}")
        if self.x_r.dim() == 2:
            object.__setattr__(self, "x_r", self.x_r.unsqueeze(1))
        if self.x_r.dim() != 3 or self.x_r.shape[1] == 0:
            raise ValueError(
                f"x_r must be (B, Nv, d) with Nv ≥ 1, or (B, d); got {tuple(self.x_r.shape)}"
            )
        for name in ("mask", "sample_index"):
            given = getattr(self, name)
            if not isinstance(given, (Tensor, type(None))):
                raise ValueError(f"{name} must be a tensor, got {type(given).__name__}")
        if self.mask is not None:
            self._check_mask(self.mask)
            # what a masked token holds, NaN included, must not reach dA = … + gx_vᵀ x_r
            x_r = self.x_r.masked_fill(~self.mask.unsqueeze(-1), 0.0)
            object.__setattr__(self, "x_r", x_r)
        if self.sample_index is not None:
            self._find_rows(self.sample_index)

    def _check_mask(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.shape != self.x_r.shape[:2]:
            raise ValueError(
                f"mask must be bool (B, Nv) = {tuple(self.x_r.shape[:2])}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )

    def _find_rows(self, sample_index: Tensor) -> None:
        if sample_index.dim() != 1 or sample_index.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"sample_index must be integers (M,), got {sample_index.dtype} "
                f"{tuple(sample_index.shape)}"
            )
        B = self.x_r.shape[0]
        samples = torch.arange(B + 1, device=sample_index.device)
        latest = sample_index.long().cummax(0).values  # padding belongs to the sample before it
        decreasing = ((sample_index < latest) & (sample_index != -1)).any()
        outside = (sample_index < -1).any() | (latest[-1:] >= B).any()
        if B == 0 and sample_index.numel():
            raise ValueError(f"x_r has no samples, sample_index has {sample_index.numel()} rows")
        if bool(decreasing | outside):
            raise ValueError(
                f"sample_index must be non-decreasing, from 0 to B − 1 = {B - 1}, or −1 for "
                f"padding rows; got values from {int(sample_index.min())} to "
                f"{int(sample_index.max())}, {'not ' if decreasing else ''}in order"
            )
        latest = latest.clamp_min(0)
        offsets = torch.searchsorted(latest, samples)
        row_sample = torch.where(sample_index < 0, -1 - latest, latest).int()
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "row_sample", row_sample)
        object.__setattr__(self, "longest", int(offsets.diff().max()) if B else 0)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.x_r.shape[0]

    @property
    def width(self) -> int:
        """d."""
        return self.x_r.shape[-1]

    def repeated(self, beams: int) -> "RoutingInput":
        """Every sample `beams` times in a row, as beam search expands a batch.

        Raises:
            ValueError: packed sequences, which have no batch axis to expand.
        """
        if self.sample_index is not None:
            raise ValueError("sample_index is given: packed sequences cannot be expanded to beams")
        mask = None if self.mask is None else self.mask.repeat_interleave(beams, 0)
        return RoutingInput(self.x_r.repeat_interleave(beams, 0), mask)

    def of(self, x_r: Tensor) -> "RoutingInput":
        """The same samples, valid tokens and rows with other features (B, Nv, d')."""
        other = copy(self)  # checked already: sample_index would cost a device synchronisation
        object.__setattr__(other, "x_r", x_r)
        return other


class VisualProjector(nn.Module):
    """Brings visual features to the widths that routed layers have: x_r = x Wᵀ + b, one W a width.

    Args:
        visual_width: width of the features.
        widths: the layers' widths; those equal to visual_width get no projection.

    Shapes: (B, Nv, visual_width) to (B, Nv, width).
    """

    def __init__(self, visual_width: int, widths: set[int]) -> None:
        super().__init__()
        self.visual_width = visual_width
        self.projections = nn.ModuleDict(
            {str(d): nn.Linear(visual_width, d) for d in sorted(widths - {visual_width})}
        )

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """x_r by width, in the projector's dtype; the features' own width included, unprojected."""
        projected = {
            int(d): projection(x.to(projection.weight.dtype))  # type: ignore[arg-type]
            for d, projection in self.projections.items()
        }
        return {self.visual_width: x, **projected}


class RoutingContext:
    """Holds the routing input for the layers that share it: a plain object, not a module.

    A model's own `forward` sets it, or the code around a model:

        with context.using(image_features):
            loss = model(input_ids).loss

    Args:
        projector: applied to x_r whenever it is set: once, not once per layer.

    Copying or pickling a context (with the model that holds it) leaves the routing input behind.
    """

    def __init__(self, projector: VisualProjector | None = None) -> None:
        self.projector = projector
        self._inputs: Mapping[int, RoutingInput] = {}

    def set(self, x_r: Tensor | RoutingInput) -> None:
        """Sets the routing input from now on, until `clear` or the end of a `using` around it.

        A projector runs here, once: to train it, set the routing input anew for each backward.

        Raises:
            ValueError: not a valid `RoutingInput`, or of a width the projector does not take.
        """
        given = x_r if isinstance(x_r, RoutingInput) else RoutingInput(x_r)
        if self.projector is None:
            self._inputs = {given.width: given}
            return
        if given.width != self.projector.visual_width:
            raise ValueError(
                f"x_r has width {given.width}; the projector was built for visual_width="
                f"{self.projector.visual_width}"
            )
        by_width = self.projector(given.x_r)
        self._inputs = {width: given.of(x) for width, x in by_width.items()}

    def clear(self) -> None:
        """Forgets the routing input: routed layers then refuse to run."""
        self._inputs = {}

    def get(self, width: int, layer: str) -> RoutingInput:
        """The routing input for a layer of this width.

        Raises:
            ValueError: none is set, or none of this width.
        """
        if not self._inputs:
            raise ValueError(
                f"{layer} has no routing input: run the model inside `with context.using(x_r):`, "
                "or have the model's forward call context.set(x_r)"
            )
        if width not in self._inputs:
            offered = ", ".join(map(str, self._inputs))
            raise ValueError(
                f"{layer} takes x_r of width {width}; the context holds {offered}. Give attach() "
                "visual_width, so that it adds a projector, or project the features yourself"
            )
        return self._inputs[width]

    @contextmanager
    def using(self, x_r: Tensor | RoutingInput) -> Iterator[None]:
        """Sets the routing input for a block of code; what was set before returns after it."""
        before = self._inputs
        self.set(x_r)
        try:
            yield
        finally:
            self._inputs = before

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

        Captures the routing input at forward and restores it at recompute. Without it, a forward
        with another image before the backward makes the recomputed gradients wrong, or the
        recompute fails for want of a routing input.
        """
        return nullcontext(), self._restoring(self._inputs)

    @contextmanager
    def _restoring(self, inputs: Mapping[int, RoutingInput]) -> Iterator[None]:
        before, self._inputs = self._inputs, inputs
        try:
            yield
        finally:
            self._inputs = before

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_inputs": {}}

    def __repr__(self) -> str:
        held = {width: tuple(given.x_r.shape) for width, given in self._inputs.items()}
        return f"RoutingContext({held or 'empty'})"
