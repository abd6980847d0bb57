"""Reading a recipe: a YAML file, then what the command line says otherwise."""

import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fused_route import RoutedConfig
from fused_route.training.experiment.arguments import checked, training_names
from fused_route.training.experiment.recipe import ModelRecipe, Recipe, TaskRecipe
from fused_route.training.experiment.yaml_file import near, read_tree
from fused_route.training.packages import missing

SHIPPED = Path(__file__).parent / "recipes"
SEED = 42
SHORT = {
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "out": "training.output_dir",
    "rank": "adapter.r",
}


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file.

    Args:
        path: a YAML file, or the name of one that comes with the package, such as
            vqa-roberta-base-lora.
        overrides: of the command line, `--route gram` or `--adapter.route=gram`: the whole name of
            a setting, or its last part where that names one alone. See `SHORT` for other names.

    Raises:
        ValueError: no such file or setting, a value that is not accepted, or no YAML.
    """
    try:
        from jsonargparse import ArgumentError, ArgumentParser
    except ImportError:
        raise missing("jsonargparse") from None
    file = _file(path)
    tree = read_tree(file)
    names = _settings(list(tree.get("tasks", {})))
    parser = ArgumentParser(prog="fused-route", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe, nested_key=None)
    try:
        told = parser.parse_args(["--config", str(file), *_qualified(overrides, names)])
        made = parser.instantiate(told)
        settings = {f.name: made[f.name] for f in fields(Recipe)}
        defaults = {"output_dir": f"runs/{file.stem}", "seed": SEED}
        recipe = Recipe(**{**settings, "training": defaults | settings["training"]})
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{file}: {_one_line(str(error))}") from None
    try:
        checked(recipe.training, recipe.model.kind)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return recipe


def named_settings(path: Path | str, overrides: Sequence[str]) -> list[str]:
    """What `overrides` of a recipe, as of `read_recipe`, set: whole names, each once.

    Raises:
        ValueError: no such file or setting.
    """
    names = _settings(list(read_tree(_file(path)).get("tasks", {})))
    options = (item for item in _qualified(overrides, names) if item.startswith("--"))
    return list(dict.fromkeys(item[2:].partition("=")[0] for item in options))


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def _file(path: Path | str) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    of_package = SHIPPED / f"{path}.yaml"
    if of_package.is_file():
        return of_package
    raise ValueError(
        f"recipe {str(path)!r} is no file, and no name of a recipe that comes with the package: "
        f"{', '.join(shipped())}"
    )


def _settings(tasks: list[str]) -> list[str]:
    """Every setting by its whole name."""
    sections: dict[str, Any] = {"model": ModelRecipe, "adapter": RoutedConfig}
    named = [f"{section}.{f.name}" for section, of in sections.items() for f in fields(of)]
    named += [f"tasks.{task}.{f.name}" for task in tasks for f in fields(TaskRecipe)]
    named += [f"training.{name}" for name in sorted(training_names())]
    return named + [f.name for f in fields(Recipe)]


def _qualified(overrides: Sequence[str], names: Sequence[str]) -> list[str]:
    """Overrides by the whole names of what they set."""
    for item, after in pairwise([*overrides, "--"]):
        if item.startswith("--") and "=" not in item and after.startswith("--"):
            raise ValueError(f"{item} is {_whole(item[2:], names)} without a value")
    return [
        re.sub(r"^--([^=]*)", lambda m: f"--{_whole(m[1], names)}", item)
        if item.startswith("--")
        else item
        for item in overrides
    ]


def _whole(given: str, names: Sequence[str]) -> str:
    name = SHORT.get(given, given.replace("-", "_"))
    if name in names:
        return name
    found = [full for full in names if full.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"--{given} is one of several: say {', '.join(f'--{n}' for n in found)}")
    known = {*names, *SHORT} if "." in given else {n.rpartition(".")[2] for n in names} | {*SHORT}
    close = (
        near(name, known | {"dry_run"}).replace("mean ", "mean --").replace("dry_run", "dry-run")
    )
    raise ValueError(f"--{given} is no setting of a recipe{close}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
