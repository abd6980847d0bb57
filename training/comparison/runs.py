"""The runs of a comparison: what is done, what is left, and doing it."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_route.training.comparison.plan import Comparison, Told, with_training
from fused_route.training.comparison.work import (
    FAILED,
    ITEMS,
    LOG,
    RECORD,
    TRAINED,
    Job,
    carry_out,
    check_settings,
)
from fused_route.training.experiment.evaluation import tasks_with
from fused_route.training.experiment.folder import anchored, settings_of, write_json
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.tasks import open_rows

COMPARISON, CHOSEN, RUNS, RATES, ARMS = "comparison.json", "chosen.json", "runs", "rates", "arms"
DIVERGED = "training diverged"
# What a chosen rate holds for any value of: the first seed may be another when seeds are added.
OF_CHOICE = ("training.seed", "training.learning_rate")


@dataclass(frozen=True)
class Runs:
    """A comparison's runs in a folder: OUT/runs/ARM/seed-N, OUT/rates/ARM/RATE, OUT/arms/ARM.

    Attributes:
        comparison: what is compared.
        recipes: of each arm.
        told: what is set beside the recipe's file.
        out: the folder.
    """

    comparison: Comparison
    recipes: Mapping[str, Recipe]
    told: Told
    out: Path

    def folder(self, arm: str, seed: int) -> Path:
        """Of a run."""
        return self.out / RUNS / arm / f"seed-{seed}"

    def record(self, arm: str, seed: int) -> dict[str, Any] | None:
        """What a finished run came to, else None."""
        return _read(self.folder(arm, seed) / RECORD)

    def error(self, arm: str, seed: int) -> str | None:
        """Why a run failed, if it did and was not done since."""
        for folder in (self.folder(arm, seed), self.out / ARMS / arm, self.out / RATES / arm):
            found = _read(folder / FAILED)
            if found is not None and self.record(arm, seed) is None:
                return str(found["error"])
        return None

    def items(self, arm: str, seed: int) -> dict[str, dict[str, float]]:
        """Scores by task and id of a finished run."""
        found = _read(self.folder(arm, seed) / ITEMS)
        assert found is not None
        return found

    @cached_property
    def images(self) -> dict[str, dict[str, str]] | None:
        """The first image of each scored item, by task and id; None where the data are gone."""
        recipe = self.recipes[self.comparison.baseline]
        split = self.comparison.split
        try:
            rows = open_rows(recipe, split, "evaluate", tasks_with(recipe, split))
        except ValueError:
            return None
        found = {}
        for name, samples in rows.samples.items():
            table = samples.rows.select_columns(["id", "images"]).to_dict()
            pairs = zip(table["id"], table["images"], strict=True)
            found[name] = {key: images[0] for key, images in pairs}
        return found

    def done(self, arm: str) -> list[int]:
        """Seeds whose runs are finished."""
        return [seed for seed in self.comparison.seeds if self.record(arm, seed) is not None]

    def chosen(self, arm: str) -> dict[str, Any] | None:
        """{"rate", "scores" by rate} of an arm whose learning rate is chosen."""
        return _read(self.out / RATES / arm / CHOSEN)

    def job(self, kind: str, arm: str, seed: int, rate: float | None = None) -> Job:
        """The work of a run (or "prepare", of an arm; or "train", of a learning rate)."""
        told: dict[str, Any] = {"seed": seed}
        if rate is not None:
            told["learning_rate"] = rate
        folders = {"prepare": self.out / ARMS / arm, "run": self.folder(arm, seed)}
        folder = folders.get(kind) or self.out / RATES / arm / f"{rate:g}"
        label = arm if kind == "prepare" else f"{arm}, seed {seed}"
        label += f", learning rate {rate:g}" if kind == "train" else ""
        recipe = anchored(with_training(self.recipes[arm], **told))
        threads = torch.get_num_threads()
        return Job(kind, recipe, folder.absolute(), self.comparison.split, label, threads)


def _read(path: Path) -> Any:
    """The contents of a JSON file, or None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is no JSON: take it away, and its run is done again") from None


def check(runs: Runs) -> None:
    """Refuses a folder with other files, or with runs of other settings.

    Raises:
        ValueError: it is one.
    """
    out = runs.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file: name a folder")
    ours = (out / COMPARISON).is_file()
    if out.is_dir() and not ours and any(p.name != ".lock" for p in out.iterdir()):
        raise ValueError(f"out={str(out)!r} holds other files: name a new or an empty folder")
    for arm in runs.comparison.arms:
        _check_rates(runs, arm)
        chosen = runs.chosen(arm)
        for seed in runs.comparison.seeds:
            folder = runs.folder(arm, seed)
            record = runs.record(arm, seed) or _read(folder / TRAINED)
            if record is not None:
                rate = None if chosen is None else chosen["rate"]
                check_settings(runs.job("run", arm, seed, rate), record, folder)


def _check_rates(runs: Runs, arm: str) -> None:
    """ValueError where an arm's learning rates were tried with other settings, or were others."""
    first, folder, chosen = runs.comparison.seeds[0], runs.out / RATES / arm, runs.chosen(arm)
    if chosen is not None:
        tried = sorted(map(float, chosen["scores"]))
        if tried != sorted(runs.comparison.rates):
            raise ValueError(f"{runs.out}: rates of {arm} were {tried} there: name another --out")
        if "settings" in chosen:  # chosen by an earlier version: they are not known
            job = runs.job("train", arm, first, chosen["rate"])
            check_settings(job, chosen, folder, OF_CHOICE)
        return
    for rate in runs.comparison.rates:
        job = runs.job("train", arm, first, rate)
        trained = _read(job.result)
        if trained is not None:
            check_settings(job, trained, job.folder)


def run(runs: Runs, arms: Sequence[str], after: Callable[[], object]) -> int:
    """Does what is left, all arms of a seed before the next; returns how many runs failed.

    Args:
        runs: what there is.
        arms: those to run.
        after: called after each run.
    """
    out, seeds = runs.out, runs.comparison.seeds
    write_json(out / COMPARISON, {**vars(runs.comparison), "common": runs.told.common})
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    left = [(arm, seed) for arm, seed in wanted if runs.record(arm, seed) is None]
    failed = 0
    broken: set[str] = set()
    with tqdm(total=len(wanted), initial=len(wanted) - len(left), unit="run") as bar:
        for arm in dict.fromkeys(arm for arm, _ in left):
            bar.set_postfix_str(f"{arm}: preparing")
            if not _ready(runs, arm, bar):
                broken.add(arm)
        for arm, seed in left:
            if arm in broken:
                failed += 1
            else:
                bar.set_postfix_str(f"{arm}, seed {seed}")
                chosen = runs.chosen(arm)
                rate = None if chosen is None else chosen["rate"]
                failed += not _done(runs.job("run", arm, seed, rate), bar)
            bar.update()
            after()
    return failed


def _done(job: Job, bar: "tqdm[Any]") -> bool:
    """Whether the work was done; says what failed."""
    error = carry_out(job)
    if error is not None:
        bar.write(f"failed: {job.label}: {error} ({job.folder / LOG})", file=sys.stderr)
    return error is None


def _ready(runs: Runs, arm: str, bar: "tqdm[Any]") -> bool:
    """Whether an arm's images are encoded, and its learning rate chosen if there are several."""
    first, *_ = runs.comparison.seeds
    if not _done(runs.job("prepare", arm, first), bar):
        return False
    return not runs.comparison.rates or _choose(runs, arm, bar)


def _choose(runs: Runs, arm: str, bar: "tqdm[Any]") -> bool:
    """Trains an arm with each learning rate and takes the best, whose run is the first seed's.

    A rate with which training diverges is no candidate; any other failure is the arm's.
    """
    first, folder = runs.comparison.seeds[0], runs.out / RATES / arm
    if runs.chosen(arm) is None:
        (folder / FAILED).unlink(missing_ok=True)
        scores: dict[str, float | None] = {}
        for rate in runs.comparison.rates:
            job = runs.job("train", arm, first, rate)
            bar.set_postfix_str(job.label)
            error = _tried(job)
            if error is not None and DIVERGED not in error:
                bar.write(f"failed: {job.label}: {error} ({job.folder / LOG})", file=sys.stderr)
                write_json(folder / FAILED, {"error": f"learning rate {rate:g}: {error}"})
                return False
            scores[repr(rate)] = None if error else _selected(_read(job.result), job.recipe)
        found = {rate: score for rate, score in scores.items() if score is not None}
        if not found:
            error = f"{DIVERGED} with each of rates"
            bar.write(f"failed: {arm}: {error}", file=sys.stderr)
            write_json(folder / FAILED, {"error": error})
            return False
        best = max(found, key=lambda rate: found[rate])
        told = {"rate": float(best), "scores": scores, "settings": settings_of(job.recipe)}
        write_json(folder / CHOSEN, told)
    _take_over(runs, arm)
    return True


def _tried(job: Job) -> str | None:
    """Trains with a learning rate where that is not done; returns None, or what went wrong."""
    done = _read(job.result)
    if done is not None:
        check_settings(job, done, job.folder)
    elif (error := carry_out(job)) is not None:
        return error
    if not _read(job.result)["validation"]:
        return "no evaluation to choose a rate by: see training.eval_steps and eval_delay"
    return None


def _selected(record: Mapping[str, Any], recipe: Recipe) -> float:
    """What a learning rate is chosen by, more being better."""
    found = record["validation"]
    return float(found["score"]) if recipe.select == "score" else -float(found["loss"])


def _take_over(runs: Runs, arm: str) -> None:
    """The run of the chosen rate is the first seed's; killed before, it is moved the next time."""
    chosen, first = runs.chosen(arm), runs.comparison.seeds[0]
    assert chosen is not None
    job, target = runs.job("train", arm, first, chosen["rate"]), runs.folder(arm, first)
    trained, tried = _read(job.result), job.folder
    if trained is not None and not target.exists() and _is_of(job, trained):
        target.parent.mkdir(parents=True, exist_ok=True)
        tried.rename(target)


def _is_of(job: Job, trained: Mapping[str, Any]) -> bool:
    """Whether what was trained is a job's: the first seed is another where one was put before."""
    return bool(trained["settings"]["training.seed"] == job.recipe.training["seed"])


def selection(runs: Runs, arms: Sequence[str] | None) -> list[str]:
    """The arms named, or all.

    Raises:
        ValueError: one that is not in the comparison.
    """
    known = list(runs.comparison.arms)
    for arm in arms or ():
        if arm not in known:
            raise ValueError(f"--arm {arm!r} is not in the comparison: {', '.join(known)}")
    return [arm for arm in known if not arms or arm in arms]
