"""A vision tower and a language model as one Hugging Face model, routed by its image."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, GenerationMixin, PreTrainedModel

from fused_route import RoutingContext, RoutingInput
from fused_route.checks import shown
from fused_route.surroundings import decodes
from fused_route.training.towers import as_tower, features_of, width_of
from fused_route.training.visual_tokens import VisualTokens
from fused_route.training.vlm_config import VisionLanguageConfig
from fused_route.training.vlm_generate import Generating, refuse_other_number


class VisionLanguageModel(Generating, PreTrainedModel, GenerationMixin):
    """A frozen vision tower beside any encoder, decoder or encoder-decoder of transformers.

    Its forward encodes the image, routes every routed layer by it, and returns what the language
    model returns. Routed layers are put in from outside:

        model = VisionLanguageModel.from_parts(vit, roberta)
        config = RoutedLoraConfig(
            target_modules=["query", "value"], visual_width=model.visual_width
        )
        model = get_peft_model(model, config)

    Attributes:
        language: the language model.
        vision: the tower, or None. It stays in eval mode and runs without gradients while none of
            its parameters requires one.
        image_projection: features to the language model's width, or None.
        context: holds the image for the routed layers.

    Args:
        config: says what it is made of; parts that are not given are made of it, at random.
        vision, language: the parts, for `from_parts`.
    """

    config_class = VisionLanguageConfig
    unrouted = ("vision",)  # the matcher of target_modules passes it by
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_reentrant = False

    def __init__(
        self,
        config: VisionLanguageConfig,
        vision: PreTrainedModel | None = None,
        language: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        for part in filter(None, (vision, language)):
            for module in part.modules():  # else `post_init` draws what others put there anew
                module._is_hf_initialized = True
        self.context = RoutingContext()
        self.language = _made_language(config) if language is None else language
        self.vision = vision
        if vision is None and config.vision_config is not None:
            self.vision = AutoModel.from_config(config.vision_config)
        self._freeze_tower()
        self.image_projection: nn.Linear | None = None
        if config.projection == "linear":
            like = next(self.language.parameters())
            width = self.language.get_input_embeddings().embedding_dim
            self.image_projection = nn.Linear(self.visual_width, width).to(like.device, like.dtype)
        self.visual_tokens = VisualTokens.of(config.visual_tokens, self.language)
        self.loss_type = _loss_type(config, self.language)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        vision: Any,
        language: PreTrainedModel,
        *,
        visual_width: int | None = None,
        features: str = "pooled",
        projection: str = "none",
        visual_tokens: str = "none",
    ) -> "VisionLanguageModel":
        """The two models as one; neither is copied.

        Args:
            vision: a vision model of transformers or timm; None: the model is given features.
            language: any language model of transformers, with or without a head.
            visual_width, features, projection, visual_tokens: as in `VisionLanguageConfig`.

        Raises:
            ValueError: parts of other kinds, or a setting that is not accepted.
        """
        if not isinstance(language, PreTrainedModel):
            raise ValueError(
                f"language must be a model of transformers, got {type(language).__name__}"
            )
        tower = None if vision is None else as_tower(vision)
        config = VisionLanguageConfig(
            vision_config=None if tower is None else tower.config,
            text_config=language.config,
            language_class=type(language).__name__,
            visual_width=visual_width,
            features=features,
            projection=projection,
            visual_tokens=visual_tokens,
        )
        return cls(config, tower, language)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, the tower frozen as `from_parts` leaves it."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_tower()
        return loaded

    def _freeze_tower(self) -> None:
        if self.vision is not None:
            self.vision.requires_grad_(False)

    @property
    def visual_width(self) -> int:
        """Width of the features that the tower makes, or that the model is given.

        Raises:
            ValueError: neither the configuration nor the tower tells.
        """
        if self.config.visual_width is not None:
            return int(self.config.visual_width)
        if self.vision is None:
            raise ValueError("vision is None: give visual_width, the width of the features")
        return width_of(self.vision, self.config.features)

    @property
    def reads_routing_input(self) -> bool:
        """Whether the model itself, beside routed layers, needs the projected features."""
        return self.visual_tokens is not None

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Features (B, Nv, visual_width) of images, to keep and give as `visual_features`.

        Args:
            pixel_values: (B, channels, H, W), or (B, n, channels, H, W) for n images a sample.

        Raises:
            ValueError: another shape, or no vision tower.
        """
        if self.vision is None:
            raise ValueError("pixel_values: the model has no vision tower, give visual_features")
        trains = any(p.requires_grad for p in self.vision.parameters())
        with nullcontext() if trains else torch.no_grad():
            return features_of(self.vision, pixel_values, self.config.features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model returns, its routed layers routed by the image.

        Args:
            pixel_values: (B, channels, H, W), or (B, n, channels, H, W) for n images a sample.
            visual_features: (B, Nv, visual_width) or (B, visual_width) in their place.
            visual_mask: (B, Nv), true where a visual token counts; None: all do.
            kwargs: the language model's. Where visual tokens stand among the text, masks, types and
                labels are still those of the text alone, and so are the states and scores returned;
                attentions are of all tokens.

        Raises:
            ValueError: both or, with visual_tokens, neither of pixel_values and visual_features;
                images and texts of different number.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
            **kwargs,
        }
        image = self.routing_input(pixel_values, visual_features, visual_mask)
        refuse_other_number(image, given)
        call = {name: value for name, value in given.items() if value is not None}
        if self.visual_tokens is None or image is None:
            with self.routed_by(image, attention_mask):
                return self.language(**call)
        with self.context.using(image):
            call, cut = self.visual_tokens.put(self.language, self._visual(), call)
        with self.routed_by(image, call.get("attention_mask")):
            return cut(self.language(**call))

    def routing_input(
        self, pixel_values: Tensor | None, visual_features: Tensor | None, visual_mask: Any = None
    ) -> RoutingInput | None:
        """What the context is set to for these images; None without any."""
        if pixel_values is not None and visual_features is not None:
            raise ValueError("pixel_values and visual_features are both given: give one of them")
        if pixel_values is not None:
            visual_features = self.encode_images(pixel_values)
        if visual_features is None:
            if visual_mask is not None:
                raise ValueError("visual_mask is given without pixel_values or visual_features")
            if self.config.visual_tokens != "none":
                raise ValueError(
                    f"visual_tokens={self.config.visual_tokens!r}, but neither pixel_values nor "
                    "visual_features is given"
                )
            return None
        if not isinstance(visual_features, Tensor) or visual_features.dim() not in (2, 3):
            raise ValueError(
                f"visual_features must be (B, Nv, {self.visual_width}) or (B, {self.visual_width}),"
                f" got {shown(visual_features)}"
            )
        is_told = self.image_projection is not None or self.config.visual_width is not None
        if is_told and visual_features.shape[-1] != self.visual_width:
            raise ValueError(
                f"visual_features must be {self.visual_width} wide, as visual_width says, got "
                f"{tuple(visual_features.shape)}"
            )
        if self.image_projection is not None:
            dtype = next(self.image_projection.parameters()).dtype
            visual_features = self.image_projection(visual_features.to(dtype))
        if not isinstance(visual_mask, (Tensor, type(None))):
            raise ValueError(f"visual_mask must be a tensor (B, Nv), got {shown(visual_mask)}")
        if visual_mask is None:
            return RoutingInput(visual_features)
        B, *tokens, _ = visual_features.shape
        if visual_mask.shape != (B, *(tokens or [1])):
            raise ValueError(
                f"visual_mask must be (B, Nv) = {(B, *(tokens or [1]))}, got {shown(visual_mask)}"
            )
        return RoutingInput(visual_features, visual_mask.bool())

    def routed_by(
        self, image: RoutingInput | None, attention_mask: Any = None
    ) -> AbstractContextManager[None]:
        """`context.using` of the image, and of the text's mask for layers routed by text."""
        is_mask = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        return self.context.using(image, text_mask=attention_mask if is_mask else "all")

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """As torch's, but that a frozen tower stays in eval mode."""
        super().train(mode)
        if self.vision is not None and not any(p.requires_grad for p in self.vision.parameters()):
            self.vision.eval()
        return self

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is divided by the number of items that the Trainer gives.

        The Trainer takes any forward with **kwargs for one that does. BART, T5 and classifiers take
        the mean whatever it says, and would train with gradients as many times too large as there
        are accumulated batches or processes.
        """
        told: Any = getattr(self.language, "accepts_loss_kwargs", None)
        if told is not None:
            return bool(told)
        forward = inspect.unwrap(type(self.language).forward)
        return self.language.can_generate() and "loss_function" in forward.__code__.co_names

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language.set_output_embeddings(new_embeddings)

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.language.get_encoder(*args, **kwargs)

    def get_decoder(self) -> nn.Module:
        return self.language.get_decoder()

    def enable_input_require_grads(self) -> None:
        """Gives the embedded text a gradient, which reentrant checkpointing alone needs.

        (Without it nothing is computed for layers below the first routed one, and torch.compile
        takes the forward as one graph.)
        """
        if self._is_reentrant:
            self.language.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Takes it back."""
        self.language.disable_input_require_grads()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **kwargs: Any,
    ) -> None:
        """transformers' place to set what runs a block: here with the image of its forward."""

        told = getattr(gradient_checkpointing_func, "keywords", {})
        self._is_reentrant = bool(enable and told.get("use_reentrant", False))

        # A partial: a copy of the model gets one with its own context.
        func = partial(_with_the_image, self.context, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, func, **kwargs)

    @property
    def prepare_decoder_input_ids_from_labels(self) -> Any:
        """An encoder-decoder's, for data collators; no attribute where there is none."""
        return self.language.prepare_decoder_input_ids_from_labels

    def _get_name(self) -> str:
        # By it the Trainer knows whose labels its label smoothing has to shift.
        is_causal = decodes(self.config.text_config) and self.language.can_generate()
        return type(self.language).__name__ if is_causal else type(self).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())


def _with_the_image(
    context: RoutingContext,
    run: Callable[..., Any],
    block: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A checkpointed block, its recomputation with the image of its forward."""
    if torch.compiler.is_compiling():  # the image is an input of the block's graph
        return run(block, *args, **kwargs)
    return run(context.captured(block), *args, **kwargs)


def _made_language(config: VisionLanguageConfig) -> PreTrainedModel:
    """The language model that a configuration describes, its parameters at random."""
    kind: Any = getattr(transformers, str(config.language_class), None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise ValueError(
            f"language_class={shown(config.language_class)} is no model of transformers; put the "
            "parts together with VisionLanguageModel.from_parts"
        )
    expected: Any = kind.config_class  # type: ignore[attr-defined]
    if not isinstance(config.text_config, expected):
        raise ValueError(
            f"text_config must be a {expected.__name__} for "
            f"language_class={config.language_class!r}, got {type(config.text_config).__name__}"
        )
    made: PreTrainedModel = kind(config.text_config)
    return made


def _loss_type(config: VisionLanguageConfig, language: PreTrainedModel) -> str | None:
    """By which the Trainer counts labels: a decoder's first is none, but after a visual token."""
    if config.visual_tokens == "before":
        return None
    if language.loss_type is None and decodes(config.text_config):
        return "ForCausalLM"  # what transformers falls back to
    told: str | None = language.loss_type
    return told


AutoModel.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
