"""The command `fused-route`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_route
from fused_route.checks import MOST

DTYPES = ("float32", "float16", "bfloat16")
RECIPES = sorted(file.stem for file in Path(__file__).parent.glob("experiment/recipes/*.yaml"))
COMPARISONS = sorted(f.stem for f in Path(__file__).parent.glob("comparison/comparisons/*.yaml"))
OVERRIDES = (
    "Any setting of the recipe may follow: --route gram, --tasks.vqa.root data/vqav2, or short "
    "--lr, --epochs, --steps, --batch_size, --rank, --out. Recipes that come with the package: "
    f"{', '.join(RECIPES)}."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; what cannot be used is one line on standard error and exit status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    skipping = ["--broken", "skip"] if getattr(arguments, "skip_broken", False) else []
    arguments.overrides = [*rest, *skipping]
    try:
        status = int(arguments.run(arguments))
    except (ValueError, ImportError, OSError) as error:
        print(f"fused-route: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fused-route: interrupted", file=sys.stderr)
        return 130
    return status


def command() -> int:
    """`main` as a process of its own, which then ends what it shares with those that a launcher
    started beside it.

    Left to the interpreter's exit, threads of a group that still run abort the process now and
    then (exit status 134), after all that it was to do. Where the command failed others may still
    wait in the group: the launcher ends them.
    """
    status = main()
    if status == 0:
        _leave_group()
    return status


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")  # not imported for this alone
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fused-route", description="Routed low-rank fine-tuning of vision-language models."
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {fused_route.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_train, _add_eval, _add_predict, _add_generate, _add_encode):
        add(commands)
    _add_doctor(commands)
    _add_compare(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = commands.add_parser(
        "train",
        help="train a recipe, or go on where it stopped",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    train.add_argument("recipe", help="a YAML file, or the name of one that comes with the package")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print settings, parameters, memory and the first batch, and train nothing",
    )
    _add_skip_broken(train)
    train.set_defaults(run=_train, overrides=())


def _add_eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    score = commands.add_parser(
        "eval", help="answer and score a split", epilog=OVERRIDES, allow_abbrev=False
    )
    score.add_argument("folder", type=Path, help="of a run, or of an adapter in it")
    score.add_argument(
        "--split",
        default="test",
        help="train, validation or test of the recipe, or another of the layout's (default: test)",
    )
    score.add_argument("--task", action="append", help="of the recipe's tasks; again for another")
    score.add_argument("--to", type=Path, help="folder of answers and scores; else the adapter's")
    _add_skip_broken(score)
    score.set_defaults(run=_eval, overrides=())


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predict = commands.add_parser("predict", help="answer a question about an image")
    predict.add_argument(
        "--adapter", type=Path, required=True, help="folder of a run, or such as runs/demo/mul"
    )
    predict.add_argument("--image", nargs="+", required=True, help="image file; two for NLVR2")
    predict.add_argument("--question", required=True, help='such as "what color is the shape?"')
    predict.add_argument("--task", help="of the run's tasks; else the first of questions")
    predict.set_defaults(run=_predict)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser("generate", help="write captions of images")
    generate.add_argument("--adapter", type=Path, required=True, help="folder of a run")
    generate.add_argument("--image", nargs="+", required=True, help="image files")
    generate.add_argument("--task", help="of the run's tasks; else the first of captions")
    generate.add_argument("--beams", type=positive, help="beams; else the task's")
    generate.add_argument("--tokens", type=positive, help="new tokens at most; else the task's")
    generate.set_defaults(run=_generate)


def _add_encode(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    encode = commands.add_parser(
        "encode",
        help="encode the images of a recipe, which training then reads",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    encode.add_argument(
        "recipe", help="a YAML file, or the name of one that comes with the package"
    )
    encode.add_argument("--dtype", choices=DTYPES, help="of the features (default: float32)")
    encode.add_argument("--workers", type=whole, help="processes that read images (default: 8)")
    encode.add_argument("--batch", type=positive, default=64, help="images at once (default: 64)")
    encode.add_argument("--verify", action="store_true", help="check what is there once more")
    _add_skip_broken(encode)
    encode.set_defaults(run=_encode, overrides=())


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check the machine, and a recipe's models and data",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    doctor.add_argument("recipe", nargs="?", help="a YAML file, or the name of one")
    doctor.set_defaults(run=_doctor, overrides=())


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = commands.add_parser(
        "compare",
        help="train and score arms of a recipe over seeds, with a report; goes on where it stopped",
        epilog=f"{OVERRIDES} Comparisons that come with the package: {', '.join(COMPARISONS)}.",
        allow_abbrev=False,
    )
    compare.add_argument("file", help="a YAML file, or the name of one that comes with the package")
    compare.add_argument("--out", type=Path, help="folder of the results (runs/compare-NAME)")
    compare.add_argument("--arm", action="append", help="of the arms; again for another; else all")
    compare.add_argument(
        "--dry-run", action="store_true", help="list runs, budgets and flags, and train nothing"
    )
    _add_skip_broken(compare)
    compare.set_defaults(run=_compare, overrides=())


def _add_skip_broken(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out rows whose image or answer is missing, and count them",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {text}")
    return value


def _quiet() -> None:
    """No bar for reading weights: these load in a tenth of a second; no report on heads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


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


def _train(arguments: argparse.Namespace) -> int:
    from fused_route.training.experiment import commands

    _quiet()
    return commands.train(arguments.recipe, arguments.overrides, dry=arguments.dry_run)


def _eval(arguments: argparse.Namespace) -> int:
    from fused_route.training.experiment import commands

    _quiet()
    return commands.score(
        arguments.folder, arguments.split, arguments.task, arguments.to, arguments.overrides
    )


def _predict(arguments: argparse.Namespace) -> int:
    from fused_route.training.experiment import commands
    from fused_route.training.experiment.folder import is_run

    _quiet()
    if is_run(arguments.adapter):
        return commands.predict(
            arguments.adapter, arguments.image, arguments.question, arguments.task
        )
    from fused_route.training.demo.predict import answer

    if len(arguments.image) > 1 or arguments.task is not None:
        raise ValueError(
            f"{arguments.adapter} is no run of `fused-route train`: one image, no task"
        )
    ranked = answer(arguments.adapter, arguments.image[0], arguments.question)
    best, runner_up = ranked[0], ranked[1]
    print(f"{best[0]}  ({best[1]:.1%}; then {runner_up[0]}, {runner_up[1]:.1%})")
    commands.beside_answers("fused-route train easy-vqa")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from fused_route.training.experiment import commands

    _quiet()
    told = {"num_beams": arguments.beams, "max_new_tokens": arguments.tokens}
    generation = {name: value for name, value in told.items() if value is not None}
    return commands.generate(arguments.adapter, arguments.image, arguments.task, generation)


def _encode(arguments: argparse.Namespace) -> int:
    from fused_route.training.experiment import commands

    _quiet()
    return commands.encode(
        arguments.recipe, arguments.overrides, dtype=arguments.dtype, workers=arguments.workers,
        batch_size=arguments.batch, verify=arguments.verify,
    )  # fmt: skip


def _doctor(arguments: argparse.Namespace) -> int:
    from fused_route.training.experiment import commands

    _quiet()
    return commands.doctor(arguments.recipe, arguments.overrides)


def _compare(arguments: argparse.Namespace) -> int:
    from fused_route.training.comparison import commands

    _quiet()
    return commands.compare(
        arguments.file, arguments.overrides, out=arguments.out, arms=arguments.arm,
        dry=arguments.dry_run,
    )  # fmt: skip
