"""What is compared: a YAML file of arms, each the same recipe with other settings, and seeds.

recipe: easy-vqa
baseline: none
seeds: [0, 1, 2]
arms:
  none: {adapter.route: none}
  mul: {adapter.route: mul}
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from fused_route.checks import finite, shown, whole
from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.evaluation import is_withheld, tasks_with
from fused_route.training.experiment.folder import settings_of
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.recipe_file import named_settings, read_recipe
from fused_route.training.experiment.yaml_file import near, read_mapping

SHIPPED = Path(__file__).parent / "comparisons"
NAME = re.compile(r"\w[\w.+ -]*\w|\w")  # of an arm: the name of a folder too
# Settings that a comparison gives each run.
OWN = {"seed": "seeds", "output_dir": "--out", "out": "--out"}
RATE = "training.learning_rate"


@dataclass(frozen=True)
class Comparison:
    """Arms of one recipe over seeds.

    Attributes:
        recipe: a recipe's file, or the name of one that comes with the package.
        arms: by name, the settings of the recipe that make an arm, by their whole names or as on
            the command line ("adapter.route", "route").
        baseline: the arm that the others are compared with.
        seeds: `training.seed` of each run of an arm; the data order follows from it, so that it is
            the same for all arms.
        split: "validation" or "test" of the recipe, or a split of the layout: what is scored.
        overrides: settings of the recipe for all arms.
        rates: learning rates of which each arm takes the best on its validation split with the
            first seed; empty: the recipe's.

    Raises:
        ValueError: a value that is not accepted.
    """

    recipe: str
    arms: dict[str, dict[str, Any]]
    baseline: str = "none"
    seeds: tuple[int, ...] = (0,)
    split: str = "test"
    overrides: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("recipe", "baseline", "split"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a name, got {shown(getattr(self, name))}")
        _check_arms(self.arms, self.baseline)
        _settings("overrides", self.overrides)
        for name in ("seeds", "rates"):
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        if not self.seeds:
            raise ValueError("seeds is empty: name one at least")
        for seed in self.seeds:
            whole("seeds", seed, least=0)
        for rate in self.rates:
            if finite("rates", rate) <= 0.0:
                raise ValueError(f"rates must be greater than 0, got {shown(rate)}")
        if len(self.rates) == 1:
            raise ValueError(
                f"rates has one, {self.rates[0]:g}: name several, or set {RATE} in overrides"
            )
        changed = [name for name, told in self.arms.items() if RATE in map(_in_full, told)]
        if self.rates and changed:
            raise ValueError(f"arms: {changed[0]} sets {RATE}, which rates chooses: leave one out")


def _check_arms(arms: Any, baseline: str) -> None:
    if not isinstance(arms, dict) or len(arms) < 2:
        raise ValueError(f"arms must be a mapping of two names at least, got {shown(arms)}")
    for name, told in arms.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"arms: a name is letters, digits and _ . + - within, got {shown(name)}"
            )
        _settings(f"arms: {name}", told)
        if "data_seed" in {setting.rpartition(".")[2] for setting in told}:
            raise ValueError(f"arms: {name} sets data_seed, the order of all arms: use overrides")
    if len({name.lower() for name in arms}) < len(arms):
        raise ValueError("arms: two names differ in upper and lower case alone")
    if baseline not in arms:
        raise ValueError(f"baseline must be one of the arms {', '.join(arms)}; got {baseline!r}")


def _settings(where: str, told: Any) -> None:
    if not isinstance(told, dict) or not all(isinstance(name, str) and name for name in told):
        raise ValueError(
            f"{where} must be a mapping of settings, {{adapter.route: mul}} for one, "
            f"got {shown(told)}"
        )
    for name in told:
        _refuse_own(where, name)


def _refuse_own(where: str, name: str) -> None:
    last = name.removeprefix("training.").replace("-", "_")
    if last in OWN:
        raise ValueError(f"{where}: {name} is each run's own: use {OWN[last]}")


def _several(name: str, given: Any) -> tuple[Any, ...]:
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{name} must be a list of numbers, got {shown(given)}")
    for place, value in enumerate(given):
        if value in given[:place]:
            raise ValueError(f"{name} has {shown(value)} twice")
    return tuple(map(_number, given))


def _number(given: Any) -> Any:
    """As meant: YAML reads 1e-3 as text."""
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _in_full(name: str) -> str:
    return RATE if name in ("lr", "learning_rate") else name


def read_comparison(path: Path | str) -> Comparison:
    """The comparison of a file, or of a name that comes with the package.

    A recipe's relative path is looked for beside the file first.

    Raises:
        ValueError: no such file or key, or a value that is not accepted.
    """
    file = _file(path)
    told = read_mapping(file, f"a comparison has {', '.join(f.name for f in fields(Comparison))}")
    known = {f.name for f in fields(Comparison)}
    for key in told:
        if key not in known:
            raise ValueError(f"{file}: {key} is no key of a comparison{near(key, known)}")
    for key in ("recipe", "arms"):
        if key not in told:
            raise ValueError(f"{file}: {key} is missing")
    try:
        made = Comparison(**told)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    beside = file.parent / made.recipe
    return replace(made, recipe=str(beside)) if beside.is_file() else made


def shipped() -> list[str]:
    """Names of the comparisons that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def _file(path: Path | str) -> Path:
    for file in (Path(path), SHIPPED / f"{path}.yaml"):
        if file.is_file():
            return file
    raise ValueError(
        f"comparison {str(path)!r} is no file, and no name of a comparison that comes with the "
        f"package: {', '.join(shipped())}"
    )


def recipes(comparison: Comparison, told: Sequence[str] = ()) -> dict[str, Recipe]:
    """Each arm's recipe: the file, the overrides, those of the command line, the arm's settings.

    Raises:
        ValueError: a setting that is not accepted, or a split that cannot be scored.
    """
    for item in told:
        if item.startswith("--"):
            _refuse_own("a comparison", item[2:].partition("=")[0])
    found = {}
    for name, settings in comparison.arms.items():
        overrides = [*_as_told(comparison.overrides), *told, *_as_told(settings)]
        try:
            recipe = read_recipe(comparison.recipe, overrides)
            _check_split(recipe, comparison)
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from None
        found[name] = recipe
    return found


class Told(NamedTuple):
    """Settings that differ from the recipe's file, by their whole names, as they are used.

    Attributes:
        common: those that the overrides or the command line give all arms alike.
        own: of each arm, its own and those in which arms differ.
    """

    common: dict[str, Any]
    own: dict[str, dict[str, Any]]


def told_settings(
    comparison: Comparison, made: Mapping[str, Recipe], line: Sequence[str] = ()
) -> Told:
    """What is set beside the recipe's file, of the recipes that came of it and the command line."""
    used = {arm: settings_of(recipe) for arm, recipe in made.items()}
    every = list(dict.fromkeys(name for settings in used.values() for name in settings))

    def leaves(overrides: Sequence[str]) -> list[str]:
        names = named_settings(comparison.recipe, overrides)
        within = (x for n in names for x in every if x == n or x.startswith(f"{n}."))
        return [x for x in within if x != RATE or not comparison.rates]

    given = leaves([*_as_told(comparison.overrides), *line])
    values = used[comparison.baseline]
    common = {
        name: values.get(name)
        for name in given
        if all(settings.get(name) == values.get(name) for settings in used.values())
    }
    own = {}
    for arm, settings in comparison.arms.items():
        names = dict.fromkeys([*leaves(_as_told(settings)), *(n for n in given if n not in common)])
        own[arm] = {name: used[arm].get(name) for name in names}
    return Told(common, own)


def _check_split(recipe: Recipe, comparison: Comparison) -> None:
    """ValueError where the split has no answers, or rates have no split to be chosen by."""
    for task in tasks_with(recipe, comparison.split):
        if is_withheld(recipe, task, comparison.split):
            raise ValueError(f"split={comparison.split!r} of tasks.{task} has no answers to score")
    if not comparison.rates:
        return
    if not any(task.validation for task in recipe.tasks.values()):
        raise ValueError("rates needs a validation split to choose by: set tasks.….validation")
    if arguments_of(recipe, validated=True).eval_strategy == "no":
        raise ValueError(
            "rates needs evaluations to choose by: neither training.eval_strategy nor "
            "training.save_strategy may be 'no'"
        )


def _as_told(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line has them."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]


def with_training(recipe: Recipe, **settings: Any) -> Recipe:
    """A recipe with other arguments of the Trainer."""
    return replace(recipe, training=recipe.training | settings)
