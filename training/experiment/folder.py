"""The folder of a run: its recipe, checkpoints, the best and the last adapter, scores."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fused_route.checks import shown
from fused_route.training.data.answers import read_vocabulary, write_vocabulary
from fused_route.training.experiment.begun import BEGUN, read_json, refuse_other_models
from fused_route.training.experiment.build import Built, build
from fused_route.training.experiment.recipe import Recipe, default
from fused_route.training.experiment.recipe_file import read_recipe
from fused_route.training.experiment.yaml_file import read_tree
from fused_route.training.files import PARTIAL, atomic_file

RECIPE, ANSWERS, COMPLETE = "recipe.yaml", "answers.json", "complete"
MODELS = "models.json"  # digests of the frozen models that an adapter belongs to
LOSSES = "losses.json"  # of a checkpoint: the sum of the steps' losses so far, and their number
LAST, BEST = "last", "best"
LOCK = ".lock"


def save(built: Built, folder: Path) -> None:
    """Writes what is trained, with the recipe and the answers: all that `open_run` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    built.tuned.save(folder)
    write_recipe(built.recipe, folder)
    write_json(folder / MODELS, built.models)
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


def write_compact(path: Path, value: Any) -> None:
    """A large file for programs, whole or not at all."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    with atomic_file(path) as file:
        file.write((text + "\n").encode())


def adapter_folder(run: Path) -> Path:
    """The folder with the adapter: the run's best, else its last, or the folder given.

    Raises:
        ValueError: there is none.
    """
    for folder in (run / BEST, run / LAST, run):
        if _has_adapter(folder):
            return folder
    raise ValueError(
        f"{run} holds no adapter with a {RECIPE}: give the folder of a run of `fused-route train`"
        if run.is_dir()
        else f"{run} is no folder: give that of a run of `fused-route train`, or an adapter in it"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of `fused-route train`, or of an adapter in one."""
    return any(_has_adapter(place) for place in (folder / BEST, folder / LAST, folder))


def _has_adapter(folder: Path) -> bool:
    """Whether a folder is itself one of an adapter, or of an adapter for each task."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/adapter_model.safetensors")]
    of_run = ("checkpoint-", BEST, LAST)
    own = [f for f in files if f.parent == folder or not f.parent.name.startswith(of_run)]
    return (folder / RECIPE).is_file() and bool(own)


def open_run(
    run: Path, overrides: Sequence[str] = (), *, features_from: str | None = None
) -> Built:
    """The trained model of a run.

    Args:
        run: its folder, or that of an adapter in it.
        overrides: settings of its recipe, such as where data are now.
        features_from: as in `Recipe`, for images that are asked about alone; None: the recipe's.

    Raises:
        ValueError: no run, or an adapter that does not fit its recipe.
    """
    folder = adapter_folder(run)
    trained, recipe = read_recipe(folder / RECIPE), read_recipe(folder / RECIPE, overrides)
    _refuse_other_function(trained, recipe)
    source = recipe.features_from if features_from is None else features_from
    # The projector's values come from the file: there is nothing to start it by.
    recipe = replace(recipe, augmentation="none", features_from=source, projector_init="random")
    if recipe.model.kind == "classifier" and not (folder / ANSWERS).is_file():
        raise ValueError(f"{folder / ANSWERS} is missing: what the classes mean is in it")
    answers = read_vocabulary(folder / ANSWERS) if (folder / ANSWERS).is_file() else []
    built = build(recipe, answers)
    refuse_other_models(folder, read_json(folder / MODELS), built.models)
    built.tuned.load(folder)
    built.model.eval()
    return built


def _refuse_other_function(trained: Recipe, told: Recipe) -> None:
    """ValueError where overrides would make another function of what was trained."""
    theirs, ours = (settings_of(anchored(r)) for r in (trained, told))
    for name in theirs:
        if CLASSES.fullmatch(name) and theirs[name] != ours.get(name):
            raise ValueError(
                f"--{name}={shown(ours.get(name))}: the run answers with the classes that it was "
                f"trained with, of its {ANSWERS}; leave it out"
            )
        fixed = name.startswith(("model.", "adapter.")) or name in ("method", "modules", "compat")
        if fixed and theirs[name] != ours.get(name) and not PLACES.fullmatch(name):
            raise ValueError(
                f"--{name}={shown(ours.get(name))}: the run was trained with "
                f"{shown(theirs[name])}, with another it is another function; leave it out"
            )


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths to what is there, so that a run can be used from anywhere."""

    def absolute(name: str | None) -> str | None:
        path = None if name is None else Path(name).expanduser()
        return name if path is None or not path.exists() else str(path.absolute())

    tasks = {
        name: replace(
            task,
            root=absolute(task.root),
            images=absolute(task.images),
            answers=absolute(task.answers),
        )
        for name, task in recipe.tasks.items()
    }
    vision, language = absolute(recipe.model.vision), absolute(recipe.model.language)
    assert vision is not None and language is not None
    model = replace(recipe.model, vision=vision, language=language)
    cache = str(Path(recipe.cache).expanduser().absolute())
    return replace(recipe, tasks=tasks, model=model, cache=cache)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """For the time of a block no other run is in a folder.

    Raises:
        ValueError: one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"a run is going on in {folder}: wait for it, or name another") from None
    try:
        yield
    finally:
        lock.release()


# Settings that may differ when a run goes on: where things are, and what is shown.
PLACES = re.compile(
    r"cache|model\.(vision|language)|tasks\.\w+\.(root|images|answers)"
    r"|training\.(output_dir|disable_tqdm|report_to|logging_steps|dataloader_num_workers"
    r"|dataloader_prefetch_factor)"
)


# Arguments that are refused now and did nothing before.
NEVER_DONE = ("training.dataloader_drop_last", "training.auto_find_batch_size")
# What the classes of a classifier are made from, which stay those of training.
CLASSES = re.compile(r"tasks\.\w+\.(answers|answers_from|least)")


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder in which something else is than this very run.

    Raises:
        ValueError: other files, another recipe, or a folder that cannot be made.
    """
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with TemporaryDirectory(dir=parent, prefix=".", suffix=PARTIAL):
            pass
    except OSError:
        what = "cannot be written to" if parent.is_dir() else "is a file"
        raise ValueError(f"training.output_dir={str(folder)!r}: {parent} {what}") from None
    path = folder / RECIPE
    if not path.is_file():
        cache = Path(recipe.cache).expanduser().absolute()
        own = {cache, *cache.parents}  # it may lie in the folder
        found = folder.absolute().iterdir() if folder.is_dir() else ()
        if any(not _is_own(path.name) and path not in own for path in found):
            raise ValueError(
                f"training.output_dir={str(folder)!r} holds other files: name a new or empty folder"
            )
        return
    if last_checkpoint(folder) is None and not is_run(folder):
        return  # a run that never came to its first checkpoint
    theirs, ours = flat(read_tree(path)), settings_of(recipe)
    every = theirs.keys() | ours.keys()
    different = sorted(k for k in every if theirs.get(k, default(k)) != ours.get(k, default(k)))
    different = [n for n in different if not PLACES.fullmatch(n) and n not in NEVER_DONE]
    if different:
        name = different[0]
        raise ValueError(
            f"{folder} is a run of another recipe ({name} is {shown(theirs.get(name))} there, "
            f"{shown(ours.get(name))} here): name another folder with --out"
        )


def _is_own(name: str) -> bool:
    """Whether a file is what a run leaves that was killed before its recipe was written."""
    return name in (LOCK, BEGUN) or (name.startswith(".") and name.endswith(PARTIAL))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """All settings by dotted names."""
    found: dict[str, Any] = flat(yaml.safe_load(recipe.to_yaml()))
    return found


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
    return max(_complete(folder), key=step_of, default=None)


def keep_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Takes older checkpoints away: the last `limit` stay, and the best, as its name says.

    What is being taken away counts as incomplete first: a run that is killed meanwhile passes it.
    """
    complete = sorted(_complete(folder), key=step_of)
    kept = {path.name for path in (complete if limit is None else complete[-limit:])} | {best}
    for path in complete:
        if path.name not in kept:
            (path / COMPLETE).unlink()
            shutil.rmtree(path)


def losses_before(checkpoint: Path | None) -> tuple[float, float]:
    """(sum of losses in front of a checkpoint, number of its steps that have none there).

    Of checkpoints that are older than the record: of the steps whose losses were logged.
    """
    if checkpoint is None:
        return 0.0, 0
    if (checkpoint / LOSSES).is_file():
        total, steps = json.loads((checkpoint / LOSSES).read_text(encoding="utf-8"))
        return float(total), step_of(checkpoint) - float(steps)
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    total, last = 0.0, 0
    for line in state["log_history"]:
        if "loss" in line:
            total, last = total + line["loss"] * (line["step"] - last), line["step"]
    return total, step_of(checkpoint) - last


def _complete(folder: Path) -> list[Path]:
    found = (path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}"))
    numbered = (path for path in found if path.name.removeprefix("checkpoint-").isdecimal())
    return [path for path in numbered if _is_whole(path)]


def _is_whole(checkpoint: Path) -> bool:
    """Whether nothing of it is empty, as after a full disk, or without its end."""
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != COMPLETE]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(path.stat().st_size for path in files)


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
