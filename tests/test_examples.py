"""The examples run as they stand in the README, and do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "train_routed_lora.py": (["--steps", "120"], "saved, detached and loaded: the same logits"),
    "generate_with_an_image.py": (["--tokens", "8"], "the same tokens each way"),
    "own_route.py": ([], "packed and padded agree"),
}


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    arguments, says = EXAMPLES[name]
    out = run(name, *arguments)
    assert says in out
    *_, last = out.strip().splitlines()
    assert "Next: " in last
    if name == "train_routed_lora.py":
        accuracy = float(out.split("accuracy ")[1].split("%")[0])
        assert accuracy > 90.0  # 25 without the image


@pytest.mark.parametrize("name", ["train_routed_lora.py", "generate_with_an_image.py"])
def test_a_model_that_is_not_there_is_one_line(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), "--model", "nowhere"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "--model must be the directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_example_is_left_out() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    readme = (ROOT / "README.md").read_text()
    assert all(f"examples/{name}" in readme for name in EXAMPLES)
