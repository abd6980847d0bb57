"""The image among the text: visual tokens before or after the embedded words."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fused_route import RoutingInput
from fused_route.checks import shown
from fused_route.surroundings import decodes

Cut = Callable[[Any], Any]
# Arguments that name tokens by their places, which visual tokens shift.
BY_PLACE = ("position_ids", "start_positions", "end_positions", "logits_to_keep")


@dataclass(frozen=True)
class VisualTokens:
    """Where visual tokens stand in a language model's input.

    They stand beside the text, and padding outside of both: a decoder's in front, where masked
    visual tokens go too, an encoder's behind. So a sample is the same in any batch.

    Args:
        place: "before" or "after" the text.
        is_pair, is_decoder: whether the model is an encoder-decoder, or a decoder alone.
        takes_positions: whether its forward takes position_ids.
        scale: what it multiplies embedded words by where it embeds them itself.
    """

    place: str
    is_pair: bool
    is_decoder: bool
    takes_positions: bool
    scale: float

    @classmethod
    def of(cls, place: str, language: PreTrainedModel) -> "VisualTokens | None":
        """For a language model; None for the place "none".

        Raises:
            ValueError: a model in which there is no such place.
        """
        if place == "none":
            return None
        config, name = language.config, type(language).__name__
        is_pair = bool(getattr(config, "is_encoder_decoder", False))
        is_decoder = not is_pair and bool(decodes(config))
        if place == "after" and is_decoder:
            raise ValueError(
                "visual_tokens='after': a decoder reads from left to right, the text would not see "
                "them; take 'before'"
            )
        classifies = is_decoder and name.endswith("ForSequenceClassification")
        if classifies or name.endswith(("ForQuestionAnswering", "ForMultipleChoice")):
            raise ValueError(
                f"visual_tokens={place!r}: {name} finds tokens by their places in the text; take "
                "'none'"
            )
        parameters = inspect.signature(language.forward).parameters
        return cls(place, is_pair, is_decoder, "position_ids" in parameters, _scale(language))

    def put(
        self, language: PreTrainedModel, visual: RoutingInput, call: dict[str, Any]
    ) -> tuple[dict[str, Any], Cut]:
        """(a call of the language model with visual tokens, what takes them out of its result).

        Masks, types and labels of the call are those of the text and get their places for the
        image: seen (as far as `visual.mask` says), of type 0, without a label. Where a cache holds
        the tokens already, or the encoder has run, the mask alone grows.

        Args:
            visual: of the language model's width.

        Raises:
            ValueError: an argument that names tokens by their places, a mask that is not (B, T), a
                result that is no dictionary, or no text.
        """
        self._refuse(call)
        call = dict(call)
        kept = 0 if self.is_pair else cached_length(call)
        index = self._grow_mask(visual, call, kept)
        if kept or (self.is_pair and "encoder_outputs" in call):
            return call, _as_it_is
        text = self.embedded(language, call)
        call.pop("input_ids", None)
        call["inputs_embeds"] = self.joined(visual.x_r.to(text.dtype), text, index)
        length, count = text.shape[1], visual.x_r.shape[1]
        if "token_type_ids" in call:
            types = call["token_type_ids"]
            call["token_type_ids"] = self.joined(types.new_zeros(len(types), count), types, index)
        if self.is_pair:
            return call, _as_it_is
        labels = call.get("labels")
        if labels is not None and _is_by_token(labels, text):
            none = labels.new_full((len(labels), count), -100)
            call["labels"] = self.joined(none, labels, index)
        return call, lambda out: _cut(out, self._places(index, count, length), count + length)

    def embedded(self, language: PreTrainedModel, call: dict[str, Any]) -> Tensor:
        """The text of a call, (B, T, d), as the model itself embeds it.

        Raises:
            ValueError: there is none.
        """
        given: Tensor | None = call.get("inputs_embeds")
        if given is None and call.get("input_ids") is None:
            raise ValueError("input_ids is missing: visual tokens stand beside a text")
        if given is not None:
            return given
        embedded: Tensor = language.get_input_embeddings()(call["input_ids"])
        return embedded if self.scale == 1.0 else embedded * self.scale

    def joined(self, visual: Tensor, text: Tensor, index: Tensor | None) -> Tensor:
        """Both along the tokens, (B, Nv + T, …), in the order of `index`."""
        if index is None:
            order = [visual, text] if self.place == "before" else [text, visual]
            return torch.cat(order, 1)
        both = torch.cat([visual, text], 1)
        where = index if both.dim() == 2 else index.unsqueeze(-1).expand_as(both)
        return both.gather(1, where)

    def order(self, visual: RoutingInput, mask: Tensor) -> Tensor:
        """(B, Nv + T): which of (visual tokens, text) stands at each place.

        Args:
            mask: (B, T), the text's.
        """
        shape = visual.x_r.shape[:2]
        valid = mask.new_ones(shape).bool() if visual.mask is None else visual.mask
        leading = mask.cumsum(1) == 0
        if self.place == "before":
            of_text = torch.where(leading, 0, 2)
            of_image = torch.where(valid, 1, 0 if self.is_decoder else 3)
        else:
            trailing = mask.flip(1).cumsum(1).flip(1) == 0
            of_text = torch.where(trailing, 2, 0)
            of_image = torch.where(valid, 1, 3)
        return torch.cat([of_image, of_text], 1).argsort(dim=1, stable=True)

    def _refuse(self, call: dict[str, Any]) -> None:
        for name in BY_PLACE:
            if call.get(name) is not None:
                raise ValueError(
                    f"{name} with visual_tokens={self.place!r}: places of tokens are those with "
                    "the image in it; leave it out"
                )
        if call.get("return_dict") is False:
            raise ValueError(f"return_dict=False with visual_tokens={self.place!r}: leave it out")

    def _grow_mask(self, visual: RoutingInput, call: dict[str, Any], kept: int) -> Tensor | None:
        """The order of tokens, None for that of `joined`; the call's mask grows, it gets places."""
        mask = call.get("attention_mask")
        if mask is None and visual.mask is None:
            return None
        batch, count = visual.x_r.shape[:2]
        text = call.get("inputs_embeds", call.get("input_ids"))
        new = 0 if text is None else text.shape[1]
        if mask is None:
            length = new + max(kept - count, 0)
            mask = torch.ones(batch, length, dtype=torch.long, device=visual.x_r.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(f"attention_mask must be (B, T) with visual tokens, got {shown(mask)}")
        index = self.order(visual, mask)
        seen = mask.new_ones(batch, count) if visual.mask is None else visual.mask.to(mask.dtype)
        call["attention_mask"] = grown = self.joined(seen, mask, index)
        if self.is_decoder and self.takes_positions:  # as `generate` counts them
            places = (grown.long().cumsum(1) - 1).masked_fill(grown == 0, 0)
            call["position_ids"] = places[:, -new:] if kept else places
        return index

    def _places(self, index: Tensor | None, count: int, length: int) -> Tensor | slice:
        """Where the text's tokens stand."""
        if index is None:
            start = count if self.place == "before" else 0
            return slice(start, start + length)
        return index.argsort(dim=1)[:, count:]


def cached_length(call: dict[str, Any]) -> int:
    """Tokens that the cache of a call holds."""
    for name in ("cache", "past_key_values"):  # transformers 5.24 has two names for it
        cache = call.get(name)
        if cache is not None:
            return int(cache.get_seq_length())
    return 0


def _scale(language: PreTrainedModel) -> float:
    """Pegasus and Marian multiply outside of the embedding, and not what is embedded already."""
    if not getattr(language.config, "is_encoder_decoder", False):
        return 1.0
    told = getattr(language.get_encoder(), "embed_scale", None)
    by_itself = hasattr(language.get_input_embeddings(), "embed_scale")
    return float(told) if isinstance(told, (int, float)) and not by_itself else 1.0


def _is_by_token(labels: Tensor, text: Tensor) -> bool:
    """Whether labels are of tokens: whole numbers (B, T), where scores of classes are not whole."""
    return labels.shape == text.shape[:2] and not labels.is_floating_point()


def _as_it_is(out: Any) -> Any:
    return out


def _cut(out: Any, places: Tensor | slice, length: int) -> Any:
    """States and scores of the text's tokens alone."""

    def text_of(states: Any) -> Any:
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[1] != length:
            return states
        if isinstance(places, slice):
            return states[:, places]
        return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    for name in ("logits", "last_hidden_state"):
        if out.get(name) is not None:
            out[name] = text_of(out[name])
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(text_of(states) for states in out["hidden_states"])
    return out
