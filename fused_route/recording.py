"""What transformers records of a model, where something has taken the place of its modules."""

from typing import Any

from torch import nn

RECORDER = "transformers.utils.output_capturing"  # from 5.17 on, the module of its recorders


class Recorders:
    """Forward hooks of transformers' that record outputs, run for what is in a module's place.

    When hidden states are first asked for, transformers puts such hooks on all modules of a block's
    class. A block that is adapted is one of these; what the model goes on with is its output
    adapted.
    """

    def __init__(self) -> None:
        self.hooks: dict[int, Any] = {}

    def take(self, base: nn.Module) -> None:
        """Takes over the base's recorders; its other hooks stay with it."""
        for key, hook in list(base._forward_hooks.items()):
            if getattr(hook, "__module__", None) == RECORDER:
                self.hooks[key] = hook  # first: no thread finds it nowhere
                base._forward_hooks.pop(key, None)

    def give_back(self, base: nn.Module) -> None:
        """The base records again by itself."""
        base._forward_hooks.update(self.hooks)
        self.hooks.clear()

    def run(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """As torch runs forward hooks behind a call of the module."""
        for hook in list(self.hooks.values()):
            hook(module, args, out)
