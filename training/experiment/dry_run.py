"""What training a recipe would do: its settings, parameters, memory and first batch."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fused_route.training.experiment.arguments import arguments_of, refuse_not_done
from fused_route.training.experiment.batches import IGNORED
from fused_route.training.experiment.begun import begun
from fused_route.training.experiment.build import Built, build, parameters
from fused_route.training.experiment.cutting import say_cut
from fused_route.training.experiment.folder import anchored, check_folder, last_checkpoint
from fused_route.training.experiment.images import PixelImages
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.run import SCORES, Data, open_data, refuse_changed, seed
from fused_route.training.experiment.sampling import TaskBatches
from fused_route.training.experiment.tasks import Rows

GIB = 2**30
SHOWN = 3  # rows of the first batch
FOR_ESTIMATE = 2  # rows whose activations are counted


def dry_run(recipe: Recipe) -> str:
    """A report of what `train` would do; nothing is trained, encoded or written but mapped rows.

    The first line after the settings says whether the folder has a run to go on with.

    Raises:
        ValueError: what `train` would refuse.
    """
    state = _state(recipe)
    validated = any(task.validation is not None for task in recipe.tasks.values())
    refuse_not_done(recipe)
    arguments = arguments_of(recipe, validated=validated)
    seed(arguments)
    data = open_data(recipe)
    built = build(recipe, data.answers)
    _refuse_changed(recipe, built, data)
    say_cut(built.batches(), data.train)
    images = data.images()
    rows = {name: len(samples.rows) for name, samples in data.train.samples.items()}
    parts = [built.recipe.to_yaml(), state, _counts(rows), _steps(recipe, arguments, data.train)]
    parts.append(f"images: {len(images)}")
    if built.answers:
        parts.append(f"answers: {len(built.answers)}, the first {', '.join(built.answers[:5])}")
    if built.cache is not None:
        missing = len(built.cache.missing(images))
        parts.append(f"features: {missing} of {len(images)} images are not encoded yet")
    trainable, total = parameters(built.model)
    parts.append(f"parameters: {trainable:,} trainable of {total:,} ({trainable / total:.2%})")
    for name, count in rows.items():
        size = recipe.tasks[name].batch_size or arguments.per_device_train_batch_size
        batch = _batch(built, data, name, min(size, count))
        parts += [f"first batch of {name}:", _memory(built, data, name, size), *_shapes(batch)]
        parts += _texts(built, batch)
    return "\n".join(parts)


def _state(recipe: Recipe) -> str:
    """Whether a run would be new; ValueError where the folder has something else in it."""
    folder = Path(recipe.training["output_dir"])
    check_folder(folder, anchored(recipe))
    if (folder / SCORES).is_file():
        return f"run: {folder} is finished already, nothing would be trained"
    checkpoint = last_checkpoint(folder)
    return f"run: new, in {folder}" if checkpoint is None else f"run: goes on from {checkpoint}"


def _refuse_changed(recipe: Recipe, built: Built, data: Data) -> None:
    """As `train` does; but for how many processes it will have, and for which images are broken."""
    now = begun(built.models, data.train, data.validation, None)
    if recipe.broken == "skip":
        now["rows"] = {}  # known when all images are encoded
    refuse_changed(Path(recipe.training["output_dir"]), now, data.answers)


def _steps(recipe: Recipe, arguments: TrainingArguments, train: Rows) -> str:
    """As the Trainer counts them."""
    default = arguments.per_device_train_batch_size
    sizes = {name: task.batch_size or default for name, task in recipe.tasks.items()}
    rows = {name: train.of(name) for name in train.samples}
    batches = len(TaskBatches(rows, sizes, recipe.sampling, seed=0))
    shared = -(-batches // arguments.world_size)
    each = -(-shared // arguments.gradient_accumulation_steps)
    told = arguments.max_steps
    number = told if told > 0 else math.ceil(arguments.num_train_epochs * each)
    return f"steps: {number:,}, {each:,} an epoch"


def _counts(rows: dict[str, int]) -> str:
    return "training rows: " + ", ".join(f"{name} {count:,}" for name, count in rows.items())


def _batch(built: Built, data: Data, name: str, size: int) -> dict[str, Any]:
    """The first rows, with pixels: nothing need be encoded for it."""
    batches = replace(built.batches(), images=PixelImages(built.encoder.preprocess))
    return batches.training([data.train[place] for place in data.train.of(name)[:size]])


def _memory(built: Built, data: Data, name: str, size: int) -> str:
    """Estimated, not measured: weights, and what a forward of two rows keeps, times the batch."""
    built.tuned.use(name)
    batch = _batch(built, data, name, FOR_ESTIMATE)
    count = len(batch["labels"])
    inputs = {k: v for k, v in batch.items() if k not in ("name", "weights")}
    with torch.no_grad():
        pixels = inputs.pop("pixel_values")
        features = torch.stack([built.encoder.encode(image) for image in pixels]).flatten(1, 2)
    owned = {t.untyped_storage().data_ptr() for t in built.model.parameters()}
    saved: dict[int, int] = {}

    def count_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    built.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
        kept = built.model(**inputs, visual_features=features)
    activations = sum(saved.values()) / count * size
    del kept
    weights = sum(p.numel() * p.element_size() for p in built.model.parameters())
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    states = trained * 3 * 4  # gradient and Adam's two moments, fp32
    total = weights + states + activations
    return (
        f"  memory, estimated for {size} rows in fp32: {total / GIB:.2f} GiB ({weights / GIB:.2f} "
        f"weights, {states / GIB:.2f} gradients and Adam, {activations / GIB:.2f} activations)"
    )


def _shapes(batch: dict[str, Any]) -> list[str]:
    return [
        f"  {name}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for name, value in batch.items()
        if isinstance(value, Tensor)
    ]


def _texts(built: Built, batch: dict[str, Any]) -> list[str]:
    """The first rows as the model reads them, and what it is to say."""
    lines = []
    for ids, labels in list(zip(batch["input_ids"], batch["labels"], strict=True))[:SHOWN]:
        read = built.tokenizer.decode(ids)
        if built.answers:
            said = ", ".join(f"{built.answers[i]} {labels[i]:.1f}" for i in labels.nonzero()[:, 0])
        else:
            said = built.tokenizer.decode(labels[labels != IGNORED])
        lines.append(f"  {read!r} → {said!r}")
    return lines
