"""Visual tokens beside the text: padding and masks of any kind, places, and what has no place."""

from typing import Any

import pytest
import torch
from test_vlm import call, first, routed
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
)
from vlm_models import (
    DECODERS,
    LANGUAGE,
    LAYERS,
    NO_DROPOUT,
    PAIRS,
    VISUAL_WIDTH,
    drawn,
    images,
    texts,
    vision_language,
    vit,
)

from fused_route import RoutedConfig, attach
from fused_route.training.visual_tokens import VisualTokens
from fused_route.training.vlm import VisionLanguageModel

pytest.importorskip("peft", minversion="0.21")

MODELS = [
    (language, place)
    for language in LANGUAGE
    for place in ("before", "after")
    if place == "before" or language not in DECODERS
]


def features(batch: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(batch, count, VISUAL_WIDTH, generator=generator)


@pytest.mark.parametrize(("language", "place"), MODELS)
def test_a_masked_visual_token_is_an_absent_one(language: str, place: str) -> None:
    model = routed(language, features="tokens", visual_tokens=place, route="gram").double()
    given, visual = call(language), features(2).double()
    valid = torch.tensor([[1, 1, 1], [0, 1, 0]])
    given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = first(model(**given, visual_features=visual, visual_mask=valid))
        for i, length in enumerate((5, 3)):
            mine = {"input_ids": given["input_ids"][i : i + 1, :length]}
            if language in PAIRS:
                mine["decoder_input_ids"] = given["decoder_input_ids"][i : i + 1]
            seen = visual[i : i + 1, valid[i].bool()]
            alone = first(model(**mine, visual_features=seen))
            shown = found[i : i + 1, : alone.shape[1]]
            torch.testing.assert_close(shown, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("language", [*DECODERS, "t5"])
def test_padding_on_the_left_changes_nothing(language: str) -> None:
    model = routed(language, features="tokens", visual_tokens="before", route="gram")
    given, visual = call(language), features(2)
    given["attention_mask"] = mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        found = first(model(**given, visual_features=visual))
        mine = {"input_ids": given["input_ids"][1:, 2:]}
        if language in PAIRS:
            mine["decoder_input_ids"] = given["decoder_input_ids"][1:]
        alone = first(model(**mine, visual_features=visual[1:]))
    shown = found[1:] if language in PAIRS else found[1:, mask[1].bool()]
    torch.testing.assert_close(shown, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("language", DECODERS)
def test_generate_counts_places_as_the_forward(language: str, cached: bool) -> None:
    """With padding on the left and a masked visual token, step by step, with and without cache."""
    model = routed(language, features="tokens", visual_tokens="before", route="gram")
    model.generation_config.eos_token_id = None
    ids, visual = texts(2), features(2)
    given: dict[str, Any] = {
        "visual_features": visual,
        "visual_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **given
    )
    from test_vlm_generate import CACHE

    sequence = new = ids
    if cached:
        given["use_cache"] = True
    with torch.no_grad():
        for _ in range(5):
            out = model(new if cached else sequence, attention_mask=mask, **given)
            new = out.logits[:, -1:].argmax(-1)
            if cached:
                given[CACHE] = out[CACHE]
            sequence = torch.cat([sequence, new], 1)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(sequence, found)


def test_labels_and_types_move_with_their_tokens() -> None:
    """Padded on the left, where the order of tokens is not that of the call: against by hand."""
    model = vision_language("gpt2", projection="linear", visual_tokens="before")
    ids, pixels = texts(1), images(1)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        loss = model(ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
        alone = model(ids[:, 2:], pixel_values=pixels, labels=ids[:, 2:]).loss
    torch.testing.assert_close(loss, alone)

    bert = vision_language("bert", projection="linear", visual_tokens="before")
    types = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        found = bert(ids, token_type_ids=types, pixel_values=pixels).last_hidden_state
        visual = bert.image_projection(bert.encode_images(pixels))
        both = torch.cat([visual, bert.get_input_embeddings()(ids)], 1)
        grown = torch.cat([torch.zeros(1, 1, dtype=torch.long), types], 1)
        expected = bert.language(inputs_embeds=both, token_type_ids=grown).last_hidden_state
    assert torch.equal(found, expected[:, 1:])


def test_soft_targets_are_no_labels_of_tokens() -> None:
    """As many classes as tokens: scores stay as they are."""
    torch.manual_seed(0)
    config = BertConfig(num_labels=5, problem_type="multi_label_classification", **LAYERS)
    model = VisionLanguageModel.from_parts(
        vit(), BertForSequenceClassification(config), projection="linear", visual_tokens="before"
    ).eval()
    out = model(texts(5), pixel_values=images(5), labels=torch.rand(5, 5))
    assert out.logits.shape == (5, 5) and out.loss.isfinite()


def test_hidden_states_are_the_texts_too() -> None:
    model = vision_language("bert", projection="linear", visual_tokens="after")
    out = model(texts(2), pixel_values=images(2), output_hidden_states=True)
    assert {tuple(states.shape) for states in out.hidden_states} == {(2, 5, 8)}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


SCALED: dict[str, Any] = {
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig),
    "marian": (MarianMTModel, MarianConfig),
}


@pytest.mark.parametrize("name", [*SCALED, "bart", "t5"])
def test_text_is_embedded_as_the_model_does(name: str) -> None:
    if name in SCALED:
        kind, config = SCALED[name]
        torch.manual_seed(0)
        language = kind(
            config(
                vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
                max_position_embeddings=32, scale_embedding=True, pad_token_id=0,
            )
        ).eval()  # fmt: skip
    else:
        language = LANGUAGE[name]()
    tokens = VisualTokens.of("before", language)
    assert tokens is not None and (tokens.scale == 4.0) == (name in SCALED)
    with torch.no_grad():
        embedded = tokens.embedded(language, {"input_ids": texts(2)})
        encoder = language.get_encoder()
        found, expected = encoder(inputs_embeds=embedded), encoder(input_ids=texts(2))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_routed_by_text_with_padding() -> None:
    """The text's mask reaches the layers, with and without visual tokens."""
    for place in ("none", "before"):
        model = vision_language("bert", projection="linear", visual_tokens=place)
        attach(model, RoutedConfig(["query", "value"], r=4, routed_by="text"))
        drawn(model)
        ids, mask = texts(2), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        with torch.no_grad():
            found = model(ids, attention_mask=mask, pixel_values=images(2)).last_hidden_state
            alone = model(ids[1:, :2], pixel_values=images(2)[1:]).last_hidden_state
        torch.testing.assert_close(found[1:, :2], alone, rtol=1e-4, atol=1e-5)


def before(language: Any, **settings: Any) -> Any:
    if isinstance(language, str):
        language = LANGUAGE[language]()
    settings = {"projection": "linear", "visual_tokens": "before", **settings}
    return VisionLanguageModel.from_parts(vit(), language, **settings)


def tiny(kind: Any, config: Any) -> Any:
    small = {**LAYERS, **NO_DROPOUT} if config is BertConfig else {"n_embd": 8, "n_head": 2}
    return kind(config(**small))


IMAGE: dict[str, Any] = {"pixel_values": images(2)}
REFUSED: dict[str, tuple[Any, str]] = {
    "question answering": (
        lambda: before(tiny(BertForQuestionAnswering, BertConfig)),
        "BertForQuestionAnswering finds tokens by their places",
    ),
    "a decoder that classifies": (
        lambda: before(tiny(GPT2ForSequenceClassification, GPT2Config)),
        "GPT2ForSequenceClassification finds tokens by their places",
    ),
    "after in a decoder": (
        lambda: before("gpt2", visual_tokens="after"),
        "a decoder reads from left to right",
    ),
    "logits_to_keep": (
        lambda: before("gpt2")(texts(2), logits_to_keep=2, **IMAGE),
        "logits_to_keep with visual_tokens='before'",
    ),
    "tuples": (
        lambda: before("gpt2")(texts(2), return_dict=False, **IMAGE),
        "return_dict=False with visual_tokens",
    ),
    "an assistant": (
        lambda: before("gpt2").generate(texts(2), assistant_model=LANGUAGE["gpt2"](), **IMAGE),
        "assistant_model with visual_tokens='before'",
    ),
    "prompt lookup": (
        lambda: before("gpt2").generate(texts(2), prompt_lookup_num_tokens=2, **IMAGE),
        "prompt_lookup_num_tokens with visual_tokens='before'",
    ),
    "places in generate": (
        lambda: before("gpt2").generate(texts(2), position_ids=texts(2), **IMAGE),
        "position_ids with visual_tokens='before'",
    ),
    "other numbers in generate": (
        lambda: before("gpt2").generate(texts(3), **IMAGE),
        "input_ids holds 3 texts, the images are of 2 samples",
    ),
    "two prompts": (
        lambda: before("gpt2").generate(texts(2), input_ids=texts(2), **IMAGE),
        "inputs and input_ids are both given",
    ),
    "features of another width": (
        lambda: before("gpt2")(texts(2), visual_features=torch.ones(2, 7)),
        "visual_features must be 12 wide, as visual_width says",
    ),
    "features that are no tensor": (
        lambda: before("gpt2")(texts(2), visual_features=[1.0]),
        r"visual_features must be \(B, Nv, 12\) or \(B, 12\), got",
    ),
    "a mask that is no tensor": (
        lambda: before("gpt2")(texts(2), visual_mask=[[1], [1]], **IMAGE),
        "visual_mask must be a tensor",
    ),
    "a mask of other tokens": (
        lambda: before("gpt2")(texts(2), visual_mask=torch.ones(2, 3), **IMAGE),
        r"visual_mask must be \(B, Nv\) = \(2, 1\), got .*\(2, 3\)",
    ),
    "features of another width that no one projects": (
        lambda: before("gpt2", projection="none", visual_width=12, visual_tokens="none")(
            texts(2), visual_features=torch.ones(2, 7)
        ),
        "visual_features must be 12 wide, as visual_width says",
    ),
    "a mask without an image": (
        lambda: before("gpt2", visual_tokens="none")(texts(2), visual_mask=torch.ones(2, 1)),
        "visual_mask is given without",
    ),
    "no one projects": (
        lambda: before("gpt2", projection="none")(texts(2), **IMAGE),
        "or build the model with projection='linear'",
    ),
    "no images": (
        lambda: before("gpt2")(texts(2), pixel_values=torch.ones(2, 0, 3, 8, 8)),
        r"pixel_values must be \(B, channels",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_lengths_that_the_caller_gives_come_first() -> None:
    model = before("gpt2").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = 50
    given = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generate(texts(2), generation_config=given, **IMAGE).shape == (2, 8)
    assert model.generate(texts(2), max_new_tokens=2, **IMAGE).shape == (2, 7)
    model.generation_config.max_length = GenerationConfig().max_length
    assert model.generate(texts(2), **IMAGE).shape == (2, 25)  # transformers' own: 20 new ones


@pytest.mark.parametrize("place", ["none", "before"])
def test_processors_of_the_source_see_it(place: str) -> None:
    model = routed("bart", visual_tokens=place)
    plain = {"input_ids": texts(2), "max_new_tokens": 6, "do_sample": False, **IMAGE}
    free = model.generate(**plain)
    allowed = model.generate(**plain, encoder_no_repeat_ngram_size=1)
    for row, source in zip(allowed[:, 1:], texts(2), strict=True):
        assert not (set(row.tolist()) - {0, 2}) & set(source.tolist())
    assert free.shape[0] == allowed.shape[0] == 2
    out = model.generate(**plain, return_dict_in_generate=True, output_hidden_states=True)
    assert out.encoder_hidden_states is not None


def test_padding_that_is_also_the_end_is_no_padding() -> None:
    """As transformers: only what cannot be the end of a text is taken for padding."""
    model = routed("gpt2", visual_tokens="before")
    ids = texts(2)
    ids[:, 0] = 2
    model.generation_config.pad_token_id = 2
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, **IMAGE}
    found = model.generate(ids, **settings)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(found, expected)
