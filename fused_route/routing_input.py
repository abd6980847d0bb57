"""What hidden states are routed with: features, and what has been made of them already."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import floating, shown, whole
from .routes import Operand, check_operand

INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)  # signed: −1 marks padding


@dataclass(frozen=True)
class RoutingInput:
    """What the hidden states are routed with.

    Args:
        x_r: (B, Nv, d) features, usually of the image, one set per sample; (B, d) means Nv = 1.
        mask: (B, Nv) bool, True where a visual token is valid; None: all are.
        sample_index: (M,) integers, for packed sequences: the sample that each of the M rows of
            x_h belongs to, non-decreasing; −1 marks padding rows, which pass unrouted (z = x_t).
        x_v: (B, Nv, R), what one layer's down-projection made of x_r; None: the layer projects.
        operand: what one layer's route prepared from x_v (`Routing.operand`); None: it prepares.

    From sample_index follow `offsets` (B + 1,): the rows of sample b, and the padding after them
    (before the first sample too), lie in offsets[b]:offsets[b + 1]; `longest`, the most rows of a
    sample; and `row_sample` (M,) int32: the sample b of a row, or −1 − b for padding.

    Raises:
        ValueError: shapes or values other than these.
    """

    x_r: Tensor
    mask: Tensor | None = None
    sample_index: Tensor | None = None
    x_v: Tensor | None = None
    operand: Operand | None = None
    offsets: Tensor | None = field(init=False, default=None)
    row_sample: Tensor | None = field(init=False, default=None)
    longest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        floating("x_r", self.x_r)
        if self.x_r.dim() == 2:
            object.__setattr__(self, "x_r", self.x_r.unsqueeze(1))
        if self.x_r.dim() != 3 or self.x_r.shape[1] == 0:
            raise ValueError(
                f"x_r must be (B, Nv, d) with Nv ≥ 1, or (B, d); got {tuple(self.x_r.shape)}"
            )
        for name in ("mask", "sample_index", "x_v"):
            given = getattr(self, name)
            if not isinstance(given, (Tensor, type(None))):
                raise ValueError(f"{name} must be a tensor, got {shown(given)}")
            if given is not None and given.device != self.x_r.device:
                raise ValueError(f"{name} is on {given.device}, x_r is on {self.x_r.device}")
        self._check_prepared()
        if self.mask is not None:
            self._check_mask(self.mask)
            object.__setattr__(self, "x_r", masked(self.x_r, self.mask))
        if self.sample_index is not None:
            self._find_rows(self.sample_index)

    def _check_prepared(self) -> None:
        x_v, operand = self.x_v, self.operand
        if x_v is not None and (
            floating("x_v", x_v).dim() != 3 or x_v.shape[:2] != self.x_r.shape[:2]
        ):
            raise ValueError(
                f"x_v must be (B, Nv, R) with (B, Nv) = {tuple(self.x_r.shape[:2])}, got "
                f"{tuple(x_v.shape)}"
            )
        if operand is not None:
            check_operand("operand", operand)

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
        """B, the number of samples."""
        return self.x_r.shape[0]

    @property
    def width(self) -> int:
        """d, the width of x_r."""
        return self.x_r.shape[-1]

    def repeated(self, beams: int) -> "RoutingInput":
        """Every sample `beams` times in a row, as beam search expands a batch.

        It expands that of an encoder-decoder model's decoder alone: the encoder is called first.

            with context.using(given):
                states = model.get_encoder()(input_ids, attention_mask=mask)
            with context.using(given.repeated(beams)):
                model.generate(encoder_outputs=states, attention_mask=mask, num_beams=beams)

        Raises:
            ValueError: packed sequences, which have no batch axis to expand, or what was made for
                one layer already.
        """
        whole("beams", beams)
        if self.x_v is not None or self.operand is not None:
            raise ValueError("x_v or operand is given: repeat x_r before it is projected")
        if self.sample_index is not None:
            raise ValueError("sample_index is given: packed sequences cannot be expanded to beams")
        mask = None if self.mask is None else self.mask.repeat_interleave(beams, 0)
        return RoutingInput(self.x_r.repeat_interleave(beams, 0), mask)

    def of(self, x_r: Tensor) -> "RoutingInput":
        """The same samples, valid tokens and rows with other features (B, Nv, d').

        Raises:
            ValueError: features of other samples or tokens.
        """
        if floating("x_r", x_r).dim() != 3 or x_r.shape[:2] != self.x_r.shape[:2]:
            raise ValueError(
                f"x_r must be (B, Nv, d) with (B, Nv) = {tuple(self.x_r.shape[:2])}, got "
                f"{tuple(x_r.shape)}"
            )
        return self._with(x_r=masked(x_r, self.mask), x_v=None, operand=None)

    def projected(self, x_v: Tensor) -> "RoutingInput":
        """The same with x_v (B, Nv, R), for the layer whose down-projection made it."""
        return self._with(x_v=x_v)

    def prepared(self, operand: Operand) -> "RoutingInput":
        """The same with an operand, for the layer whose route prepared it."""
        return self._with(operand=operand)

    def _with(self, **values: object) -> "RoutingInput":
        # Not made anew, since checking sample_index again costs a device synchronisation; not by
        # copy.copy, which torch 2.11 cannot compile.
        other = object.__new__(RoutingInput)
        for name in self.__dataclass_fields__:
            object.__setattr__(other, name, values.get(name, getattr(self, name)))
        return other


def masked(x_r: Tensor, mask: Tensor | None) -> Tensor:
    """x_r with zeros where a token is masked: NaN there must not reach dA = … + gx_vᵀ x_r."""
    if mask is None:
        return x_r
    if x_r.element_size() == 1:  # fp8, in which nothing is filled; every value fits 16 bits
        return x_r.to(torch.bfloat16).masked_fill(~mask.unsqueeze(-1), 0.0).to(x_r.dtype)
    return x_r.masked_fill(~mask.unsqueeze(-1), 0.0)


def moved(given: RoutingInput, device: torch.device) -> RoutingInput:
    """The same features, valid tokens and rows on another device."""
    held = {name: getattr(given, name) for name in given.__dataclass_fields__}
    tensors = {name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)}
    return given._with(**tensors)


def masked_mean(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the states (B, T, d) over valid tokens: (B, 1, d), a routing input of text.

    Args:
        states: hidden states of a text, as a rule an encoder's.
        mask: (B, T) bool or integers, true or 1 where a token is valid; None: all are. Where none
            is, 0. Not floats, in which models also write 0 for a valid token and −∞ for padding.

    Raises:
        ValueError: shapes other than these.
    """
    if not isinstance(states, Tensor) or not states.is_floating_point() or states.dim() != 3:
        raise ValueError(f"states must be a floating-point tensor (B, T, d), got {shown(states)}")
    # In half precision the sum of a long text would overflow.
    wide = torch.promote_types(states.dtype, torch.float32)
    if mask is None:
        total = states.sum(1, keepdim=True, dtype=wide)
        return (total / max(states.shape[1], 1)).to(states.dtype)
    is_tensor = isinstance(mask, Tensor) and not mask.is_floating_point()
    if not is_tensor or mask.shape != states.shape[:2] or mask.device != states.device:
        raise ValueError(
            f"mask must be a bool or integer tensor (B, T) = {tuple(states.shape[:2])} on "
            f"{states.device}, got {shown(mask)}; where floats of 0 and 1 say it: mask.bool()"
        )
    valid = mask.bool().unsqueeze(-1)
    total = states.masked_fill(~valid, 0.0).sum(1, keepdim=True, dtype=wide)  # without their NaN
    return (total / valid.sum(1, keepdim=True).clamp_min(1)).to(states.dtype)
