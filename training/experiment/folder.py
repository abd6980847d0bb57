"""The folder of a run: its recipe, checkpoints, the best and the last adapter, scores."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fused_route.checks import shown
from fused_route.training.data.answers import read_vocabulary, write_vocabulary
from fused_route.training.experiment.build import Built, build
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.recipe_file import read_recipe
from fused_route.training.files import atomic_file

RECIPE, ANSWERS, COMPLETE = "recipe.yaml", "answers.json", "complete"
LAST, BEST = "last", "best"


def save(built: Built, folder: Path) -> None:
    """Writes what is trained, with the recipe and the answers: all that `open_run` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    built.tuned.save(folder)
    write_recipe(built.recipe, folder)
    if built.answers:
        write_vocabulary(folder / ANSWERS, list(built.answers))


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """recipe.yaml, whole or not at all."""
    with atomic_file(folder / RECIPE) as file:
        file.write(recipe.to_yaml().encode())


def write_json(path: Path, value: Any) -> None:
    """A file for people and programs, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def adapter_folder(run: Path) -> Path:
    """The folder with the adapter: the run's best, else its last, or the folder given.

    Raises:
        ValueError: there is none.
    """
    for folder in (run / BEST, run / LAST, run):
        if (folder / RECIPE).is_file() and any(folder.rglob("*.safetensors")):
            return folder
    raise ValueError(
        f"{run} holds no adapter with a {RECIPE}: give the folder of a run of `fused-route train`"
        if run.is_dir()
        else f"{run} is no folder: give that of a run of `fused-route train`, or an adapter in it"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of `fused-route train`, or of an adapter in one."""
    return any((place / RECIPE).is_file() for place in (folder, folder / BEST, folder / LAST))


def open_run(run: Path, overrides: Sequence[str] = (), *, features_from: str = "cache") -> Built:
    """The trained model of a run.

    Args:
        run: its folder, or that of an adapter in it.
        overrides: settings of its recipe, such as where data are now.
        features_from: as in `Recipe`, for images that are asked about alone.

    Raises:
        ValueError: no run, or an adapter that does not fit its recipe.
    """
    folder = adapter_folder(run)
    recipe = replace(
        read_recipe(folder / RECIPE, overrides), features_from=features_from, augmentation="none"
    )
    answers = read_vocabulary(folder / ANSWERS) if (folder / ANSWERS).is_file() else []
    built = build(recipe, answers)
    built.tuned.load(folder)
    built.model.eval()
    return built


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder in which something else is than this very run.

    Raises:
        ValueError: other files, or another recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"training.output_dir={str(folder)!r} is a file")
    path = folder / RECIPE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"training.output_dir={str(folder)!r} holds other files: name a new or empty folder"
            )
        return
    theirs, ours = (flat(yaml.safe_load(text)) for text in (path.read_text(), recipe.to_yaml()))
    different = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    if different:
        name = different[0]
        raise ValueError(
            f"{folder} is a run of another recipe ({name} is {shown(theirs.get(name))} there, "
            f"{shown(ours.get(name))} here): name another folder with --out"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
