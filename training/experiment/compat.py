"""What the published code does otherwise (compat: eccv24), for numbers to compare with its own."""

from dataclasses import replace
from typing import Any

from torch import nn

from fused_route import RoutedAdapter, RoutedConfig
from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.vlm import VisionLanguageModel


def published(recipe: Recipe) -> Recipe:
    """The recipe with the settings of the published code; itself, unless compat says eccv24.

    Segments of a fused projection are routed jointly and the visual features reshaped where they
    should be transposed; biases of the targets and layer norms train; adapters have a residual and
    are shared by a block in decoders, neither in encoders; classifiers have the two-layer head.
    What the published code does in the loss and the embedding is in `Batches` and `embed_twice`,
    its frozen pooler in `AnswerHead`, its adapters' first values in `draw_published`.

    Raises:
        ValueError: settings that it does not have.
    """
    if recipe.compat == "none":
        return recipe
    kind = recipe.model.kind
    if kind == "encoder-decoder":
        raise ValueError(
            "compat='eccv24': no encoder-decoder was published; it is for classifiers and decoders"
        )
    if recipe.method != "routed" or recipe.modules != "shared":
        raise ValueError("compat='eccv24' is for method='routed' and modules='shared'")
    captions = all(LAYOUTS[task.layout].task == "caption" for task in recipe.tasks.values())
    if kind == "decoder" and not captions:
        raise ValueError("compat='eccv24' of a decoder is for captions: no other was published")
    if kind == "decoder" and recipe.model.visual_tokens != "before":
        raise ValueError("compat='eccv24' of a decoder starts from the image: visual_tokens=before")
    head = "two-layer" if kind == "classifier" else recipe.model.head
    model = replace(recipe.model, head=head)
    return replace(recipe, model=model, adapter=_adapter(recipe.adapter, kind))


def _adapter(adapter: RoutedConfig, kind: str) -> RoutedConfig:
    has_modes = adapter.route != "none"
    modes: dict[str, Any] = {"transpose": "eccv24", "segments": "joint"} if has_modes else {}
    trained = ["host_bias", "norms"] if adapter.host == "lora" else ["norms"]
    train = tuple(dict.fromkeys([*trained, *adapter.train]))
    if adapter.host == "lora":
        return replace(adapter, train=train, **modes)
    decodes = kind == "decoder"
    share = "block" if decodes else "none"
    return replace(adapter, train=train, residual=decodes, share=share, **modes)


def draw_published(model: nn.Module) -> None:
    """Draws both projections of adapters from N(0, 0.02²), where ours start B at zero."""
    for layer in model.modules():
        if isinstance(layer, RoutedAdapter):
            for weight in (layer.A, layer.B):
                nn.init.normal_(weight, std=0.02)


def embed_twice(model: VisionLanguageModel) -> None:
    """Embeds the text wholly, positions and norm included, before it is embedded with the image.

    As the published RoBERTa with a visual prefix does: its text goes through the embedding twice.

    Raises:
        ValueError: a language model without an embedding module of its own.
    """
    base: Any = getattr(model.language, model.language.base_model_prefix, model.language)
    embeddings = getattr(base, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            f"compat='eccv24': {type(model.language).__name__} has no embeddings module as RoBERTa"
        )

    def embed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("input_ids") is not None:
            kwargs = {**kwargs, "inputs_embeds": embeddings(input_ids=kwargs["input_ids"])}
            del kwargs["input_ids"]
        return args, kwargs

    model.register_forward_pre_hook(embed, with_kwargs=True)
