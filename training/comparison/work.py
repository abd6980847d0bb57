"""What is done for one run, in a process of its own: nothing of it outlasts it but files.

So memory is the run's own, and a run that dies takes nothing with it.
"""

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

import fused_route
from fused_route.checks import shown
from fused_route.training.comparison.plan import with_training
from fused_route.training.experiment.arguments import arguments_of, refuse_not_done
from fused_route.training.experiment.build import build, parameters
from fused_route.training.experiment.evaluation import evaluate, tasks_with
from fused_route.training.experiment.folder import (
    PLACES,
    adapter_folder,
    settings_of,
    write_json,
)
from fused_route.training.experiment.recipe import Recipe, default
from fused_route.training.experiment.run import HISTORY, SCORES, encode, open_data, seed, train
from fused_route.training.experiment.tasks import open_rows

TRAIN, ANSWERS = "train", "answers"  # folders of a run
PREPARED, TRAINED, RECORD = "prepared.json", "trained.json", "record.json"
ITEMS, FAILED, LOG = "items.json", "failed.json", "log.txt"
PACKAGES = ("torch", "transformers", "numpy")
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """A process's work.

    Attributes:
        kind: "prepare", "train" (and no more) or "run" (train and score).
        recipe: of the arm, with the seed and the learning rate of the run.
        folder: of the run.
        split: what is scored.
        label: for messages.
        threads: of torch.
    """

    kind: str
    recipe: Recipe
    folder: Path
    split: str
    label: str
    threads: int

    @property
    def result(self) -> Path:
        """The file that is there when the work is done."""
        return self.folder / {"prepare": PREPARED, "train": TRAINED, "run": RECORD}[self.kind]


def carry_out(job: Job) -> str | None:
    """Does the work in another process; returns None, or what went wrong, which `FAILED` holds."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / FAILED).unlink(missing_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports cost seconds, and are the same for all
    process = context.Process(target=_work, args=(job,))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    if job.result.is_file() and not process.exitcode:
        return None
    if not (job.folder / FAILED).is_file():
        _fail(job, f"the process ended with status {process.exitcode}: out of memory, or killed")
    return str(json.loads((job.folder / FAILED).read_text(encoding="utf-8"))["error"])


def _fail(job: Job, error: str) -> None:
    write_json(job.folder / FAILED, {"error": error, "at": _now(), **code()})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _work(job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    end_with_parent()
    log = os.open(job.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(job.threads)
    try:
        {"prepare": _prepare, "train": _train, "run": _run}[job.kind](job)
    except BaseException as error:
        traceback.print_exc()
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        _fail(job, kind + " ".join(str(error).split())[:2000])
        sys.stderr.flush()
        sys.exit(1)


def end_with_parent() -> None:
    """A parent that was killed leaves no run behind that would be in its successor's way."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def budget(recipe: Recipe) -> dict[str, Any]:
    """What an arm may spend: trainable parameters, and steps or epochs of how many rows.

    Raises:
        ValueError: data, models or settings that cannot be used.
    """
    validated = any(task.validation is not None for task in recipe.tasks.values())
    refuse_not_done(recipe)
    arguments = arguments_of(recipe, validated=validated)
    seed(arguments)
    built = build(recipe, open_data(recipe).answers)
    return {"trainable": parameters(built.model)[0], **planned(recipe)}


def planned(recipe: Recipe) -> dict[str, Any]:
    """Steps (or epochs) and rows in each, by the settings."""
    told = recipe.training
    steps, default = told.get("max_steps", -1), told.get("per_device_train_batch_size", 8)
    times = told.get("gradient_accumulation_steps", 1)
    batch = {name: (task.batch_size or default) * times for name, task in recipe.tasks.items()}
    length = {"steps": steps} if steps > 0 else {"epochs": told.get("num_train_epochs", 3.0)}
    return {**length, "batch": batch}


def _prepare(job: Job) -> None:
    """Encodes all images of an arm, which would count as the first run's memory."""
    _quiet()
    recipe = job.recipe
    data = open_data(recipe)
    rows = open_rows(recipe, job.split, "evaluate", tasks_with(recipe, job.split))
    built = build(recipe, data.answers)
    encode(built, list(dict.fromkeys([*data.images(), *rows.images()])))
    write_json(job.result, {"trainable": parameters(built.model)[0], **planned(recipe)})


def _train(job: Job) -> None:
    """Trains, or goes on, and records what it took."""
    _quiet()
    folder = job.folder / TRAIN
    told = {"output_dir": str(folder), "disable_tqdm": True}
    told["report_to"] = job.recipe.training.get("report_to", [])
    finished = (folder / SCORES).is_file()  # killed between its end and this record
    train(with_training(job.recipe, **told))
    history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    whole = not history["resumed_at"]
    peak, of = peak_memory()
    record = {
        "trainable": history["trainable"],
        "steps": history["steps"],
        "batch": history["batch"],
        "resumed_at": history["resumed_at"],
        "seconds": scores["training"].get("train_runtime") if whole else None,
        "peak_mib": None if finished else round(peak / MIB, 1),
        "memory": of,
        "train_loss": scores["training"].get("train_loss"),
        "validation": scores["validation"],
        "curve": curve(history["log"]),
        "losses": [[x["step"], x["loss"]] for x in history["log"] if "loss" in x],
        "settings": settings_of(job.recipe),
        "at": _now(),
        **code(),
    }
    write_json(job.folder / TRAINED, record)


def _run(job: Job) -> None:
    """Trains where that is not done, scores the split, and takes the checkpoints away."""
    _quiet()
    if not (job.folder / TRAINED).is_file():
        _train(job)
    trained = json.loads((job.folder / TRAINED).read_text(encoding="utf-8"))
    check_settings(job, trained, job.folder)
    folder = job.folder / TRAIN
    scores, _ = evaluate(
        folder, job.split, out=job.folder / ANSWERS, items=job.folder / ITEMS, overrides=QUIETLY
    )
    adapter = adapter_folder(folder).name
    scored = {"split": job.split, "adapter": adapter, "score": scores["score"], "scores": scores}
    write_json(job.result, {**trained, **scored})
    for checkpoint in folder.glob("checkpoint-*"):  # optimiser's states, of no use any more
        shutil.rmtree(checkpoint)


QUIETLY = ("--training.disable_tqdm=true",)


def curve(log: list[dict[str, Any]]) -> list[list[float]]:
    """(step, validation score, or loss where that selects) of a Trainer's log."""
    found: dict[float, float] = {}
    for line in log:
        for name in ("eval_score", "eval_loss"):
            if name in line:
                found.setdefault(line["step"], line[name])
    return [[step, value] for step, value in found.items()]


def peak_memory() -> tuple[int, str]:
    """(bytes, of what): of this process, until now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU, allocated by torch"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "CPU, resident"


def check_settings(
    job: Job, record: Mapping[str, Any], folder: Path, but: Sequence[str] = ()
) -> None:
    """Refuses what other settings than the job's came to.

    Args:
        record: of a run that is finished, or trained only, which has no split yet.
        folder: of the run, for the message.
        but: settings that may differ.

    Raises:
        ValueError: it is of others.
    """
    theirs, ours = dict(record["settings"]), settings_of(job.recipe)
    if "split" in record:
        theirs["split"], ours["split"] = record["split"], job.split
    for name in sorted((theirs.keys() | ours.keys()) - set(but)):
        same = theirs.get(name, default(name)) == ours.get(name, default(name))
        if not PLACES.fullmatch(name) and not same:
            raise ValueError(
                f"{folder} is a run of other settings ({name} is {shown(theirs.get(name))} there, "
                f"{shown(ours.get(name))} here): name another folder with --out"
            )


def code() -> dict[str, Any]:
    """Versions, commit (of a checkout; + where files differ) and machine."""
    versions = {"fused_route": fused_route.__version__} | {p: version(p) for p in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"{platform.machine()}, {device}, {torch.get_num_threads()} threads"
    return {"versions": versions, "commit": _commit(), "machine": machine}


def _commit() -> str | None:
    top = Path(fused_route.__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return None
    git = ["git", "-C", str(top)]
    try:
        told = [
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + ("+" if told[1] else "")
