"""Generating text about images: the language model's own `generate`, routed by the image."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fused_route import RoutingContext, RoutingInput
from fused_route.training.visual_tokens import VisualTokens

# Lengths of the text alone: given as new tokens, since transformers would count visual ones too.
LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
OF_ENCODER = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "output_hidden_states",
    "output_attentions",
)
NOT_WITH_TOKENS = ("assistant_model", "prompt_lookup_num_tokens", "position_ids", "token_type_ids")


class Generating:
    """`generate` of a `VisionLanguageModel`."""

    language: PreTrainedModel
    context: RoutingContext
    config: Any
    visual_tokens: VisualTokens | None

    def routing_input(self, *args: Any, **kwargs: Any) -> RoutingInput | None:
        """The model's."""
        raise NotImplementedError

    @property
    def generation_config(self) -> GenerationConfig:
        """The language model's; what transformers starts from, where it does not generate."""
        own: GenerationConfig | None = getattr(self.language, "generation_config", None)
        return GenerationConfig() if own is None else own

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if hasattr(self, "language"):  # not yet, while the model is made
            self.language.generation_config = value

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The language model's."""
        return self.language.prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's `generate`, of as many texts as there are images.

        The image is encoded once, and given to every beam and every returned sequence of its text.
        A decoder's sequences start with the prompt, visual tokens are never part of them, and
        max_length and min_length count the text alone.

        Args:
            inputs, input_ids: (B, T) prompts; None for a decoder: its token for the beginning.
            pixel_values, visual_features, visual_mask: as in `forward`.
            Others are those of the language model's `generate`.

        Raises:
            ValueError: the language model does not generate, or arguments as in `forward`.
        """
        language = self.language
        if not language.can_generate():
            raise ValueError(f"language={type(language).__name__} does not generate")
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids are both given: give one of them")
        image = self.routing_input(pixel_values, visual_features, visual_mask)
        ids = kwargs.pop("input_ids", inputs)
        call = {"input_ids": ids, "attention_mask": attention_mask, **kwargs}
        call = {name: value for name, value in call.items() if value is not None}
        refuse_other_number(image, call)
        if getattr(language.config, "is_encoder_decoder", False):
            call = self._encoded(image, call)
        else:
            call = self._prompted(image, call)
        image = image and image.repeated(self._sequences_of_a_text(kwargs))
        with self.context.using(image, text_mask="all"):
            return language.generate(**call)

    def _encoded(self, image: RoutingInput | None, call: dict[str, Any]) -> dict[str, Any]:
        """An encoder-decoder's call, the encoder run: once a text, where the decoder has beams."""
        if "encoder_outputs" in call:
            return call
        encoder, tokens = self.language.get_encoder(), self.visual_tokens
        if "input_ids" in call and "attention_mask" not in call:
            call["attention_mask"] = _not_padding(call["input_ids"], self.generation_config)
        mine = {name: call[name] for name in OF_ENCODER if name in call}
        with self.context.using(image, text_mask="all"):
            if image is not None and tokens is not None:
                mine, _ = tokens.put(self.language, self._visual(), mine)
            call["encoder_outputs"] = encoder(**mine, return_dict=True)
        call.pop("inputs_embeds", None)
        if "attention_mask" in mine:
            call["attention_mask"] = mine["attention_mask"]
        return call

    def _prompted(self, image: RoutingInput | None, call: dict[str, Any]) -> dict[str, Any]:
        """A decoder's call: visual tokens and prompt embedded, the prompt's ids beside them."""
        config, tokens = self.generation_config, self.visual_tokens
        if "input_ids" not in call and "inputs_embeds" not in call and image is not None:
            if config.bos_token_id is None:
                raise ValueError("input_ids is missing, and the language model has no bos_token_id")
            batch, device = len(image.x_r), image.x_r.device
            call["input_ids"] = torch.full((batch, 1), config.bos_token_id, device=device)
        if image is None or tokens is None:
            return call
        if "input_ids" not in call:
            raise ValueError("input_ids is missing: visual tokens stand beside a text")
        for name in NOT_WITH_TOKENS:
            if self._setting(name, call) is not None:
                raise ValueError(
                    f"{name} with visual_tokens={tokens.place!r}: transformers does not carry "
                    "embedded prompts through it; leave it out"
                )
        ids = call["input_ids"]
        call.setdefault("attention_mask", _not_padding(ids, config))
        with self.context.using(image):
            told = {"input_ids": ids, "attention_mask": call["attention_mask"]}
            put, _ = tokens.put(self.language, self._visual(), told)
        call["inputs_embeds"], call["attention_mask"] = put["inputs_embeds"], put["attention_mask"]
        given = call.get("generation_config")
        for length, new in LENGTHS.items():
            wanted = self._setting(length, call)
            is_told = call.get(new) is not None or getattr(given, new, None) is not None
            if wanted is not None and not is_told:
                call[new] = max(wanted - ids.shape[1], 0)
            call.pop(length, None)
        return call

    def _visual(self) -> RoutingInput:
        """The image that the context holds, of the embedded text's width.

        Raises:
            ValueError: there is none of this width.
        """
        embedding: Any = self.language.get_input_embeddings()
        try:
            return self.context.get(embedding.embedding_dim, "the embedding of visual tokens")
        except ValueError as error:
            raise ValueError(f"{error}; or build the model with projection='linear'") from None

    def _setting(self, name: str, given: dict[str, Any]) -> Any:
        """A setting of `generate`: given by name, in a configuration, or the model's own."""
        if given.get(name) is not None:
            return given[name]
        for config in (given.get("generation_config"), self.generation_config):
            value = getattr(config, name, None)
            if value is not None and value != getattr(GenerationConfig(), name, None):
                return value
        return None

    def _sequences_of_a_text(self, given: dict[str, Any]) -> int:
        """Rows of the batch that `generate` makes of a text: its beams, or returned sequences."""
        return max(
            self._setting(name, given) or 1 for name in ("num_beams", "num_return_sequences")
        )


def refuse_other_number(image: RoutingInput | None, given: dict[str, Any]) -> None:
    """ValueError where texts and images are not of the same samples."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        text = given.get(name)
        if image is not None and text is not None and len(text) != len(image.x_r):
            raise ValueError(
                f"{name} holds {len(text)} texts, the images are of {len(image.x_r)} samples"
            )


def _not_padding(ids: Tensor, config: GenerationConfig) -> Tensor:
    """The mask that transformers infers: what is not padding, where padding is no end of text."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(ids)
    return ids.ne(config.pad_token_id).long()
