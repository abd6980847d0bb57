"""The `training` section of a recipe: arguments of the Trainer, looked at beforehand."""

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.devices import one_gpu
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.tasks import TASKS
from fused_route.training.experiment.yaml_file import near

# Least values of numbers that TrainingArguments takes any of.
LEAST = {
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "adam_epsilon": 0.0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")
# Arguments of scripts that this command has other ways for, or that would break its own.
OTHERWISE = {
    "resume_from_checkpoint": "a run goes on by itself",
    "remove_unused_columns": "batches are made whole",
    "do_train": "use `fused-route train`",
    "do_eval": "use `fused-route eval`",
    "do_predict": "use `fused-route eval`",
    "push_to_hub": "push the adapter's folder yourself",
    "metric_for_best_model": "set select to score or loss",
    "greater_is_better": "set select to score or loss",
}
# What would be taken and not done, or make a run that cannot go on, where it is turned on.
NOT_DONE = {
    "save_only_model": "a run could not go on from such checkpoints",
    "dataloader_drop_last": "every row is trained on, the last batch is smaller",
    "auto_find_batch_size": "set per_device_train_batch_size and gradient_accumulation_steps",
}


@cache
def training_names() -> frozenset[str]:
    """Arguments of transformers.TrainingArguments."""
    return frozenset(f.name for f in fields(TrainingArguments))


def checked(training: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The section with YAML's false for "no" put right.

    Raises:
        ValueError: an unknown name, a value of another type, or one that makes no sense.
    """
    hints = get_type_hints(TrainingArguments)
    found = dict(training)
    for name, value in training.items():
        if name not in training_names():
            raise ValueError(
                f"training.{name} is no argument of TrainingArguments{near(name, training_names())}"
            )
        if name in OTHERWISE:
            raise ValueError(f"training.{name}: {OTHERWISE[name]}; leave it out")
        if name in STRATEGIES and value is False:  # what YAML reads in "no"
            found[name] = "no"
            continue
        _check(name, value, hints[name])
    for name in ("output_dir", "seed"):
        if name in found and found[name] in (None, ""):
            raise ValueError(f"training.{name} must be given, got {found[name]!r}")
    if found.get("max_steps", -1) == 0 or found.get("num_train_epochs", 1) <= 0:
        raise ValueError("training: max_steps and num_train_epochs must be greater than 0")
    if found.get("label_smoothing_factor") and kind != "decoder":
        raise ValueError(
            f"training.label_smoothing_factor has no meaning for kind={kind!r}, whose losses have "
            "soft targets or weights"
        )
    return found


def arguments_of(recipe: Recipe, *, validated: bool) -> TrainingArguments:
    """The Trainer's arguments: the recipe's, and what follows from it where it does not say.

    bf16 where a GPU has it, TensorBoard, the best and the last checkpoint; one GPU a process.

    Raises:
        ValueError: what TrainingArguments refuses, or what nothing would come of.
    """
    on_gpu = torch.cuda.is_available()
    given = checked(recipe.training, recipe.model.kind)
    defaults: dict[str, Any] = {
        "report_to": ["tensorboard"],
        "remove_unused_columns": False,
        "logging_steps": 50,
        "save_strategy": _saved(given.get("eval_strategy") if validated else None),
        "save_total_limit": 2,
        "disable_tqdm": False,
        "restore_callback_states_from_checkpoint": True,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": recipe.modules == "per-task",
        "bf16": on_gpu and torch.cuda.is_bf16_supported() and not given.get("fp16"),
    }
    told = {**defaults, **given}
    if validated:
        told.setdefault("eval_strategy", told["save_strategy"])
        for one, other in (("eval", "save"), ("save", "eval")):
            if told.get(f"{other}_steps") is not None:
                told.setdefault(f"{one}_steps", told[f"{other}_steps"])
        chosen = "no" not in (told["eval_strategy"], told["save_strategy"])
        told.setdefault("load_best_model_at_end", chosen)
        told["metric_for_best_model"] = f"eval_{recipe.select}"
        told["greater_is_better"] = recipe.select == "score"
        if recipe.patience is not None and not chosen:
            raise ValueError(
                f"patience={recipe.patience} counts evaluations of what is saved: neither "
                f"training.eval_strategy={told['eval_strategy']!r} nor "
                f"training.save_strategy={told['save_strategy']!r} may be 'no'"
            )
    try:
        arguments = TrainingArguments(**told)
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # says so where its package is missing
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from None
    return one_gpu(arguments)


def _saved(eval_strategy: str | None) -> str:
    """When checkpoints are written where a recipe does not say: with the evaluations, if any."""
    return "epoch" if eval_strategy in (None, "no") else eval_strategy


def refuse_not_done(recipe: Recipe) -> None:
    """ValueError for what training would take and not do. Runs that have it are still evaluated."""
    for name, why in NOT_DONE.items():
        if value := recipe.training.get(name):
            raise ValueError(f"training.{name}={value!r}: {why}; leave it out")
    _refuse_smoothing(recipe)


def _refuse_smoothing(recipe: Recipe) -> None:
    """ValueError where label smoothing would not reach a loss: that of answers with weights."""
    factor = recipe.training.get("label_smoothing_factor")
    if not factor or recipe.compat == "eccv24":
        return
    for name, task in recipe.tasks.items():
        if TASKS[LAYOUTS[task.layout].task].targets == "sampled":
            raise ValueError(
                f"training.label_smoothing_factor={factor} has no meaning for tasks.{name}, whose "
                "answers are drawn and weighted by how many people gave them; leave it out"
            )


def _check(name: str, value: Any, hint: Any) -> None:
    accepted = tuple(_plain(hint))
    fits = isinstance(value, accepted) and not (isinstance(value, bool) and bool not in accepted)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        names = " or ".join(
            dict.fromkeys("null" if a is types.NoneType else a.__name__ for a in accepted)
        )
        raise ValueError(f"training.{name} must be {names}, got {value!r}")
    if name in LEAST and value is not None and value < LEAST[name]:
        raise ValueError(f"training.{name} must be at least {LEAST[name]}, got {value!r}")


def _plain(hint: Any) -> list[type]:
    """The types that YAML may give for a type hint."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [of for part in get_args(hint) for of in _plain(part)]
    if origin is not None:
        hint = origin
    if not isinstance(hint, type):
        return [str]
    return [hint] if hint in (int, float, bool, str, list, dict, types.NoneType) else [str]
