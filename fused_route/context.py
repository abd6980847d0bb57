"""How the image reaches the layers: the holder that they share, a projector in front of it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .checks import shown, whole
from .routing_input import RoutingInput, masked_mean, moved
from .together import Projected, Projecting, State, Together, is_captured, tensor_state

P = ParamSpec("P")
T = TypeVar("T")


class VisualProjector(nn.Module):
    """Brings visual features to the widths that routed layers have: x_r = x Wᵀ + b, one W a width.

    Args:
        visual_width: width of the features.
        widths: the layers' widths; those equal to visual_width get no projection.

    Shapes: (B, Nv, visual_width) to (B, Nv, width).
    """

    def __init__(self, visual_width: int, widths: set[int]) -> None:
        super().__init__()
        self.visual_width = whole("visual_width", visual_width)
        if not isinstance(widths, (set, frozenset, tuple, list)):
            raise ValueError(f"widths must be a set of widths, got {shown(widths)}")
        widths = {whole("widths", width) for width in widths}
        self.projections = nn.ModuleDict(
            {str(d): nn.Linear(visual_width, d) for d in sorted(widths - {visual_width})}
        )

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """x_r by width, in the projector's dtype; that of the features' own width as given."""
        is_features = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        if not is_features or x.shape[-1] != self.visual_width:
            raise ValueError(
                f"x must be a floating-point tensor (B, Nv, {self.visual_width}), got {shown(x)}"
            )
        projected = {
            int(d): projection(x.to(projection.weight.dtype))  # type: ignore[arg-type]
            for d, projection in self.projections.items()
        }
        return {self.visual_width: x, **projected}


class Held(NamedTuple):
    """What a context holds in one thread.

    Args:
        inputs: routing inputs by width.
        text_mask: which text tokens count where layers pool their own input; "all"; None: not set.
        projected: x_v by the ids of layers, where the context projected them together.
        moved: copies of inputs on other GPUs, where layers of a model are on several.
        task: the backward pass in which this was set, -1 outside of any.
    """

    inputs: Mapping[int, RoutingInput]
    text_mask: Tensor | str | None
    projected: dict[int, Projected]
    moved: dict[Any, tuple[State, RoutingInput]]
    task: int


def nothing() -> Held:
    """What a context holds at first."""
    return Held({}, None, {}, {}, -1)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.held = nothing()
        self.before: list[tuple[object, Held]] = []


def backward_pass() -> int:
    """The number of the backward pass that this thread is in, -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class RoutingContext:
    """Holds the routing input for the layers that share it: a plain object, not a module.

    A model's own `forward` sets it, or the code around a model:

        with context.using(image_features):
            loss = model(input_ids).loss

    Each thread sees what it set itself; a thread that is to go on with what is set here gets
    `captured(function)`. Tasks of one thread that take turns, as asyncio's do, must not give way
    inside a `using`. Copying or pickling a context (with the model that holds
    it) leaves the routing input behind.

    Args:
        projector: applied to x_r whenever it is set: once, not once per layer.
    """

    def __init__(self, projector: VisualProjector | None = None) -> None:
        if not isinstance(projector, (VisualProjector, type(None))):
            raise ValueError(f"projector must be a VisualProjector, got {shown(projector)}")
        self.projector = projector
        self.together = Together()
        self._thread = _OfThread()

    def set(
        self, x_r: Tensor | RoutingInput | None = None, *, text_mask: Tensor | str | None = None
    ) -> None:
        """Sets the routing input from now on, until `clear` or the end of a `using` around it.

        A projector runs here, once: to train it, set the routing input anew for each backward.

        Args:
            x_r: features (B, Nv, d) or (B, d), or a `RoutingInput`; None: as it was.
            text_mask: for layers that are routed by their own text: (B, T), true or 1 where a token
                is valid, or "all"; None: as it was.

        Raises:
            ValueError: neither is given, not a valid `RoutingInput`, or one of a width that the
                projector does not take, or no mask.
        """
        held = self._thread.held._replace(task=backward_pass())
        if x_r is None and text_mask is None:
            raise ValueError("x_r is missing: give features, a RoutingInput or text_mask")
        if text_mask is not None:
            held = held._replace(text_mask=_checked_mask(text_mask))
        if x_r is not None:
            inputs = self._by_width(x_r)
            held = held._replace(inputs=inputs, projected=self.together.project(inputs), moved={})
        self._thread.held = held

    def _by_width(self, x_r: Tensor | RoutingInput) -> Mapping[int, RoutingInput]:
        given = x_r if isinstance(x_r, RoutingInput) else RoutingInput(x_r)
        if given.x_v is not None or given.operand is not None:
            raise ValueError("x_v and operand belong to one layer, a context serves many: give x_r")
        if self.projector is None:
            return {given.width: given}
        if given.width != self.projector.visual_width:
            raise ValueError(
                f"x_r has width {given.width}; the projector was built for visual_width="
                f"{self.projector.visual_width}"
            )
        return {width: given.of(x) for width, x in self.projector(given.x_r).items()}

    def clear(self) -> None:
        """Forgets the routing input: routed layers then refuse to run."""
        self._thread.held = nothing()

    def get(self, width: int, layer: str, device: torch.device | None = None) -> RoutingInput:
        """The routing input for a layer of this width.

        Args:
            device: of the layer; where it is another GPU than the image's, the image is copied
                there, once for all layers on it (and once for a checkpointed block and for its
                recomputation). None: as it is.

        Raises:
            ValueError: none is set, or none of this width; no device.
            RuntimeError: a checkpointed block is recomputed without its routing input.
        """
        inputs = self._now(layer).inputs
        if not inputs:
            raise ValueError(
                f"{layer} has no routing input: run the model inside `with context.using(x_r):`, "
                "or have the model's forward call context.set(x_r); each thread sets its own, or "
                "runs context.captured(function)"
            )
        if not isinstance(width, int) or width not in inputs:
            offered = ", ".join(map(str, inputs))
            raise ValueError(
                f"{layer} takes x_r of width {width}; the context holds {offered}. Give the "
                "configuration visual_width, which adds a projector, or project the features "
                "yourself"
            )
        given = inputs[width]
        if device is None or given.x_r.device == device:  # every layer call asks: 0.2 µs
            return given
        if not isinstance(device, torch.device):
            raise ValueError(f"device must be a torch.device, got {shown(device)}")
        return self._on(device, width, given) if is_on_another_gpu(given.x_r, device) else given

    def _on(self, device: torch.device, width: int, given: RoutingInput) -> RoutingInput:
        """A copy there, made anew where the image has changed since."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return moved(given, device)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), is_captured(given.x_r)
        key, copies = (width, device, *modes), self._thread.held.moved
        state = tensor_state(given.x_r)
        if key not in copies or copies[key][0] != state:
            copies[key] = state, moved(given, device)
        return copies[key][1]

    def pooled(self, x_h: Tensor, layer: str) -> RoutingInput:
        """The routing input of a layer that is routed by its own text: the mean of x_h (B, T, d).

        Raises:
            ValueError: no text_mask is set, or one of other tokens.
            RuntimeError: as in `get`.
        """
        mask = self._now(layer).text_mask
        if mask is None:
            raise ValueError(
                f"{layer} is routed by its own text and does not know which tokens are padding: "
                "run the model inside `with context.using(text_mask=attention_mask):`, or "
                "text_mask='all'"
            )
        if isinstance(mask, Tensor) and is_on_another_gpu(mask, x_h.device):
            mask = mask.to(x_h.device)
        try:
            return RoutingInput(masked_mean(x_h, mask if isinstance(mask, Tensor) else None))
        except ValueError as error:
            raise ValueError(f"{layer}, routed by its own text: {error}") from None

    def projected(self, layer: Projecting) -> Projected | None:
        """What the context projected for the layer, if it did; it will from the next time on."""
        if layer not in self.together:
            self.together.add(layer, layer.project)
        return self._thread.held.projected.get(id(layer))

    def taken(self, layer: Projecting) -> None:
        """That x_v is used up: the layer's next call projects by itself."""
        self._thread.held.projected.pop(id(layer), None)

    def _now(self, layer: str) -> Held:
        held = self._thread.held
        if held.task != (task := backward_pass()) and task != -1:
            raise RuntimeError(
                f"{layer} is called inside a backward pass, as recomputed blocks are, without the "
                "routing input of its forward, which may have been another: turn checkpointing on "
                "with attached.checkpoint_activations(), pass "
                "context_fn=context.checkpoint_contexts, checkpoint context.captured(function) "
                "where use_reentrant=True, or set the routing input inside"
            )
        return held

    @contextmanager
    def using(
        self, x_r: Tensor | RoutingInput | None = None, *, text_mask: Tensor | str | None = None
    ) -> Iterator[None]:
        """`set` for a block of code; what was set before returns after it."""
        before = self._thread.held
        try:
            self.set(x_r, text_mask=text_mask)
            yield
        finally:
            self._thread.held = before

    def push(self, owner: object) -> None:
        """Keeps what is set now until the owner's `pop`: `using` for hooks."""
        self._thread.before.append((owner, self._thread.held))

    def pop(self, owner: object) -> None:
        """Sets again what was set at the last `push`, if that was this owner's."""
        before = self._thread.before
        if before and before[-1][0] is owner:
            self._thread.held = before.pop()[1]

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

        Captures the routing input at forward and restores it at recompute. Without it the
        recompute, which could meet another image, is refused.
        """
        held = self._thread.held
        return self._restoring(held), self._restoring(held)

    def captured(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, always run with the routing input that is set now.

        For `checkpoint(context.captured(block), x, use_reentrant=True)`, which has no context_fn.
        It goes backward once for each block, so that nothing before the blocks, such as a trained
        projector, may need a gradient from several of them: torch then raises a RuntimeError.
        """
        held = self._thread.held

        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            with self._restoring(held):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def _restoring(self, held: Held) -> Iterator[None]:
        before = self._thread.held
        # What was projected together is outside of the block: a recompute would find no product,
        # and a copy made without gradients would serve a layer that needs them.
        self._thread.held = held._replace(projected={}, moved={}, task=backward_pass())
        try:
            yield
        finally:
            self._thread.held = before

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._thread = _OfThread()

    def __repr__(self) -> str:
        inputs = self._thread.held.inputs
        held = {width: tuple(given.x_r.shape) for width, given in inputs.items()}
        return f"RoutingContext({held or 'empty'})"


def is_on_another_gpu(tensor: Tensor, device: torch.device) -> bool:
    """Whether a layer's image has to follow it; one on a CPU is likelier a mistake."""
    return tensor.device != device and tensor.device.type == device.type


def own_context(model: nn.Module) -> RoutingContext | None:
    """The attribute `context` of a model whose forward sets it; None where it has none."""
    own = getattr(model, "context", None)
    return own if isinstance(own, RoutingContext) else None


def _checked_mask(text_mask: Tensor | str) -> Tensor | str:
    is_mask = isinstance(text_mask, Tensor) and text_mask.dim() == 2
    if not is_mask and not (isinstance(text_mask, str) and text_mask == "all"):
        given = (
            tuple(text_mask.shape) if isinstance(text_mask, Tensor) else type(text_mask).__name__
        )
        raise ValueError(f"text_mask must be a tensor (B, T) or 'all', got {given}")
    return text_mask
