"""A vision tower and a language model as one: forward, visual tokens, saving, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vlm_models import (
    CLASSES,
    DECODERS,
    LANGUAGE,
    PAIRS,
    TARGETS,
    VISUAL_WIDTH,
    drawn,
    images,
    texts,
    vision_language,
    vit,
)

from fused_route import RoutedConfig, attach
from fused_route.training.vlm import VisionLanguageModel

peft = pytest.importorskip("peft", minversion="0.21")
timm = pytest.importorskip("timm")

from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig  # noqa: E402

PLACES = ("none", "before", "after")


def lora(language: str, **more: Any) -> Any:
    return RoutedLoraConfig(r=4, visual_width=VISUAL_WIDTH, **TARGETS[language], **more)


def routed(language: str, vision: Any = vit, route: str = "mul", **settings: Any) -> Any:
    model = vision_language(language, vision, **settings)
    return drawn(peft.get_peft_model(model, lora(language, route=route))).eval()


def labels(language: str, batch: int) -> Tensor:
    return torch.arange(batch) % CLASSES if language == "roberta" else texts(batch, seed=9)


def first(out: Any) -> Tensor:
    """Scores, or states where there is no head."""
    return out.logits if "logits" in out else out.last_hidden_state


def call(language: str, batch: int = 2) -> dict[str, Any]:
    if language in PAIRS:
        return {"input_ids": texts(batch), "decoder_input_ids": texts(batch, 4, seed=3)}
    return {"input_ids": texts(batch)}


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("place", PLACES)
def test_trains_one_step_by_target_names_alone(language: str, place: str) -> None:
    if place == "after" and language in DECODERS:
        return  # refused: see below
    model = routed(language, visual_tokens=place).train()
    given: dict[str, Any] = {"input_ids": texts(2), "pixel_values": images(2)}
    if language == "bert":
        out = model(**given)
        assert out.last_hidden_state.shape == (2, 5, 8)
        loss = out.last_hidden_state[..., 0].square().sum()
    else:
        loss = model(**given, labels=labels(language, 2)).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("visual_projector" in name for name in trained)
    assert not any(".vision." in name for name in trained), "the tower is not adapted"
    for name, parameter in trained.items():
        if "lora_A" in name or "lora_B" in name:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("way", ["attach", "PEFT"])
@pytest.mark.parametrize("place", PLACES)
def test_plain_lora_has_a_projector_where_the_image_is_a_token(place: str, way: str) -> None:
    if way == "PEFT":
        model = routed("bert", route="none", visual_tokens=place)
    else:
        model = vision_language("bert", visual_tokens=place)
        config = RoutedConfig(["query", "value"], r=4, route="none", visual_width=VISUAL_WIDTH)
        drawn(attach(model, config).model)
    out = model.train()(input_ids=texts(2), pixel_values=images(2)).last_hidden_state
    out[..., 0].square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("visual_projector" in name for name in trained) == (place != "none")
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("place", PLACES)
def test_a_batch_is_its_samples_one_by_one(language: str, place: str) -> None:
    """The image of each sample, and with padding: masks are the text's, whatever stands beside."""
    if place == "after" and language in DECODERS:
        return
    model = routed(language, visual_tokens=place, features="tokens", route="gram")
    given, pixels = call(language, 3), images(3)
    given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        batch = first(model(**given, pixel_values=pixels))
        features = model.encode_images(pixels)
        assert features.shape == (3, 5, VISUAL_WIDTH)
        assert torch.equal(first(model(**given, visual_features=features)), batch)
        other = first(model(**given, pixel_values=pixels.flip(0)))
        for i in range(3):
            length = int(given["attention_mask"][i].sum())
            mine = {"input_ids": given["input_ids"][i : i + 1, :length]}
            if "decoder_input_ids" in given:
                mine["decoder_input_ids"] = given["decoder_input_ids"][i : i + 1]
            alone = first(model(**mine, pixel_values=pixels[i : i + 1]))
            shown = batch[i : i + 1, : alone.shape[1]]
            torch.testing.assert_close(shown, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[0], batch[0], atol=1e-3)


@pytest.mark.parametrize("language", ["gpt2", "bert", "bart"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_visual_tokens_are_what_their_embedding_says(language: str, place: str) -> None:
    """Against the language model called by hand with embedded text and projected features."""
    if place == "after" and language in DECODERS:
        return
    model = vision_language(language, features="tokens", projection="linear", visual_tokens=place)
    pixels, ids = images(2), texts(2)
    more = {"decoder_input_ids": texts(2, 4)} if language in PAIRS else {}
    with torch.no_grad():
        visual = model.image_projection(model.vision(pixel_values=pixels).last_hidden_state)
        text = model.get_input_embeddings()(ids)
        order = [visual, text] if place == "before" else [text, visual]
        expected = first(model.language(inputs_embeds=torch.cat(order, 1), **more))
        found = first(model(ids, pixel_values=pixels, **more))
    if language not in PAIRS:
        expected = expected[:, 5:] if place == "before" else expected[:, :5]
    assert torch.equal(found, expected)


def test_labels_of_a_decoder_start_at_its_first_word() -> None:
    """The first word is predicted from the image before it, and nothing from nothing."""
    model = vision_language("gpt2", projection="linear", visual_tokens="before")
    ids, pixels = texts(2), images(2)
    with torch.no_grad():
        loss = model(ids, pixel_values=pixels, labels=ids).loss
        visual = model.image_projection(model.encode_images(pixels))
        embedded = torch.cat([visual, model.get_input_embeddings()(ids)], 1)
        logits = model.language(inputs_embeds=embedded).logits[:, :-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(loss, expected)


def test_masked_visual_tokens_count_for_nothing() -> None:
    model = routed("gpt2", features="tokens", visual_tokens="before", route="gram")
    features, ids = torch.randn(2, 5, VISUAL_WIDTH), texts(2)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(ids, visual_features=features, visual_mask=valid).logits
        features[1, 2:] = 7.0
        found = model(ids, visual_features=features, visual_mask=valid).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("language", LANGUAGE)
def test_saved_and_loaded_with_its_adapter(language: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    base = vision_language(language, visual_tokens="before")
    base.save_pretrained(tmp_path / "model")
    model = drawn(peft.get_peft_model(base, lora(language))).eval()
    given = {**call(language), "pixel_values": images(2)}
    with torch.no_grad():
        expected = first(model(**given))
        model.save_pretrained(tmp_path / "adapter")
        again = AutoModel.from_pretrained(tmp_path / "model").eval()
        assert type(again.language) is type(base.language)
        assert not any(p.requires_grad for p in again.vision.parameters())
        assert not again.train().vision.training
        again.eval()
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
        assert torch.equal(first(loaded(**given)), expected)
        other = AutoModel.from_pretrained(tmp_path / "model").eval()
        attach(other, tmp_path / "adapter")
        assert torch.equal(first(other(**given)), expected)


def test_the_models_own_projection_trains_beside_the_adapter(tmp_path: Path) -> None:
    base = vision_language("gpt2", projection="linear")
    config = RoutedLoraConfig(r=4, **TARGETS["gpt2"], modules_to_save=["image_projection"])
    model = drawn(peft.get_peft_model(base, config)).train()
    model(texts(2), pixel_values=images(2), labels=texts(2)).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert sum("image_projection" in name for name in grads) == 2
    assert all(grad is not None and grad.any() for grad in grads.values())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(vision_language("gpt2", projection="linear"), tmp_path)
    with torch.no_grad():
        ours, theirs = (m.eval()(texts(2), pixel_values=images(2)).logits for m in (model, loaded))
    assert torch.equal(ours, theirs)


def test_adapters_and_positions_under_the_wrapper() -> None:
    """A whole attention tells its width by the language model's configuration."""
    model = vision_language("bert")
    config = RoutedAdapterConfig(r=4, target_modules=["attention"], visual_width=VISUAL_WIDTH)
    model = peft.get_peft_model(model, config)
    model(texts(2), pixel_values=images(2)).last_hidden_state[..., 0].sum().backward()
    names = [n for n, m in model.named_modules() if hasattr(m, "active_views")]
    assert names and all(".language." in name for name in names)


def test_a_frozen_tower_stays_in_eval_mode_and_without_a_graph() -> None:
    model = vision_language("bert").train()
    assert model.language.training and not model.vision.training
    assert not any(p.requires_grad for p in model.vision.parameters())
    assert not model.encode_images(images(1)).requires_grad
    model.vision.requires_grad_(True)
    assert model.train().vision.training
    assert model.encode_images(images(1)).requires_grad


def test_parts_keep_what_they_run_with() -> None:
    """The wrapper leaves the parts' attention implementation alone."""
    language, vision = LANGUAGE["gpt2"](), vit()
    before = [part.config._attn_implementation for part in (language, vision)]
    VisionLanguageModel.from_parts(vision, language)
    assert [part.config._attn_implementation for part in (language, vision)] == before != [None] * 2


def test_attach_takes_the_models_own_context() -> None:
    model = vision_language("gpt2", features="tokens")
    attached = attach(model, RoutedConfig(r=4, visual_width=VISUAL_WIDTH, **TARGETS["gpt2"]))
    assert attached.context is model.context
    assert all(name.startswith("language.") for name in attached.layers)
    model(texts(2), pixel_values=images(2), labels=texts(2)).loss.backward()


def gpt2_with(**settings: Any) -> Any:
    return vision_language("gpt2", **settings)


REFUSED: dict[str, tuple[Any, str]] = {
    "both images": (
        lambda: gpt2_with()(texts(1), pixel_values=images(1), visual_features=torch.ones(1, 12)),
        "pixel_values and visual_features are both given",
    ),
    "no image for a visual token": (
        lambda: gpt2_with(visual_tokens="before")(texts(1)),
        "visual_tokens='before', but neither pixel_values nor",
    ),
    "no image for a layer": (lambda: routed("gpt2")(texts(1)), "has no routing input"),
    "images of another number": (
        lambda: gpt2_with()(texts(3), pixel_values=images(2)),
        "input_ids holds 3 texts, the images are of 2 samples",
    ),
    "pixels of another shape": (
        lambda: gpt2_with()(texts(1), pixel_values=torch.ones(3, 8)),
        r"pixel_values must be \(B, channels, H, W\)",
    ),
    "after in a decoder": (
        lambda: gpt2_with(visual_tokens="after", projection="linear")(
            texts(1), pixel_values=images(1)
        ),
        "a decoder reads from left to right",
    ),
    "positions": (
        lambda: gpt2_with(visual_tokens="before", projection="linear")(
            texts(1), pixel_values=images(1), position_ids=torch.arange(5)[None]
        ),
        "position_ids with visual_tokens='before'",
    ),
    "a mask of another kind": (
        lambda: gpt2_with(visual_tokens="before", projection="linear")(
            texts(1), pixel_values=images(1), attention_mask=torch.ones(1, 1, 5, 5)
        ),
        r"attention_mask must be \(B, T\) with visual tokens",
    ),
    "no text": (
        lambda: gpt2_with(visual_tokens="before", projection="linear")(pixel_values=images(1)),
        "input_ids is missing",
    ),
    "a width that no one projects": (
        lambda: gpt2_with(visual_tokens="before")(texts(1), pixel_values=images(1)),
        "takes x_r of width 8; the context holds 12",
    ),
    "features": (lambda: gpt2_with(features="mean"), "features must be one of pooled, tokens"),
    "projection": (lambda: gpt2_with(projection="mlp"), "projection must be one of none, linear"),
    "visual tokens": (lambda: gpt2_with(visual_tokens="in"), "visual_tokens must be one of none"),
    "width": (lambda: gpt2_with(visual_width=0), "visual_width must be a whole number"),
    "a language model that is none": (
        lambda: VisionLanguageModel.from_parts(None, nn.Linear(2, 2)),
        "language must be a model of transformers, got Linear",
    ),
    "a tower that is none": (
        lambda: VisionLanguageModel.from_parts(nn.Linear(2, 2), LANGUAGE["gpt2"]()),
        "vision must be a vision model of transformers or timm, got Linear",
    ),
    "a tower of text": (
        lambda: VisionLanguageModel.from_parts(LANGUAGE["bert"](), LANGUAGE["gpt2"]()),
        "takes input_ids, not pixel_values",
    ),
    "no tower and no width": (
        lambda: vision_language("gpt2", None, projection="linear"),
        "give visual_width, the width of the features",
    ),
    "no tower": (
        lambda: vision_language("gpt2", None)(texts(1), pixel_values=images(1)),
        "the model has no vision tower, give visual_features",
    ),
    "an encoder that is to generate": (
        lambda: vision_language("bert").generate(texts(1), pixel_values=images(1)),
        "language=BertModel does not generate",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    import json

    vision_language("bert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    for name, value, message in (
        ("language_class", "os", "is no model of transformers"),
        ("language_class", "NoSuchModel", "is no model of transformers"),
        ("text_config", {"model_type": "no such"}, "text_config must be a configuration"),
        ("vision_config", 3, "vision_config must be a configuration"),
        ("text_config", None, "text_config must be a BertConfig for language_class='BertModel'"),
    ):
        path.write_text(json.dumps({**written, name: value}))
        with pytest.raises(ValueError, match=message):
            VisionLanguageModel.from_pretrained(tmp_path)


def test_without_a_tower_it_takes_features(tmp_path: Path) -> None:
    model = vision_language("gpt2", None, visual_width=VISUAL_WIDTH, projection="linear")
    features = torch.randn(2, 3, VISUAL_WIDTH)
    expected = model(texts(2), visual_features=features).logits
    model.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.vision is None
    assert torch.equal(again(texts(2), visual_features=features).logits, expected)
