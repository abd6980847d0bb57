"""Generating about images: equal to step after step by hand, however the batch is expanded."""

import inspect
import threading
from typing import Any

import pytest
import test_vlm
import torch
from test_vlm import first
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM
from vlm_models import DECODERS, PAIRS, VISUAL_WIDTH, images, texts

GENERATING = (*DECODERS, *PAIRS)
PLACES = ("none", "before")
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several of the beams": {"num_beams": 4, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
}
# Renamed in transformers 5.24.
CACHE = next(
    n
    for n in ("cache", "past_key_values")
    if n in inspect.signature(LlamaForCausalLM.forward).parameters
)
MODELS = [(language, place) for language in GENERATING for place in PLACES]


def routed(language: str, **settings: Any) -> Any:
    """With updates so large that the image decides what is generated."""
    return strengthened(test_vlm.routed(language, **settings))


def strengthened(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(8.0)
    return model


@pytest.mark.parametrize(("language", "place"), MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_its_samples_one_by_one(language: str, place: str, way: str) -> None:
    if place == "before" and language in DECODERS and way == "without a cache":
        return  # transformers keeps embedded prompts for the first step alone: it demands a cache
    model = routed(language, visual_tokens=place)
    ids, pixels = texts(3), images(3)
    settings = {**LENGTH, **WAYS[way]}
    found = model.generate(input_ids=ids, pixel_values=pixels, **settings)
    rows = settings.get("num_return_sequences", 1)
    other = model.generate(input_ids=ids, pixel_values=images(3, seed=8), **settings)
    assert found.shape != other.shape or not torch.equal(found, other), "the image changes nothing"
    for i in range(3):
        alone = model.generate(input_ids=ids[i : i + 1], pixel_values=pixels[i : i + 1], **settings)
        mine = found[i * rows : (i + 1) * rows]
        assert torch.equal(mine[:, : alone.shape[1]], alone)
        assert mine[:, alone.shape[1] :].le(2).all(), "after its end"


@pytest.mark.parametrize(("language", "place"), MODELS)
def test_equal_to_the_forward_step_by_step(language: str, place: str) -> None:
    """With and without a cache, from the pixels each time."""
    model = routed(language, visual_tokens=place)
    ids, pixels = texts(2), images(2)
    found = model.generate(input_ids=ids, pixel_values=pixels, **LENGTH)
    with torch.no_grad():
        assert_steps(model, language, ids, pixels, found)
        cached = with_cache(model, language, ids, pixels, found.shape[1])
    assert_same_text(cached, found, 1 if language in PAIRS else ids.shape[1])


def assert_steps(model: Any, language: str, ids: Tensor, pixels: Tensor, found: Tensor) -> None:
    """Every generated token is the best of the scores that forward gives for what is before it."""
    start = 1 if language in PAIRS else ids.shape[1]
    given = {"input_ids": ids} if language in PAIRS else {}
    name = "decoder_input_ids" if language in PAIRS else "input_ids"
    for end in range(start, found.shape[1]):
        given[name] = found[:, :end]
        scores = first(model(**given, pixel_values=pixels))[:, -1]
        alive = ~(found[:, start:end] == 2).any(1)
        assert torch.equal(scores.argmax(-1)[alive], found[:, end][alive])


def with_cache(model: Any, language: str, ids: Tensor, pixels: Tensor, length: int) -> Tensor:
    """The best tokens one after the other, each forward given the last and a cache."""
    is_pair = language in PAIRS
    tokens = model.generation_config.decoder_start_token_id or 0
    sequence = torch.full((len(ids), 1), tokens) if is_pair else ids
    given: dict[str, Any] = {"pixel_values": pixels, "use_cache": True}
    if is_pair:
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    new = sequence
    while sequence.shape[1] < length:
        if not is_pair:
            given["attention_mask"] = torch.ones_like(sequence)
        out = model(**given, **{"decoder_input_ids" if is_pair else "input_ids": new})
        given[CACHE] = out[CACHE]
        if is_pair:
            given.pop("input_ids", None)
            given["encoder_outputs"] = (out.encoder_last_hidden_state,)
        new = first(out)[:, -1:].argmax(-1)
        sequence = torch.cat([sequence, new], 1)
    return sequence


def assert_same_text(sequence: Tensor, found: Tensor, start: int) -> None:
    """Equal up to the end of each text."""
    for mine, theirs in zip(sequence, found, strict=True):
        ends = (theirs[start:] == 2).nonzero().flatten().tolist()
        end = start + (ends[0] if ends else len(theirs)) + 1
        assert torch.equal(mine[:end], theirs[:end])


@pytest.mark.parametrize(("language", "place"), MODELS)
def test_padded_prompts(language: str, place: str) -> None:
    """A decoder's on the left, as transformers wants them, an encoder's on the right."""
    model = routed(language, visual_tokens=place)
    ids, pixels = texts(2), images(2)
    ids[0, slice(0, 2) if language in DECODERS else slice(3, 5)] = 0
    mask = ids.ne(0).long()
    found = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **LENGTH)
    inferred = model.generate(input_ids=ids, pixel_values=pixels, **LENGTH)
    assert torch.equal(inferred, found)
    short = ids[:1, mask[0].bool()]
    alone = model.generate(input_ids=short, pixel_values=pixels[:1], **LENGTH)
    if language in DECODERS:
        assert torch.equal(found[0, 2 : 2 + alone.shape[1]], alone[0])
    else:
        assert torch.equal(found[0, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("language", GENERATING)
def test_the_tower_runs_once_an_image(language: str) -> None:
    model = routed(language, visual_tokens="before")
    seen: list[int] = []
    tower = model.get_base_model().vision
    tower.register_forward_hook(lambda m, args, out: seen.append(len(out.last_hidden_state)))
    model.generate(input_ids=texts(2), pixel_values=images(2), num_beams=3, **LENGTH)
    assert seen == [2]


@pytest.mark.parametrize("language", GENERATING)
def test_sampling_is_of_each_samples_image(language: str) -> None:
    """Sampled with almost no randomness: the greedy text of the same image, for all sequences."""
    model = routed(language)
    ids, pixels = texts(2), images(2)
    greedy = model.generate(input_ids=ids, pixel_values=pixels, **LENGTH)
    torch.manual_seed(0)
    sampled = model.generate(
        input_ids=ids, pixel_values=pixels, do_sample=True, temperature=1e-4, max_new_tokens=6,
        num_return_sequences=3,
    )  # fmt: skip
    assert torch.equal(sampled[:, : greedy.shape[1]], greedy.repeat_interleave(3, 0))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("language", DECODERS)
def test_continuing_from_a_cache(language: str, place: str) -> None:
    """A text, then more of it with the cache of what was: the same as in one go."""
    model = routed(language, visual_tokens=place)
    ids, pixels = texts(2), images(2)
    whole = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, pixel_values=pixels, **whole)
    cache = DynamicCache()
    half = model.generate(
        input_ids=ids, pixel_values=pixels, **{CACHE: cache},
        **{**whole, "max_new_tokens": 4, "min_new_tokens": 4},
    )  # fmt: skip
    assert torch.equal(half, expected[:, : half.shape[1]])
    kept = cache.get_seq_length()
    assert kept == half.shape[1] - 1 + (1 if place == "before" else 0)
    rest = model.generate(
        input_ids=half, pixel_values=pixels, **{CACHE: cache},
        **{**whole, "max_new_tokens": 4, "min_new_tokens": 4},
    )  # fmt: skip
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("language", GENERATING)
def test_lengths_count_the_text_alone(language: str, place: str) -> None:
    model = routed(language, visual_tokens=place, features="tokens", route="gram")
    ids, pixels = texts(2), images(2)
    never = {"do_sample": False, "eos_token_id": None}
    for settings in (
        {"max_length": 9, "min_length": 9},
        {"generation_config": GenerationConfig(max_length=9, min_length=9, eos_token_id=None,
                                               bos_token_id=1, pad_token_id=0,
                                               decoder_start_token_id=2)},
    ):  # fmt: skip
        more = {} if "generation_config" in settings else never
        found = model.generate(input_ids=ids, pixel_values=pixels, **settings, **more)
        assert found.shape == (2, 9)


@pytest.mark.parametrize("place", PLACES)
def test_a_decoder_needs_no_prompt(place: str) -> None:
    model = routed("gpt2", visual_tokens=place)
    found = model.generate(pixel_values=images(2), **LENGTH)
    started = model.generate(input_ids=torch.full((2, 1), 1), pixel_values=images(2), **LENGTH)
    assert torch.equal(found, started) and (found[:, 0] == 1).all()
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="no bos_token_id"):
        model.generate(pixel_values=images(2), **LENGTH)


def test_features_and_masks_in_place_of_pixels() -> None:
    model = routed("gpt2", features="tokens", visual_tokens="before", route="gram")
    ids, features = texts(2), torch.randn(2, 5, VISUAL_WIDTH)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    beams = {**LENGTH, "num_beams": 3}
    found = model.generate(input_ids=ids, visual_features=features, visual_mask=valid, **beams)
    features[1, 2:] = 5.0
    again = model.generate(input_ids=ids, visual_features=features, visual_mask=valid, **beams)
    assert torch.equal(found, again)


@pytest.mark.parametrize("language", GENERATING)
def test_by_task_type_and_in_a_thread(language: str) -> None:
    """PEFT's classes for a task pass generate on; a streamer's thread sets its own image."""
    import peft
    from test_vlm import lora
    from vlm_models import drawn, vision_language

    expected = routed(language).generate(input_ids=texts(2), pixel_values=images(2), **LENGTH)
    kind = "CAUSAL_LM" if language in DECODERS else "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(vision_language(language), lora(language, task_type=kind))
    strengthened(drawn(model)).eval()
    out: list[Tensor] = []
    given = {"input_ids": texts(2), "pixel_values": images(2), **LENGTH}
    thread = threading.Thread(target=lambda: out.append(model.generate(**given)))
    thread.start()
    thread.join()
    assert torch.equal(out[0], expected)
    assert torch.equal(model.generate(**given), expected)
