"""What is timed: a forward pass whose backward can be run, and the tensors that it is about."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Subject:
    """One way to compute a case, with its tensors.

    Args:
        forward: y, or the loss of a training step; records what the backward pass needs.
        leaves: tensors that get gradients, by name: the same names for every way.
        dy: gradient of y; None for a loss.
        finish: what a step does after the backward pass: the optimiser's.
        live: tensors that exist anyway (inputs, weights), so that nothing saved them.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    dy: Tensor | None = None
    finish: Callable[[], None] | None = None
    live: list[Tensor] = field(default_factory=list)

    def forget(self) -> None:
        """Sets all gradients to None, as zero_grad does: none is added to."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def results(self) -> dict[str, Tensor]:
        """y and the gradients, by name, of one forward and backward pass."""
        self.forget()
        y = self.forward()
        y.backward(self.dy)
        found = {"y": y.detach()}
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                found[f"d{name}"] = leaf.grad
        self.forget()
        return found
