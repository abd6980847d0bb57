"""A small set that pytest-benchmark times: `pytest bench --benchmark-only`.

Forward and backward of the reference, and of the kernels where there is a GPU. To find a
regression: `--benchmark-autosave` before a change, `--benchmark-compare` after it.
"""

from typing import Any

import pytest
import torch

from bench import providers
from bench.cases import HOSTS, Case
from bench.correct import Gate
from bench.operands import Operands

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bf16" if DEVICE.type == "cuda" else "fp32"
NAMES = ("reference", "fused") if DEVICE.type == "cuda" else ("reference",)
CASES = [
    Case("op", host, route, 256, 32, 8, 32, dtype=DTYPE)
    for host in HOSTS
    for route in ("mul", "gram")
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.host}-{case.route}")
def test_forward_and_backward(benchmark: Any, case: Case, name: str) -> None:
    operands = Operands.of_case(case, DEVICE)
    subject = providers.PROVIDERS[name].make(operands)
    assert Gate(operands).worst(name, subject.results()) is not None

    def run() -> None:
        subject.forget()
        subject.forward().backward(subject.dy)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
