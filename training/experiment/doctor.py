"""What is installed, what the GPU can do, and whether a recipe's models and data are there."""

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from fused_route import __version__
from fused_route.training.data.answers import read_vocabulary
from fused_route.training.data.samples import absent
from fused_route.training.experiment.packaged import LANGUAGES, TOWERS
from fused_route.training.experiment.recipe import Recipe, TaskRecipe

ROOM = 10 * 2**30  # bytes: pooled features of COCO and a few runs
# Extras of the package by what they are for.
EXTRAS = {"train": "training", "captions": "scores of captions", "peft": "per-task modules, PEFT"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: "ok", "note" (works, but for what it says) or "problem".
        what: the thing and what was found.
        fix: what to do about it.
    """

    state: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.what}{f'; {self.fix}' if self.fix else ''}"


def examine(recipe: Recipe | None = None) -> Iterator[Finding]:
    """Everything that training takes, one after the other; without a recipe the machine alone."""
    yield Finding("ok", f"Python {platform.python_version()}, fused-route {__version__}")
    yield from _packages()
    yield from _devices()
    yield _java()
    yield _disk(Path(recipe.cache) if recipe else Path())
    if recipe is not None:
        yield from _models(recipe)
        for name, task in recipe.tasks.items():
            yield from _data(name, task, recipe.model.kind)


def _packages() -> Iterator[Finding]:
    """The packages that the extras ask for, in the versions that they ask for."""
    for extra, what in EXTRAS.items():
        lacking = []
        for text in requires("fused-route") or []:
            wanted = Requirement(text)
            of_extra = wanted.marker is not None and wanted.marker.evaluate({"extra": extra})
            always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if wanted.name == "fused-route" or not (of_extra or always):
                continue
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                lacking.append(f"{wanted.name} is missing")
                continue
            if not wanted.specifier.contains(found, prereleases=True):
                lacking.append(f"{wanted.name} {found} is not {wanted.specifier}")
        fix = f"pip install 'fused-route[{extra}]'"
        told = f"packages for {what}"
        if lacking:
            state = "problem" if extra == "train" else "note"
            yield Finding(state, f"{told}: {', '.join(lacking)}", fix)
        else:
            yield Finding("ok", told)
    yield Finding("ok", f"torch {torch.__version__}, transformers {version('transformers')}")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = "no CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        yield Finding(
            "note", f"no GPU is visible (torch {built})",
            "training runs on the CPU with the reference in place of the kernels",
        )  # fmt: skip
        return
    for place in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(place), torch.cuda.mem_get_info(place)[1]
        major, minor = torch.cuda.get_device_capability(place)
        found = f"GPU {place}: {name}, {memory / 2**30:.0f} GiB, sm_{major}{minor}"
        if (major, minor) >= (8, 0) or torch.version.hip:
            yield Finding("ok", f"{found}: the kernels run")
        else:
            yield Finding("note", found, "the kernels need sm_80; the reference runs instead")
    try:
        yield Finding("ok", f"triton {version('triton')}")
    except PackageNotFoundError:
        yield Finding("problem", "triton is missing", "pip install triton")
    if torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        yield Finding(
            "note", f"{count} GPUs, of which a plain command uses one",
            f"torchrun --nproc-per-node {count} -m fused_route.training train …, "
            "or set CUDA_VISIBLE_DEVICES=0",
        )  # fmt: skip


def _java() -> Finding:
    if shutil.which("java"):
        return Finding("ok", "java: captions are cut into words as published scores are")
    return Finding(
        "note", "java is not found", "captions are scored without it by a regular expression, "
        "without METEOR: install a JRE for scores to compare (apt install default-jre-headless)",
    )  # fmt: skip


def _disk(folder: Path) -> Finding:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.0f} GiB free under {place}"
    if free >= ROOM:
        return Finding("ok", found)
    return Finding("note", found, "set cache to a larger disk")


def _models(recipe: Recipe) -> Iterator[Finding]:
    for part in ("vision", "language"):
        name = getattr(recipe.model, part)
        told = f"model.{part}={name}"
        if name in (TOWERS if part == "vision" else LANGUAGES):
            yield _packaged(told, name)
        elif (Path(name) / "config.json").is_file():
            yield Finding("ok", told)
        elif name.startswith(("/", ".", "~")) and not Path(name).exists():
            yield Finding("problem", f"{told} does not exist", "name a model's folder")
        elif Path(name).is_dir():
            yield Finding("problem", f"{told} is a folder without config.json", "name a model's")
        elif _in_hub_cache(name):
            yield Finding("ok", f"{told}, in the hub's cache")
        else:
            yield Finding(
                "note",
                f"{told} is not on this disk",
                f"training downloads it, or: hf download {name}",
            )


def _packaged(told: str, name: str) -> Finding:
    try:
        (TOWERS | LANGUAGES)[name]()
    except ValueError as error:
        return Finding("problem", f"{told}: {error}")
    return Finding("ok", told)


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _data(name: str, task: TaskRecipe, kind: str) -> Iterator[Finding]:
    """Every file that is missing, each once; a classifier's answers too."""
    splits: list[str | None] = [task.train, task.validation, task.test]
    if kind == "classifier" and task.answers is not None:
        yield _answers(name, Path(task.answers).expanduser())
    elif kind == "classifier" and task.answers_from in ("train", "validation", "test"):
        if getattr(task, task.answers_from) is None:
            told = f"tasks.{name}: answers_from={task.answers_from}"
            yield Finding("problem", f"{told}, but {task.answers_from} is null")
    elif kind == "classifier":
        splits.append(task.answers_from)
    said: set[str] = set()
    for split in dict.fromkeys(filter(None, splits)):
        told = f"tasks.{name}: {task.layout} {split}"
        try:
            lacking = absent(task.source, split)
        except ValueError as error:
            lacking = [str(error)]
        for line in lacking:
            if line not in said:
                yield Finding("problem", f"{told}: {line}")
        said.update(lacking)
        if not lacking:
            yield Finding("ok", told)


def _answers(name: str, path: Path) -> Finding:
    try:
        found = read_vocabulary(path)
    except ValueError as error:
        return Finding("problem", f"tasks.{name}.answers: {error}")
    return Finding("ok", f"tasks.{name}.answers={path}, {len(found)} of them")
