"""What the subcommands of `fused-route` print."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.table import Table

from fused_route.training.experiment import asking
from fused_route.training.experiment import doctor as examination
from fused_route.training.experiment.build import build
from fused_route.training.experiment.dry_run import dry_run
from fused_route.training.experiment.evaluation import evaluate
from fused_route.training.experiment.folder import adapter_folder
from fused_route.training.experiment.recipe_file import read_recipe, shipped
from fused_route.training.experiment.run import encode as run_encoding
from fused_route.training.experiment.run import open_data
from fused_route.training.experiment.run import train as run_training

COMPARED = 16  # images that --verify encodes again


def train(recipe: str, overrides: Sequence[str], *, dry: bool) -> int:
    """Trains, or says what it would."""
    told = read_recipe(recipe, overrides)
    if dry:
        print(dry_run(told))
        print(f"next: fused-route {shlex.join(['train', recipe, *overrides])}")
        return 0
    folder = run_training(told)
    if PartialState().is_main_process:
        found = json.loads((folder / "scores.json").read_text())
        _table(found["validation"] or {"train_loss": found["training"]["train_loss"]})
        print(f"adapter: {adapter_folder(folder)}")
        if any(folder.rglob("events.out.tfevents.*")):
            print(f"curves: tensorboard --logdir {shlex.quote(str(folder))}")
        print(f"next: fused-route {shlex.join(['eval', str(folder)])}")
    return 0


def score(
    folder: Path,
    split: str,
    tasks: Sequence[str] | None,
    out: Path | None,
    overrides: Sequence[str],
) -> int:
    """Answers and scores a split."""
    scores, written = evaluate(folder, split, tasks=tasks, out=out, overrides=overrides)
    if PartialState().is_main_process:
        if scores:
            _table(scores)
        else:
            print("the split has no answers to score by: send the files to its evaluation server")
        for path in written:
            print(f"written: {path}")
        asks = [p for p in written if p.name.startswith("answers-") and "caption" not in p.name]
        command = shlex.join(["predict" if asks else "generate", "--adapter", str(folder)])
        question = ' --question "…"' if asks else ""
        print(f"next: fused-route {command} --image FILE{question}")
    return 0


def predict(folder: Path, images: Sequence[str], question: str, task: str | None) -> int:
    """Answers one question."""
    for line in asking.answer(folder, [Path(image) for image in images], question, task):
        print(line)
    beside_answers(shlex.join(["fused-route", "eval", str(folder)]))
    return 0


def generate(
    folder: Path, images: Sequence[str], task: str | None, generation: Mapping[str, Any]
) -> int:
    """Writes captions, an image and its caption a line."""
    found = asking.captions(folder, [Path(image) for image in images], task, **generation)
    for image, caption in zip(images, found, strict=True):
        print(f"{image}\t{caption}")
    beside_answers(shlex.join(["fused-route", "eval", str(folder)]))
    return 0


def beside_answers(command: str) -> None:
    """The next step, on standard error: what a command answers is often piped to another."""
    print(f"next: {command}", file=sys.stderr)


def encode(
    recipe: str,
    overrides: Sequence[str],
    *,
    dtype: str | None,
    workers: int | None,
    batch_size: int,
    verify: bool,
) -> int:
    """Encodes what the cache lacks, shared by a launcher's processes; 1 where it is damaged."""
    told = read_recipe(recipe, overrides)
    data, state, status = open_data(told), PartialState(), 0
    built, images = build(told, data.answers), data.images()
    how = {"dtype": dtype, "batch_size": batch_size, "workers": workers}
    done = run_encoding(built, images, **{k: v for k, v in how.items() if v is not None})
    if built.cache is None or done is None:
        raise ValueError("features_from='tower': the recipe keeps no features")
    if state.is_main_process:
        print(f"{done.new} images encoded here, {len(built.cache)} in {built.cache.folder}")
        if verify:
            built.tower.to(state.device)
            found = built.cache.verify(built.encoder, images, COMPARED)
            print(found)
            status = 0 if found.is_sound else 1
        if status and not found.damaged:
            print(f"take {built.cache.folder} away before", file=sys.stderr)
        command = "encode" if status else "train"
        print(f"next: fused-route {shlex.join([command, recipe, *overrides])}")
    return status


def doctor(recipe: str | None, overrides: Sequence[str]) -> int:
    """Says what is there and what to do about the rest; 1 where training would not start."""
    told = None if recipe is None else read_recipe(recipe, overrides)
    problems = 0
    for finding in examination.examine(told):
        print(finding)
        problems += finding.state == "problem"
    if problems:
        print("to do before training: what stands after each problem", file=sys.stderr)
        return 1
    if recipe is None:
        print(f"next: fused-route doctor RECIPE, a file or one of {', '.join(shipped())}")
    else:
        print(f"next: fused-route {shlex.join(['train', recipe, *overrides, '--dry-run'])}")
    return 0


def _table(scores: Mapping[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("score", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in scores.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name, shown)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100, color_system=None)
    console.print(table, markup=False)
