"""Result files with numbers that are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cases import Case, op
from bench.results import Record, Results
from bench.runs import Run

Loader = Callable[..., Run]
Said = pytest.CaptureFixture[str]
SMALL = op("adapter", "mul", 768, 64, 2_000)
LARGE = op("adapter", "mul", 768, 64, 32_768)
STEP = Case("step", "qkv", "mul", 768, 64, 40, 50, model="gpt2")
ENVIRONMENT = {
    "device": "A GPU", "kind": "gpu", "driver": "570.1", "threads": 8, "python": "3.11.9",
    "versions": {"torch": "2.14.1", "peft": None}, "commit": "d5c1a69a", "date": "2026-01-01",
}  # fmt: skip
CEILINGS = {"copy": 3e12, "matmul": 8e14, "dtype": "bfloat16"}


def record(case: Case, provider: str, median: float, process: int = 0, **more: Any) -> Record:
    """20 and 80 % points are 1 % around the median; half of the time is the forward pass."""
    points = [median, 0.99 * median, 1.01 * median]
    passes = {"both": points, "forward": [x / 2 for x in points]}
    more = {"times": {"graph": passes}, **more}
    return Record(case.name, case.to_json(), provider, process, **more)


def failed(case: Case, provider: str, error: str) -> Record:
    return record(case, provider, 1, times={}, error=error)


def write(path: Path, records: list[Record], ceilings: Any = CEILINGS, **about: Any) -> Path:
    Results(ENVIRONMENT | about, ceilings, records).write(path)
    return path
