"""A recipe's file as written, with what YAML itself lets pass refused."""

import difflib
from collections.abc import Collection, Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from fused_route import RoutedConfig
from fused_route.training.experiment.recipe import ModelRecipe, Recipe, TaskRecipe

SECTIONS = ("model", "adapter", "tasks", "training")


class _Loader(yaml.SafeLoader):
    """Refuses keys that are there twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} is there twice, again in line {line}")
        return super().construct_mapping(node, deep)


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """The mapping that a file holds; `what` says what is in one.

    Raises:
        ValueError: no YAML, no mapping, or a key that is there twice.
    """
    try:
        written = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError, TypeError) as error:
        raise ValueError(f"{file} is no YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(written, dict):
        raise ValueError(f"{file} holds no mapping: {what}")
    return written


def read_tree(file: Path) -> dict[str, Any]:
    """The sections of a recipe's file, every key of which is known.

    Raises:
        ValueError: no YAML, no mapping, an empty section, or a key that is not known.
    """
    written = read_mapping(file, "a recipe has model, adapter, tasks, training")
    _known(f"{file}: ", written, Recipe)
    for name, of in (("model", ModelRecipe), ("adapter", RoutedConfig), ("training", None)):
        if name in written:
            section = _mapping(f"{file}: {name}", written[name])
            if of is not None:
                _known(f"{file}: {name}.", section, of)
    for task, section in _mapping(f"{file}: tasks", written.get("tasks", {})).items():
        if not isinstance(task, str) or not task.isidentifier():
            raise ValueError(f"{file}: tasks: a name is letters, digits and _, got {task!r}")
        _known(f"{file}: tasks.{task}.", _mapping(f"{file}: tasks.{task}", section), TaskRecipe)
    return written


def near(name: str, known: Collection[str]) -> str:
    """ "; did you mean …?", where something is close."""
    found = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _mapping(what: str, section: Any) -> Mapping[Any, Any]:
    if not isinstance(section, dict):
        raise ValueError(f"{what} must be a mapping of settings, got {section!r}")
    return section


def _known(where: str, section: Mapping[Any, Any], of: type) -> None:
    """Refuses keys that a section has not, and empty ones where a value is needed."""
    known = {field.name: str(field.type) for field in fields(of)}
    for key, value in section.items():
        if key not in known:
            raise ValueError(f"{where}{key} is no setting of a recipe{near(key, known)}")
        if value is None and "None" not in known[key] and key not in SECTIONS:
            raise ValueError(f"{where}{key} is empty: give a value, or leave it out")
