"""What a vision-language model is made of: a vision tower, a language model, and between them."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from fused_route.checks import one_of, whole

FEATURES = ("pooled", "tokens")
PROJECTIONS = ("none", "linear")
VISUAL_TOKENS = ("none", "before", "after")


def _of_text(name: str) -> Any:
    """A setting that is the language model's: Seq2SeqTrainer asks the whole model for it."""
    return property(lambda config: getattr(config.text_config, name, None))


class VisionLanguageConfig(PretrainedConfig):
    """Configuration of a `VisionLanguageModel`.

    Args:
        vision_config: of the vision tower; None: there is none, the model is given features.
        text_config: of the language model.
        language_class: name of the language model's class in transformers.
        visual_width: width of the features; None: the tower tells.
        features: "pooled", one vector an image; "tokens", all of the tower's last states.
        projection: "none", or "linear": features to the language model's width by a linear layer of
            the model's own, `image_projection`, which trains where modules_to_save names it.
        visual_tokens: whether the image is also put among the embedded text: "none", "before" it,
            or "after" it (encoders and encoder-decoders).

    Raises:
        ValueError: a value that is not accepted.
    """

    model_type = "fused_route_vision_language"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        language_class: str | None = None,
        visual_width: int | None = None,
        features: str = "pooled",
        projection: str = "none",
        visual_tokens: str = "none",
        **kwargs: Any,
    ) -> None:
        text, vision = _config("text_config", text_config), _config("vision_config", vision_config)
        self.language_class = language_class
        self.visual_width = None if visual_width is None else whole("visual_width", visual_width)
        one_of("features", features, FEATURES)
        one_of("projection", projection, PROJECTIONS)
        one_of("visual_tokens", visual_tokens, VISUAL_TOKENS)
        self.features, self.projection, self.visual_tokens = features, projection, visual_tokens
        kwargs.pop("is_encoder_decoder", None)
        paired = bool(getattr(text, "is_encoder_decoder", False))
        self.vision_config = self.text_config = None
        super().__init__(is_encoder_decoder=paired, **kwargs)
        # After it: it would overwrite the attention implementation that the parts run with.
        self.vision_config, self.text_config = vision, text

    pad_token_id = _of_text("pad_token_id")
    eos_token_id = _of_text("eos_token_id")
    bos_token_id = _of_text("bos_token_id")

    @property
    def use_cache(self) -> Any:
        """The language model's; the Trainer turns it off."""
        return getattr(self.text_config, "use_cache", None)

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        text: Any = self.text_config
        if hasattr(text, "use_cache"):
            text.use_cache = value


def _config(name: str, given: Any) -> PretrainedConfig | None:
    if given is None or isinstance(given, PretrainedConfig):
        return given
    kind = given.get("model_type") if isinstance(given, dict) else None
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} must be a configuration of transformers, or its dictionary with a model_type "
            f"that transformers has, got {kind or type(given).__name__!r}"
        )
    return CONFIG_MAPPING[kind].from_dict(dict(given))


AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig, exist_ok=True)
