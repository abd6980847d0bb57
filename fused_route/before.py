"""What a model was before `attach`, and putting that back."""

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import checkpoint
from .build import Padded
from .modules import AdaptedModule


@dataclass
class _Before:
    """What `attach` changed in a model: what was there, by name.

    Private, so that the reference does not show the constructor of `Attached`.

    Args:
        modules: the targets, under every name they have.
        requires_grad: of the parameters.
        buffers: copies of those that can be written to.
        saved: copies of what trains beside the layers: modules_to_save and train.
        hooks: what was put in.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[RemovableHandle | Padded] = field(default_factory=list)

    def read(self, model: nn.Module) -> None:
        """Takes down what will change in the model."""
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.buffers = {
            name: buffer.clone()
            for name, buffer in model.named_buffers()
            if not shares_memory(buffer)
        }

    def refuse_changed(self, model: nn.Module) -> None:
        """ValueError where what was there before has no place in the model any more."""
        problems = []
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in self.modules):
            try:
                model.get_submodule(parent)
            except AttributeError:
                problems.append(f"{parent} is gone")
        for name, old in self.saved.items():
            now = find(model, name)
            if name not in self.buffers and (now is None or now.shape != old.shape):
                is_now = "gone" if now is None else f"{tuple(now.shape)}, was {tuple(old.shape)}"
                problems.append(f"{name} is {is_now}")
        if problems:
            raise ValueError(
                f"the model has changed since attach: {'; '.join(problems[:4])}; put that back "
                "first, then detach"
            )

    def put_back(self, model: nn.Module) -> None:
        """Modules, values and requires_grad as they were.

        Buffers that the model has replaced by others of another shape, or by None, stay.
        """
        for hook in self.hooks:
            hook.remove()
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            adapted = getattr(model.get_submodule(parent), child, None)
            if isinstance(adapted, AdaptedModule):
                adapted.recorders.give_back(module)
            put(model, name, module)
        restored = self.buffers | self.saved
        current = {
            name: tensor
            for name, old in restored.items()
            if (tensor := find(model, name)) is not None and tensor.shape == old.shape
        }
        checkpoint.copy_tensors(restored, current)
        for name in self.saved.keys() & current.keys():
            current[name].grad = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def find(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of this name; None where there is none any more."""
    parent, _, leaf = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(parent), leaf, None)
    except AttributeError:
        return None
    return tensor if isinstance(tensor, Tensor) else None


def shares_memory(tensor: Tensor) -> bool:
    """Whether elements share memory, as an expanded tensor's do: torch cannot write to them."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in pairs)
