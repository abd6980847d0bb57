"""Generating text about images: the language model's own `generate`, routed by the image."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fused_route import RoutingContext, RoutingInput
from fused_route.training.visual_tokens import beside_text, joined

# What counts the text alone, by what transformers would count visual tokens in
LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}


class Generating:
    """`generate` of a `VisionLanguageModel`."""

    language: PreTrainedModel
    context: RoutingContext
    config: Any

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
        image = self.routing_input(pixel_values, visual_features, visual_mask)
        ids = kwargs.pop("input_ids", inputs)
        call = {"input_ids": ids, "attention_mask": attention_mask, **kwargs}
        call = {name: value for name, value in call.items() if value is not None}
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
        place, encoder = self.config.visual_tokens, self.language.get_encoder()
        if "input_ids" in call and "attention_mask" not in call:
            call["attention_mask"] = _not_padding(call["input_ids"], self.generation_config)
        for_encoder = ("input_ids", "inputs_embeds", "attention_mask")
        mine = {name: call.pop(name) for name in for_encoder if name in call}
        with self.context.using(image, text_mask="all"):
            if image is not None and place != "none":
                mine, _ = beside_text(place, self.language, self._visual(), mine)
            call["encoder_outputs"] = encoder(**mine, return_dict=True)
        return {**call, **{k: v for k, v in mine.items() if k == "attention_mask"}}

    def _prompted(self, image: RoutingInput | None, call: dict[str, Any]) -> dict[str, Any]:
        """A decoder's call: visual tokens and prompt embedded, the prompt's ids beside them."""
        config, place = self.generation_config, self.config.visual_tokens
        if "input_ids" not in call and "inputs_embeds" not in call and image is not None:
            if config.bos_token_id is None:
                raise ValueError("input_ids is missing, and the language model has no bos_token_id")
            batch, device = len(image.x_r), image.x_r.device
            call["input_ids"] = torch.full((batch, 1), config.bos_token_id, device=device)
        if image is None or place == "none":
            return call
        if "input_ids" not in call:
            raise ValueError("input_ids is missing: visual tokens stand beside a text")
        ids = call["input_ids"]
        if "attention_mask" not in call:
            call["attention_mask"] = _not_padding(ids, config)
        with self.context.using(image):
            visual = self._visual()
        embedded = self.language.get_input_embeddings()(ids)
        seen = call["attention_mask"].new_ones(visual.x_r.shape[:2])
        if visual.mask is not None:
            seen = visual.mask.to(seen.dtype)
        call["inputs_embeds"] = joined("before", visual.x_r.to(embedded.dtype), embedded)
        call["attention_mask"] = joined("before", seen, call["attention_mask"])
        for length, new in LENGTHS.items():
            if new not in call and (wanted := self._setting(length, call)) is not None:
                call[new] = max(wanted - ids.shape[1], 0)
            call.pop(length, None)
        return call

    def _visual(self) -> RoutingInput:
        """The image that the context holds, of the embedded text's width.

        Raises:
            ValueError: there is none of this width.
        """
        embedding: Any = self.language.get_input_embeddings()
        return self.context.get(embedding.embedding_dim, "the embedding of visual tokens")

    def _setting(self, name: str, given: dict[str, Any]) -> Any:
        """A setting of `generate`: given by name, in a configuration, or the model's own."""
        if given.get(name) is not None:
            return given[name]
        for config in (given.get("generation_config"), self.generation_config):
            value = getattr(config, name, None)
            if value is not None and value != getattr(GenerationConfig(), name):
                return value
        return None

    def _sequences_of_a_text(self, given: dict[str, Any]) -> int:
        """Rows of the batch that `generate` makes of a text: its beams, or returned sequences."""
        return max(
            self._setting(name, given) or 1 for name in ("num_beams", "num_return_sequences")
        )


def _not_padding(ids: Tensor, config: GenerationConfig) -> Tensor:
    """The mask that transformers infers: what is not padding, where padding is no end of text."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(ids)
    return ids.ne(config.pad_token_id).long()
