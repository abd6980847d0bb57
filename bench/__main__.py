"""`python -m bench`: the project's measurements by name; without a name, cases are run."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import FOLDER


class Command(NamedTuple):
    """A command: its help, its arguments, and what runs it."""

    says: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def _nothing(_: ArgumentParser) -> None:
    pass


def _scale_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=FOLDER / "scale.json")


def _scale(arguments: Namespace) -> int:
    from bench import scale

    scale.study(scale.RUNS, arguments.out)
    print(f"next: read {arguments.out}, or docs/scale.md for what it means")
    return 0


def _gates_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the selection that make test runs")
    parser.add_argument("--tiles", action="store_true", help="only the compiled kernels")


def _gates(arguments: Namespace) -> int:
    from bench.offline import gates, summary

    return gates.main(arguments.quick) if arguments.tiles else summary.main(arguments.quick)


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result files")
    parser.add_argument(
        "--out", type=Path, help="folder (default: the first file's name without .json)"
    )


def _compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="result file: before")
    parser.add_argument("b", type=Path, metavar="B", help="result file: after")
    parser.add_argument("--force", action="store_true", help="even of different devices")


def _module(name: str, call: Callable[[Any, Namespace], int]) -> Callable[[Namespace], int]:
    """A command of a module that is imported when it is asked for."""
    return lambda arguments: call(import_module(f"bench.{name}"), arguments)


def _arguments_of(name: str) -> Callable[[ArgumentParser], None]:
    return lambda parser: import_module(f"bench.{name}").add_arguments(parser)


def _prints(name: str) -> Callable[[Namespace], int]:
    """A module of bench.offline whose `main` prints a table."""

    def run(_: Namespace) -> int:
        import_module(f"bench.offline.{name}").main()
        return 0

    return run


COMMANDS = {
    "run": Command(
        "measure cases (what is done where no command is named)",
        _arguments_of("run"), _module("run", lambda module, a: module.run(a)),
    ),
    "report": Command(
        "tables and plots from result files",
        _report_arguments, _module("report", lambda module, a: module.main(a.files, a.out)),
    ),
    "compare": Command(
        "regressions from one result file to another, beyond the spread",
        _compare_arguments, _module("compare", lambda module, a: module.main(a.a, a.b, a.force)),
    ),
    "tune": Command(
        "sweep tiles on a GPU, print rows for kernels/config.py",
        _arguments_of("tune"), _module("tune", lambda module, a: module.main(a)),
    ),
    "profile": Command(
        "bytes moved in a GPU's memory, by Nsight Compute, added to a result file",
        _arguments_of("profile"), _module("profile", lambda module, a: module.main(a)),
    ),
    "gates": Command(
        "all that is known of the kernels without a GPU, judged", _gates_arguments, _gates
    ),
    "launches": Command(
        "kernels launched and bytes saved, beside eager torch (1 minute)",
        _nothing, _prints("launches"),
    ),
    "host": Command(
        "host time of a call and of a launch, beside eager torch (15 seconds)",
        _nothing, _prints("host_cost"),
    ),
    "compile": Command(
        "kernels that a model compiles, and how long it takes (1 minute)",
        _nothing, _prints("first_call"),
    ),
    "memory": Command(
        "memory of a training step, counted (2 minutes); on a GPU measured beside that",
        _arguments_of("memory"), _module("memory", lambda module, a: module.main(a)),
    ),
    "generate": Command(
        "tokens a second with an image: routed, folded in, beside the base (4 minutes on a CPU)",
        _arguments_of("generation"), _module("generation", lambda module, a: module.main(a)),
    ),
    "scale": Command(
        "scale of the bottleneck by route (20 minutes, CPU)", _scale_arguments, _scale
    ),
}  # fmt: skip


GOING_ON = ("run", "memory", "generate")  # where an earlier call with the same file stopped


def main(given: list[str]) -> int:
    """Runs a command; an error of the user's is one line on standard error."""
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        print(f"python -m bench: command must be one of {', '.join(COMMANDS)}; got {given[0]!r}",
              file=sys.stderr)  # fmt: skip
        return 2
    if not given or given[0] not in (*COMMANDS, "-h", "--help"):
        given = ["run", *given]
    listed = "\n".join(f"  {name:10} {command.says}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        prog="python -m bench", description=f"{__doc__}\n\n{listed}",
        formatter_class=RawDescriptionHelpFormatter, usage="python -m bench [COMMAND] [options]",
    )  # fmt: skip
    if given[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    command = COMMANDS[given[0]]
    parser = ArgumentParser(prog=f"python -m bench {given[0]}", description=command.says)
    command.add_arguments(parser)
    arguments = parser.parse_args(given[1:])
    is_started = getattr(arguments, "call", None) is not None  # by another, which says what ended
    try:
        return command.run(arguments)
    except (ValueError, OSError) as error:
        print(f"python -m bench {given[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not is_started:
            goes_on = "; the same command goes on" if given[0] in GOING_ON else ""
            print(f"python -m bench {given[0]}: interrupted{goes_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
