"""`python -m bench`: the project's measurements by name."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # bench/ is a folder of scripts, not a package


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    scale = commands.add_parser("scale", help="scale of the bottleneck by route (20 minutes, CPU)")
    scale.add_argument("--out", type=Path, default=Path(__file__).parent / "results/scale.json")
    arguments = parser.parse_args()

    import scale as study

    study.study(study.RUNS, arguments.out)
    print(f"next: read {arguments.out}, or docs/scale.md for what it means")
    return 0


if __name__ == "__main__":
    sys.exit(main())
