"""`python -m bench`: the project's measurements by name."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

# Commands that need Triton and no GPU: a module whose `main` prints a table.
WITHOUT_GPU = {
    "launches": ("launches", "kernels launched and bytes saved, beside eager torch (1 minute)"),
    "host": ("host_cost", "host time of a call and of a launch, beside eager torch (15 seconds)"),
    "compile": ("first_call", "kernels that a model compiles, and how long it takes (1 minute)"),
}


def study_scale(arguments: argparse.Namespace) -> int:
    from bench import scale

    scale.study(scale.RUNS, arguments.out)
    print(f"next: read {arguments.out}, or docs/scale.md for what it means")
    return 0


def check_gates(arguments: argparse.Namespace) -> int:
    from bench.offline import gates

    return gates.main(arguments.quick)


def run_main_of(arguments: argparse.Namespace) -> int:
    import_module(f"bench.offline.{arguments.module}").main()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    scale = commands.add_parser("scale", help="scale of the bottleneck by route (20 minutes, CPU)")
    scale.add_argument("--out", type=Path, default=Path(__file__).parent / "results/scale.json")
    scale.set_defaults(run=study_scale)
    gates = commands.add_parser("gates", help="every kernel compiled for four GPUs, and judged")
    gates.add_argument("--quick", action="store_true", help="the selection that make test runs")
    gates.set_defaults(run=check_gates)
    for name, (module, text) in WITHOUT_GPU.items():
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run_main_of, module=module)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
