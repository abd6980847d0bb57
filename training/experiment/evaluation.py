"""A run's answers on a split, their scores, and the files that evaluation servers take."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fused_route.training.experiment.run import encode, readable
from fused_route.training.experiment.tasks import Rows, Scored, open_rows
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
        split: "train", "validation" or "test" of its recipe, or another split of the layout.
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
    rows = readable(built, rows)
    trainer = ExperimentTrainer(built, arguments)
    given = trainer.answered(rows)
    judged = _judged(trainer, rows, given, split)
    scores = named(judged) if judged else {}
    written = []
    if arguments.should_save:
        written = _write(folder, _labels(built.recipe, names, split, tasks), rows, given, scores)
    if items is not None and judged and arguments.should_save:
        write_compact(items, {name: found.each for name, found in judged.items()})
    return scores, written


def _judged(
    trainer: ExperimentTrainer, rows: Rows, given: Mapping[str, Answers], split: str
) -> dict[str, Scored]:
    """The scores of the tasks that have answers to score by; says which of several have none."""
    recipe = trainer.built.recipe
    withheld = [name for name in rows.samples if is_withheld(recipe, name, split)]
    scored = {name: found for name, found in rows.samples.items() if name not in withheld}
    if withheld and scored and trainer.args.should_save:
        print(
            f"no answers to score {', '.join(withheld)} by: 'score' is of {', '.join(scored)} "
            "alone",
            file=sys.stderr,
        )
    return trainer.judged(Rows(scored), given) if scored else {}


def _labels(
    recipe: Recipe, names: Sequence[str], split: str, tasks: Sequence[str] | None
) -> dict[str, str]:
    """What the names of the files say: of each task's answers, and under "" of the scores.

    With the layout's split, where that is not what was asked for: "test" of a recipe may be
    another today, and its answers on the way to a server.
    """
    limits = {task.limit for task in recipe.tasks.values() if task.limit is not None}
    rest = [*(tasks or []), *(f"first{n}" for n in sorted(limits))]
    rest += [] if recipe.control == "none" else [recipe.control]
    own = {name: recipe.tasks[name].split(split) for name in names}

    def label(splits: Iterable[str]) -> str:
        return "-".join([*dict.fromkeys([split, *splits]), *rest]).replace("+", "-")

    return {"": label(own.values())} | {name: label([own[name]]) for name in names}


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
    folder: Path,
    labels: Mapping[str, str],
    rows: Rows,
    given: Mapping[str, Answers],
    scores: dict[str, float],
) -> list[Path]:
    written = []
    for name, answers in given.items():
        write = SUBMISSIONS[rows.samples[name].task]
        path = folder / f"answers-{name}-{labels[name]}{'.csv' if write is _nlvr2 else '.json'}"
        with atomic_file(path) as file:
            file.write(write(answers).encode())
        written.append(path)
    if scores:
        written.append(folder / f"scores-{labels['']}.json")
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
