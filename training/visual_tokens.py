"""The image among the text: visual tokens before or after the embedded words."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fused_route import RoutingInput
from fused_route.checks import shown
from fused_route.targets import decodes

Cut = Callable[[Any], Any]


def beside_text(
    place: str, language: PreTrainedModel, visual: RoutingInput, call: dict[str, Any]
) -> tuple[dict[str, Any], Cut]:
    """(a call of the language model with visual tokens, what takes them out of its result).

    Masks, types and labels of the call are those of the text and get their places for the image:
    seen (as far as `visual.mask` says), of type 0 and without a label. Where a cache holds the
    tokens already, or the encoder has run, the mask alone grows.

    Args:
        place: "before" or "after" the text.
        visual: of the language model's width.

    Raises:
        ValueError: "after" in a decoder, position_ids, a mask that is not (B, T), or no text.
    """
    config = language.config
    is_pair = bool(getattr(config, "is_encoder_decoder", False))
    if place == "after" and decodes(config):
        raise ValueError(
            "visual_tokens='after': a decoder reads from left to right, the text would not see them"
        )
    if "position_ids" in call:
        raise ValueError(f"position_ids with visual_tokens={place!r}: the model counts by itself")
    call = dict(call)
    count = visual.x_r.shape[1]
    ahead = is_pair and "encoder_outputs" in call
    kept = cached_length(call) if not is_pair else 0
    _grow_mask(place, visual, call, kept)
    if ahead or kept:
        return call, _as_it_is
    embedded = _embedded(language, call)
    length = embedded.shape[1]
    call["inputs_embeds"] = joined(place, visual.x_r.to(embedded.dtype), embedded)
    if "token_type_ids" in call:
        types = call["token_type_ids"]
        call["token_type_ids"] = joined(place, types.new_zeros(len(types), count), types)
    if is_pair:
        return call, _as_it_is
    labels = call.get("labels")
    if labels is not None and _is_by_token(labels, embedded):
        call["labels"] = joined(place, labels.new_full((len(labels), count), -100), labels)
    start = count if place == "before" else 0

    def cut(out: Any) -> Any:
        return _without(out, slice(start, start + length), count + length)

    return call, cut


def joined(place: str, visual: Tensor, text: Tensor) -> Tensor:
    """Both along the tokens, (B, Nv + T, …)."""
    return torch.cat([visual, text] if place == "before" else [text, visual], 1)


def cached_length(call: dict[str, Any]) -> int:
    """Tokens that the cache of a call holds."""
    for name in ("cache", "past_key_values"):  # transformers 5.24 has two names for it
        cache = call.get(name)
        if cache is not None:
            return int(cache.get_seq_length())
    return 0


def _grow_mask(place: str, visual: RoutingInput, call: dict[str, Any], kept: int) -> None:
    mask = call.get("attention_mask")
    if mask is None and visual.mask is None:
        return
    batch, count = visual.x_r.shape[:2]
    if mask is None:
        text = call.get("inputs_embeds", call.get("input_ids"))
        new = 0 if text is None else text.shape[1]
        length = new + max(kept - count, 0)
        mask = torch.ones(batch, length, dtype=torch.long, device=visual.x_r.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, T) with visual tokens, got {shown(mask)}")
    seen = mask.new_ones(batch, count) if visual.mask is None else visual.mask.to(mask.dtype)
    call["attention_mask"] = joined(place, seen, mask)


def _embedded(language: PreTrainedModel, call: dict[str, Any]) -> Tensor:
    given: Tensor | None = call.pop("inputs_embeds", None)
    ids = call.pop("input_ids", None)
    if given is None and ids is None:
        raise ValueError("input_ids is missing: visual tokens stand beside a text")
    embedded: Tensor = language.get_input_embeddings()(ids) if given is None else given
    return embedded


def _is_by_token(labels: Tensor, embedded: Tensor) -> bool:
    """Whether labels are of tokens: whole numbers (B, T), where scores of classes are not whole."""
    return labels.shape == embedded.shape[:2] and not labels.is_floating_point()


def _as_it_is(out: Any) -> Any:
    return out


def _without(out: Any, text: slice, length: int) -> Any:
    """States and scores of the text's tokens alone."""
    for name in ("logits", "last_hidden_state"):
        states = getattr(out, name, None)
        if isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] == length:
            out[name] = states[:, text]
    return out
