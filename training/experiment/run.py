"""Training a recipe, and scoring what came of it."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from fused_route.training.data.answers import read_vocabulary, vocabulary
from fused_route.training.data.layouts import LAYOUTS, splits_of
from fused_route.training.experiment.arguments import arguments_of, refuse_not_done
from fused_route.training.experiment.begun import (
    BEGUN,
    begun,
    read_json,
    refuse_other,
    refuse_other_answers,
    refuse_other_features,
)
from fused_route.training.experiment.build import Built, build, parameters
from fused_route.training.experiment.cutting import say_cut
from fused_route.training.experiment.folder import (
    ANSWERS,
    BEST,
    LAST,
    alone_in,
    anchored,
    check_folder,
    last_checkpoint,
    losses_before,
    step_of,
    write_json,
    write_recipe,
)
from fused_route.training.experiment.projecting import start_projector
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.tasks import TASKS, Rows, open_rows
from fused_route.training.experiment.trainer import (
    UNDECAYED,
    ExperimentTrainer,
    refuse_not_finite,
)
from fused_route.training.feature_cache import Encoded

SCORES = "scores.json"
HISTORY = "history.json"
FEW = 1000  # images that are encoded before worker processes have started
WORKERS = 8  # processes that read images, at most


@dataclass(frozen=True)
class Data:
    """What a recipe trains on and selects by.

    Attributes:
        train: rows to train on.
        validation: rows to select by, of the tasks that have a validation split: to answer for
            scores, with their answers for the loss; None without any.
        answers: those that a classifier chooses among.
    """

    train: Rows
    validation: Rows | None
    answers: tuple[str, ...]

    def images(self) -> list[Path]:
        """Every image once."""
        rows = [self.train] if self.validation is None else [self.train, self.validation]
        return list(dict.fromkeys(path for some in rows for path in some.images()))

    def readable(self, built: Built) -> "Data":
        """The data whose images have features, as of `readable`."""
        rest = None if self.validation is None else readable(built, self.validation)
        return Data(readable(built, self.train), rest, self.answers)


def open_data(recipe: Recipe) -> Data:
    """The rows of a recipe's training and validation splits, and its answers.

    Raises:
        ValueError: data that cannot be used.
    """
    names = [name for name, task in recipe.tasks.items() if task.validation is not None]
    for name, task in recipe.tasks.items():
        for split in filter(None, (task.train, task.validation)):
            if any(part.answers == "withheld" for part in splits_of(task.layout, split).values()):
                raise ValueError(f"tasks.{name}: split {split!r} has no answers to learn or score")
    role = "evaluate" if recipe.select == "score" else "train"
    train = open_rows(recipe, "train", "train")
    validation = open_rows(recipe, "validation", role, names) if names else None
    return Data(train, validation, answers_of(recipe, train))


def answers_of(recipe: Recipe, train: Rows) -> tuple[str, ...]:
    """The answers that a classifier chooses among: of its file, or those frequent enough."""
    if recipe.model.kind != "classifier":
        return ()
    ((name, task),) = recipe.tasks.items()
    if task.answers is not None:
        return tuple(read_vocabulary(Path(task.answers)))
    split = task.answers_from or task.split("train")
    rows = train if task.answers_from is None else open_rows(recipe, split, "train")
    form = TASKS[LAYOUTS[task.layout].task].form
    found = vocabulary(rows.samples[name].rows, task.least, form)
    if len(found) < 2:
        raise ValueError(
            f"tasks.{name}: {found[0]!r} alone occurs in at least {task.least} questions of "
            f"{split!r}, a classifier needs two answers: lower least"
        )
    return tuple(found)


def train(recipe: Recipe) -> Path:
    """Trains a recipe, or goes on where a run of it stopped; returns the folder of the run.

    In the folder: recipe.yaml; begun.json, what it goes on with; checkpoints; best/ (by the
    validation splits, if there are any) and last/, each an adapter with all that `fused-route eval`
    and `predict` need; history.json, what was logged along the way; scores.json, the last to be
    written; TensorBoard's files.

    Raises:
        ValueError: data, models or settings that cannot be used, or a folder with another run.
    """
    recipe = anchored(recipe)
    folder = Path(recipe.training["output_dir"])
    check_folder(folder, recipe)
    if _is_finished(folder):
        print(f"{folder} is finished already: for another run name another --out", file=sys.stderr)
        return folder
    validated = any(task.validation is not None for task in recipe.tasks.values())
    refuse_not_done(recipe)
    arguments = arguments_of(recipe, validated=validated)
    seed(arguments)
    data = open_data(recipe)
    built = build(recipe, data.answers)
    say_cut(built.batches(), data.train)
    data, beginning = _began(recipe, folder, built, data, arguments.world_size)
    start_projector(built, data.train.images())
    lock = alone_in(folder) if arguments.should_save else nullcontext()
    with lock:
        if arguments.should_save:
            _check_again(folder, recipe, beginning, data.answers)
            write_recipe(recipe, folder)  # before other files: a folder without is somebody else's
            if last_checkpoint(folder) is None:
                write_json(folder / BEGUN, beginning)
        _run(recipe, arguments, data, built, folder)
    return folder


def _is_finished(folder: Path) -> bool:
    return (folder / SCORES).is_file()


def _check_again(
    folder: Path, recipe: Recipe, beginning: Mapping[str, Any], answers: Sequence[str]
) -> None:
    """ValueError where another run has been in the folder while this one encoded images."""
    check_folder(folder, recipe)
    refuse_changed(folder, beginning, answers)
    if _is_finished(folder):
        raise ValueError(f"{folder} was finished by another process meanwhile: see its {SCORES}")


def _began(
    recipe: Recipe, folder: Path, built: Built, data: Data, processes: int
) -> tuple[Data, dict[str, Any]]:
    """Encodes; returns what can be trained on, and what the run depends on: that of before.

    Raises:
        ValueError: another, before images are encoded where that does not decide about rows.
    """
    if recipe.broken == "skip":
        encode(built, data.images())
        data = data.readable(built)
    now = begun(built.models, data.train, data.validation, processes)
    refuse_changed(folder, now, data.answers)
    if recipe.broken != "skip":
        encode(built, data.images())
    cache = built.cache
    now["features"] = None if cache is None else cache.dtypes_of(data.images())
    now["undecayed"] = list(UNDECAYED)
    if last_checkpoint(folder) is not None:
        refuse_other_features(folder, now["features"])
    return data, now


def refuse_changed(folder: Path, now: Mapping[str, Any], answers: Sequence[str]) -> None:
    """ValueError where a run that has a checkpoint was begun with something else, see `begun`."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        refuse_other(folder, now)
        refuse_other_answers(folder, checkpoint / ANSWERS, answers)


def _run(
    recipe: Recipe, arguments: TrainingArguments, data: Data, built: Built, folder: Path
) -> None:
    trainer = ExperimentTrainer(built, arguments, data.train, data.validation, _callbacks(recipe))
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and arguments.should_save:
        print(f"resuming from {checkpoint}", file=sys.stderr)
    trainer.before = losses_before(checkpoint)
    if checkpoint is not None:  # with the groups of parameters that its optimiser has
        trainer.undecayed = tuple(read_json(folder / BEGUN).get("undecayed", ()))
    done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    resumed = 0 if checkpoint is None else step_of(checkpoint)
    if resumed == trainer.state.global_step and _lacks_evaluation(trainer):
        trainer.evaluate()
    if arguments.should_save:
        write_json(folder / HISTORY, _history(trainer, resumed))
    _finish(trainer, folder, done.metrics)


def _lacks_evaluation(trainer: ExperimentTrainer) -> bool:
    """Whether a run was killed between its last step and the evaluation of the epoch's end."""
    arguments, state = trainer.args, trainer.state
    is_due = arguments.eval_strategy == IntervalStrategy.EPOCH and trainer.eval_dataset is not None
    is_due = is_due and arguments.eval_delay <= (state.epoch or 0.0)
    logged = (log for log in state.log_history if log["step"] == state.global_step)
    return is_due and not any("eval_runtime" in log for log in logged)


def _history(trainer: ExperimentTrainer, resumed: int) -> dict[str, Any]:
    """What a run amounts to, beside its scores."""
    arguments, names = trainer.args, trainer.built.recipe.tasks
    default = arguments.per_device_train_batch_size
    per_device = {name: task.batch_size or default for name, task in names.items()}
    times = arguments.gradient_accumulation_steps * arguments.world_size
    return {
        "trainable": parameters(trainer.built.model)[0],
        "steps": trainer.state.global_step,
        "resumed_at": resumed,
        "batch": {name: size * times for name, size in per_device.items()},
        "log": trainer.state.log_history,
    }


def _finish(trainer: ExperimentTrainer, folder: Path, metrics: dict[str, float]) -> None:
    """The best and the last adapter, and the scores that the best had.

    Raises:
        ValueError: weights that are not finite.
    """
    refuse_not_finite(trainer.built.model)
    state, best = trainer.state, trainer.state.best_model_checkpoint
    chosen = best is not None and trainer.args.load_best_model_at_end
    step = step_of(Path(best)) if chosen else state.global_step  # of the weights that are there
    logged = [log for log in trainer.state.log_history if log["step"] == step]
    metrics_of = {name: value for log in logged for name, value in log.items()}
    scores = {
        name.removeprefix("eval_"): value
        for name, value in metrics_of.items()
        if name.startswith("eval_") and name != "eval_runtime"
    }
    total, steps = trainer.summed()  # of all: the Trainer's own forgets those before a resume
    metrics = {**metrics, "train_loss": total / max(steps, 1)}
    trainer.save_model(str(folder / (BEST if chosen else LAST)))
    if trainer.args.should_save:
        write_json(folder / SCORES, {"validation": scores, "training": metrics})


def _callbacks(recipe: Recipe) -> list[TrainerCallback]:
    return [] if recipe.patience is None else [EarlyStoppingCallback(recipe.patience)]


def seed(arguments: TrainingArguments) -> None:
    """Seeds everything before anything is drawn, the trained layers' first values included."""
    if arguments.full_determinism:
        enable_full_determinism(arguments.seed)
    else:
        set_seed(arguments.seed)


def readable(built: Built, rows: Rows) -> Rows:
    """Without those about images that encoding skipped, where broken ones are."""
    if built.cache is None or built.recipe.broken != "skip":
        return rows
    lacking = built.cache.missing(rows.images(), broken="skip")
    return rows.without(lacking) if lacking else rows


def encode(built: Built, images: list[Path], **how: Any) -> Encoded | None:
    """Encodes what the cache lacks of these images; processes share the work and wait.

    Args:
        how: batch_size, workers and dtype, as in `FeatureCache.encode`.

    Returns:
        What this process did; None where the tower runs in every step.
    """
    state, done = PartialState(), None
    if built.cache is not None:
        workers = min(WORKERS, os.cpu_count() or 1) if len(images) > FEW else 0
        built.tower.to(state.device)
        done = built.cache.encode(
            built.encoder, images, broken=built.recipe.broken, **{"workers": workers, **how}
        )
        built.tower.to("cpu")
    state.wait_for_everyone()
    return done
