"""The command `fused-route`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_route
from fused_route.checks import MOST


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; what cannot be used is one line on standard error and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, ImportError, OSError) as error:
        print(f"fused-route: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fused-route: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fused-route", description="Routed low-rank fine-tuning of vision-language models."
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {fused_route.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="compare routes on easy-VQA, with a report in runs/demo",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=positive, default=300, help="optimisation steps of each run")
    demo.add_argument("--seeds", type=positive, default=1, help="runs of each arm")
    demo.add_argument("--batch", type=positive, default=64, help="questions in a step")
    demo.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    demo.add_argument("--rank", type=positive, default=8, help="rank r of the routed layers")
    demo.add_argument(
        "--out", type=Path, default=Path("runs", "demo"), help="folder of the results"
    )
    demo.add_argument("--bundle", type=Path, help="data of fused_route.training.demo.bundle")
    demo.set_defaults(run=_demo)

    predict = commands.add_parser("predict", help="answer a question about an image")
    predict.add_argument("--adapter", type=Path, required=True, help="folder such as runs/demo/mul")
    predict.add_argument("--image", required=True, help="image file")
    predict.add_argument("--question", required=True, help='such as "what color is the shape?"')
    predict.set_defaults(run=_predict)
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {text}")
    return value


def _quiet() -> None:
    """No bar for reading weights: these load in a tenth of a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _demo(arguments: argparse.Namespace) -> int:
    from fused_route.training.demo import compare

    _quiet()
    names = ("steps", "seeds", "batch", "lr", "rank", "out", "bundle")
    settings = compare.Settings(**{name: getattr(arguments, name) for name in names})
    report = compare.run(settings)
    adapter = settings.out / ("mul" if settings.seeds == 1 else "mul-seed0")
    print(f"report: {report}")
    print(
        f"next: fused-route predict --adapter {adapter} --image FILE.png "
        '--question "what color is the shape?"'
    )
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from fused_route.training.demo.predict import answer

    _quiet()
    ranked = answer(arguments.adapter, arguments.image, arguments.question)
    best, runner_up = ranked[0], ranked[1]
    print(f"{best[0]}  ({best[1]:.1%}; next: {runner_up[0]}, {runner_up[1]:.1%})")
    return 0
