"""The model of a recipe, with what prepares its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_route import RoutedConfig
from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.encoders import Encoder, encoder_of
from fused_route.training.experiment.batches import Batches
from fused_route.training.experiment.compat import draw_published, embed_twice, published
from fused_route.training.experiment.head import put_head
from fused_route.training.experiment.images import CachedImages, PixelImages
from fused_route.training.experiment.pretrained import (
    load_language,
    load_tower,
    loaded_digest,
)
from fused_route.training.experiment.recipe import Recipe, TaskRecipe
from fused_route.training.experiment.tasks import TASKS
from fused_route.training.experiment.tuning import Tuned, tune
from fused_route.training.feature_cache import FeatureCache
from fused_route.training.towers import width_of
from fused_route.training.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Built:
    """A model and what belongs to it.

    Attributes:
        recipe: what it was built by, with the settings of its compat.
        model: the tower and the language model, adapted.
        tuned: what of it is trained.
        tokenizer: the language model's.
        tower, encoder: the vision tower, and how it encodes an image; part of the model only where
            it runs in every step.
        cache: features of images, or None where the tower runs in every step.
        answers: of a classifier, by number.
        models: digests of what is frozen: weights of the tower ("vision") and of the language
            model ("language"), and all that the tower's features depend on ("preprocessing").
    """

    recipe: Recipe
    model: VisionLanguageModel
    tuned: Tuned
    tokenizer: PreTrainedTokenizerBase
    tower: PreTrainedModel
    encoder: Encoder
    cache: FeatureCache | None
    answers: tuple[str, ...]
    models: dict[str, str]

    def batches(self, *, augmentation: str = "none") -> Batches:
        """What makes batches for the model."""
        images: Any
        if self.cache is not None:
            images = CachedImages(self.cache, self.recipe.control)
        else:
            images = PixelImages(self.encoder.preprocess, augmentation, self.recipe.control)
        return Batches(
            self.recipe.model.kind,
            self.recipe.tasks,
            self.tokenizer,
            images,
            self.answers,
            self.recipe.compat,
            int(self.recipe.training["seed"]),
        )


def build(recipe: Recipe, answers: Sequence[str] = ()) -> Built:
    """Loads the parts of a recipe and puts in what is trained.

    Args:
        answers: those that a classifier chooses among.

    Raises:
        ValueError: parts that are missing or do not fit.
    """
    recipe = published(recipe)
    told = recipe.model
    if told.kind == "classifier" and len(answers) < 2:
        raise ValueError(f"answers: a classifier chooses among two or more, got {len(answers)}")
    tower, processor = load_tower(told.vision, told.features)
    encoder = encoder_of(tower, processor, told.features)  # known as it was before it was built in
    language, tokenizer, new = load_language(told.language, told.kind, len(answers) or None)
    language_weights = loaded_digest(language, new)  # before anything of it changes
    cached = recipe.features_from == "cache"
    model = _model(recipe, tower, language, len(answers))
    tuned = tune(
        model,
        _fitted(recipe, model, new),
        method=recipe.method,
        heads=recipe.heads,
        modules=recipe.modules,
        tasks=recipe.tasks,
        impl=recipe.impl,
        plan=recipe.plan,
    )
    if recipe.compat == "eccv24":
        draw_published(model)
    cache = FeatureCache(Path(recipe.cache) / "features", encoder.key) if cached else None
    models = {"vision": encoder.weights, "preprocessing": encoder.key, "language": language_weights}
    made = Built(recipe, model, tuned, tokenizer, tower, encoder, cache, tuple(answers), models)
    for name, task in recipe.tasks.items():
        check_length(name, task, told.kind, language, visual_tokens(recipe, name, encoder))
        made.batches().check_room(name)
    return made


def _model(
    recipe: Recipe, tower: PreTrainedModel, language: PreTrainedModel, answers: int
) -> VisionLanguageModel:
    """Both parts as one, nothing adapted yet; without the tower where features are cached."""
    told, is_published = recipe.model, recipe.compat == "eccv24"
    if told.head == "two-layer":
        put_head(language, answers, "frozen" if is_published else "trained")
    model = VisionLanguageModel.from_parts(
        None if recipe.features_from == "cache" else tower,
        language,
        visual_width=width_of(tower, told.features),
        features=told.features,
        projection=told.projection,
        visual_tokens=told.visual_tokens,
    )
    if is_published and told.kind == "classifier" and told.visual_tokens != "none":
        embed_twice(model)
    return model


def visual_tokens(recipe: Recipe, name: str, encoder: Encoder) -> int:
    """Number of visual tokens that stand beside a text of a task."""
    told = recipe.model
    if told.visual_tokens == "none":
        return 0
    images = TASKS[LAYOUTS[recipe.tasks[name].layout].task].images
    if told.features == "pooled":
        return images
    blank = encoder.preprocess(Image.new("RGB", (64, 64)))
    with torch.no_grad():
        return images * encoder.encode(blank.unsqueeze(0)).shape[1]


def check_length(
    name: str, task: TaskRecipe, kind: str, language: PreTrainedModel, visual: int = 0
) -> None:
    """Refuses texts longer than the language model has positions for.

    Args:
        visual: tokens that stand beside a text.

    Raises:
        ValueError: more tokens may come than it takes.
    """
    config = language.config
    positions = getattr(config, "n_positions", None) or getattr(
        config, "max_position_embeddings", None
    )
    if not isinstance(positions, int) or config.model_type == "t5":
        return
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # the places of padding
    answer = task.max_new_tokens if kind != "classifier" else 0
    if kind == "decoder":  # the answer stands behind the image too, a pair's in another sequence
        answer += visual
    if max(task.max_length + visual, answer) > positions:
        beside = f" beside {visual} visual tokens" if visual else ""
        raise ValueError(
            f"tasks.{name}: max_length={task.max_length} and max_new_tokens={task.max_new_tokens}"
            f"{beside}, but {type(language).__name__} has {positions} positions"
        )


def _fitted(recipe: Recipe, model: VisionLanguageModel, new: Sequence[str]) -> RoutedConfig:
    """The configuration with what has to train: modules that no file has, and a projector, where
    the image is of another width than the text and is looked at."""
    adapter = recipe.adapter
    heads = [*new, *(["image_projection"] if model.image_projection is not None else [])]
    saved = tuple(dict.fromkeys([*adapter.modules_to_save, *heads]))
    adapter = replace(adapter, modules_to_save=saved)
    if adapter.visual_width is not None or model.image_projection is not None:
        return adapter
    seen = adapter.route != "none" or recipe.method == "cross-attention"
    if adapter.routed_by != "image" or not (seen or model.visual_tokens is not None):
        return adapter
    width = model.language.get_input_embeddings().embedding_dim
    same = model.visual_width == width
    return adapter if same else replace(adapter, visual_width=model.visual_width)


def parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all)."""
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)
