"""A run's answers on a split, their scores, and the files that evaluation servers take."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fused_route.training.data.layouts import splits_of
from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.cutting import say_cut
from fused_route.training.experiment.folder import (
    adapter_folder,
    open_run,
    write_compact,
    write_json,
)
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.run import encode
from fused_route.training.experiment.tasks import Rows, open_rows
from fused_route.training.experiment.trainer import ExperimentTrainer, named
from fused_route.training.files import atomic_file

Answers = Mapping[str, str]
# What a Trainer that only answers does beside.
NOTHING: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": [],
}


def evaluate(
    run: Path,
    split: str = "test",
    *,
    tasks: Sequence[str] | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    items: Path | None = None,
) -> tuple[dict[str, float], list[Path]]:
    """(scores, files written): the answers of a run, and scores where the split has references.

    Args:
        run: folder of a run, or of an adapter in it.
        split: "validation" or "test" of its recipe, or a split of the layout.
        tasks: which of the recipe's; None: those that have this split.
        out: folder of the files; None: beside the adapter.
        overrides: settings of the recipe.
        items: a file for the score of each row, by task and id, where there are scores; None: none.

    Raises:
        ValueError: no run, no such split, or data that cannot be used.
    """
    built = open_run(run, overrides)
    names = tasks_with(built.recipe, split, tasks)
    rows = open_rows(built.recipe, split, "evaluate", names)
    folder = adapter_folder(run) if out is None else out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for answers and scores")
    quiet = {**NOTHING, "output_dir": str(folder)}
    recipe = replace(built.recipe, training=built.recipe.training | quiet)
    arguments = arguments_of(recipe, validated=False)
    say_cut(built.batches(), rows)
    encode(built, rows.images())
    trainer = ExperimentTrainer(built, arguments)
    withheld = [name for name in names if is_withheld(built.recipe, name, split)]
    given = trainer.answered(rows)
    judged = {} if withheld else trainer.judged(rows, given)
    scores = named(judged) if judged else {}
    label = _label(built.recipe, split, tasks)
    written = _write(folder, label, rows, given, scores) if arguments.should_save else []
    if items is not None and judged and arguments.should_save:
        write_compact(items, {name: found.each for name, found in judged.items()})
    return scores, written


def _label(recipe: Recipe, split: str, tasks: Sequence[str] | None) -> str:
    """What the names of the files say."""
    limits = {task.limit for task in recipe.tasks.values() if task.limit is not None}
    parts = [split.replace("+", "-"), *(tasks or []), *(f"first{n}" for n in sorted(limits))]
    control = [] if recipe.control == "none" else [recipe.control]
    return "-".join([*parts, *control])


def tasks_with(recipe: Recipe, split: str, tasks: Sequence[str] | None = None) -> list[str]:
    """The tasks that are answered on a split: those named, else those that have it.

    Raises:
        ValueError: none has it.
    """
    if tasks is not None:
        return list(tasks)
    if split not in ("train", "validation", "test"):
        return list(recipe.tasks)
    found = [name for name, task in recipe.tasks.items() if getattr(task, split) is not None]
    if not found:
        told = ", ".join(f"tasks.{name}.{split} ({t.splits})" for name, t in recipe.tasks.items())
        raise ValueError(f"split={split!r}: no task of the recipe has one; set {told}")
    return found


def is_withheld(recipe: Recipe, name: str, split: str) -> bool:
    """Whether a split of a task has no answers to score by."""
    task = recipe.tasks[name]
    parts = splits_of(task.layout, task.split(split)).values()
    return any(part.answers == "withheld" for part in parts)


def _write(
    folder: Path, label: str, rows: Rows, given: Mapping[str, Answers], scores: dict[str, float]
) -> list[Path]:
    written = []
    for name, answers in given.items():
        write = SUBMISSIONS[rows.samples[name].task]
        path = folder / f"answers-{name}-{label}{'.csv' if write is _nlvr2 else '.json'}"
        with atomic_file(path) as file:
            file.write(write(answers).encode())
        written.append(path)
    if scores:
        written.append(folder / f"scores-{label}.json")
        write_json(written[-1], scores)
    return written


def _listed(question: str, answer: str, number: Callable[[str], Any]) -> Callable[[Answers], str]:
    def write(answers: Answers) -> str:
        rows = [{question: number(key), answer: text} for key, text in answers.items()]
        return json.dumps(rows, ensure_ascii=False) + "\n"

    return write


def _number(key: str) -> Any:
    return int(key) if key.isdecimal() else key


def _nlvr2(answers: Answers) -> str:
    written = io.StringIO()
    rows = ((key, text.capitalize()) for key, text in answers.items())
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()


# As the official evaluations of the tasks read them.
SUBMISSIONS: dict[str, Callable[[Answers], str]] = {
    "vqa": _listed("question_id", "answer", _number),
    "gqa": _listed("questionId", "prediction", str),
    "nlvr2": _nlvr2,
    "caption": _listed("image_id", "caption", _number),
}
