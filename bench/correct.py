"""The gate before every timing: a provider that computes something else is not timed."""

from typing import Any

from torch import Tensor

from bench import formulations, providers
from bench.operands import Operands
from bench.subject import Subject
from fused_route.testing import assert_as_good_as_eager

FACTOR = 2.0


def twin(held_to: str, o: Operands) -> Subject:
    """What a provider is held to: the formula in eager torch, on these operands."""
    if held_to == "lora":
        return providers.lora(o)
    modes = {"compat": "eccv24"} if held_to == "eccv24" else {}
    return o.subject(lambda o: formulations.library(o, "reference", **modes))


class Gate:
    """The float64 truth and eager's results of one case, made once for all its providers.

    Dropout is off: each way draws masks of its own. (The kernels' is held to the same masks by
    tests/test_kernel_dropout.py.)
    """

    def __init__(self, o: Operands) -> None:
        self._operands = o
        self._known: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def worst(self, name: str, actual: dict[str, Tensor]) -> float | None:
        """The largest error of y and all gradients over eager's, None for a yardstick.

        Raises:
            AssertionError: more than FACTOR, or a gradient that is missing.
        """
        held_to = providers.PROVIDERS[name].held_to
        if not held_to:
            return None
        if held_to not in self._known:
            truth: Any = twin(held_to, self._operands.in_float64()).results()
            self._known[held_to] = truth, twin(held_to, self._operands).results()
        truth, eager = self._known[held_to]
        ratios = assert_as_good_as_eager(actual, truth, eager, factor=FACTOR)
        return max(ratios.values())
