"""What of a model is trained, and how it is saved: one interface for every kind of bottleneck."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from fused_route import Attached, RoutedConfig, VisualProjector, attach, checkpoint
from fused_route.training.baselines import CrossAttached, attach_cross_attention
from fused_route.training.files import atomic_file
from fused_route.training.packages import missing
from fused_route.training.vlm import VisionLanguageModel

CROSS_ATTENTION = "cross_attention.safetensors"
LANGUAGE = "language_model.safetensors"


class Tuned(Protocol):
    """The trained part of a model."""

    @property
    def projector(self) -> VisualProjector | None:
        """From the features' width to the layers', where one was put in."""

    def save(self, folder: Path) -> None:
        """Writes it, and nothing of the frozen model."""

    def load(self, folder: Path) -> None:
        """Takes over what `save` wrote; a ValueError if it does not fit."""

    def use(self, task: str) -> None:
        """Switches to the modules of a task, where tasks have their own."""


class Shared:
    """Routed layers, the same for every task."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    @property
    def projector(self) -> VisualProjector | None:
        """Of `attach`."""
        return self.attached.projector

    def save(self, folder: Path) -> None:
        """adapter_model.safetensors and adapter_config.json, which PEFT reads too."""
        self.attached.save(folder)

    def load(self, folder: Path) -> None:
        """As `Attached.load`."""
        self.attached.load(folder)

    def use(self, task: str) -> None:
        """Nothing: there is one for all."""


class Full(Shared):
    """Routed layers and, beside them, every parameter of the language model."""

    def __init__(self, attached: Attached, model: VisionLanguageModel) -> None:
        super().__init__(attached)
        model.language.requires_grad_(True)
        self.own = {n: p for n, p in model.named_parameters() if not n.startswith("vision.")}

    def save(self, folder: Path) -> None:
        """Everything but the tower in one file: no adapter, which alone would be half of it."""
        state = {name: p.detach().contiguous() for name, p in self.own.items()}
        with atomic_file(folder / LANGUAGE) as file:
            file.write(safetensors.torch.save(state))

    def load(self, folder: Path) -> None:
        """Takes it over, all or none."""
        tensors = _tensors(folder / LANGUAGE)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {name: tuple(parameter.shape) for name, parameter in self.own.items()}:
            raise ValueError(f"{folder / LANGUAGE} is of another language model")
        with torch.no_grad():
            for name, parameter in self.own.items():
                parameter.copy_(tensors[name])


class CrossAttention:
    """The cross-attention baseline, the same for every task."""

    def __init__(self, attached: CrossAttached) -> None:
        self.attached = attached

    @property
    def projector(self) -> VisualProjector | None:
        """Of `attach`."""
        return self.attached.plain.projector

    def save(self, folder: Path) -> None:
        """All its tensors in one file."""
        state = {k: t.contiguous() for k, t in self.attached.state_dict().items()}
        with atomic_file(folder / CROSS_ATTENTION) as file:
            file.write(safetensors.torch.save(state))

    def load(self, folder: Path) -> None:
        """Takes them over, all or none."""
        self.attached.load_state_dict(_tensors(folder / CROSS_ATTENTION))

    def use(self, task: str) -> None:
        """Nothing: there is one for all."""


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


class PerTask:
    """An adapter of PEFT's for each task, with copies of modules_to_save.

    All of them stay trainable: what a batch does not use gets no gradient from it.
    """

    def __init__(
        self, model: VisionLanguageModel, config: RoutedConfig, tasks: Iterable[str]
    ) -> None:
        try:
            from peft import get_peft_model
        except ImportError:
            raise missing("peft") from None
        first, *others = tasks
        self.tasks = (first, *others)
        self.peft: Any = get_peft_model(model, _for_peft(config), adapter_name=first)
        for name in others:
            self.peft.add_adapter(name, _for_peft(config))
        self.use(first)

    @property
    def projector(self) -> None:
        """None: features of another width are refused."""

    def save(self, folder: Path) -> None:
        """A folder for each task, as PEFT writes them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.peft.save_pretrained(str(folder), selected_adapters=list(self.tasks))

    def load(self, folder: Path) -> None:
        """Takes over the values of every task's folder."""
        for name in self.tasks:
            checkpoint.read_config(folder / name)
            told = self.peft.load_adapter(str(folder / name), name, is_trainable=True)
            if told.unexpected_keys:
                raise ValueError(f"{folder / name} is of another model: {told.unexpected_keys[0]}")
        self.use(self.tasks[0])

    def use(self, task: str) -> None:
        """Switches every layer to a task's modules."""
        if task not in self.tasks:
            raise ValueError(f"task {task!r} has no modules, these have: {', '.join(self.tasks)}")
        self.peft.set_adapter(task)
        self.peft.set_requires_grad(list(self.tasks), True)


def _for_peft(config: RoutedConfig) -> Any:
    from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig

    written = {k: v for k, v in config.to_json().items() if k != "peft_type"}
    return (RoutedLoraConfig if config.host == "lora" else RoutedAdapterConfig)(**written)


def tune(
    model: VisionLanguageModel,
    config: RoutedConfig,
    *,
    method: str = "routed",
    modules: str = "shared",
    heads: int = 4,
    tasks: Iterable[str] = (),
    impl: Any = "auto",
    plan: Any = "auto",
) -> Tuned:
    """Puts what is trained into a model and freezes the rest; arguments as in `Recipe`.

    Raises:
        ValueError: a configuration that does not fit the model or the method.
    """
    if modules == "per-task":
        if method != "routed":
            raise ValueError(f"modules='per-task' is for method='routed', got {method!r}")
        if config.visual_width is not None:
            raise ValueError(
                "modules='per-task' with features of another width than the language model's: set "
                "model.projection=linear and name image_projection in adapter.modules_to_save"
            )
        return PerTask(model, config, tasks)
    if method == "cross-attention":
        return CrossAttention(
            attach_cross_attention(model, config, heads=heads, context=model.context)
        )
    attached = attach(model, config, impl=impl, plan=plan)
    if method == "full":
        return Full(attached, model)
    return Shared(attached)
