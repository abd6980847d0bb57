"""What is around a target: decoders, also of models of images, order of axes, weights read."""

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    DetrConfig,
    DetrForObjectDetection,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LongformerConfig,
    LongformerModel,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    ResNetConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetModel,
)

from fused_route import RoutedConfig, attach, surroundings
from fused_route.surroundings import decodes
from fused_route.training.vlm import VisionLanguageModel

TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
PAIR: dict[str, Any] = {"vocab_size": 50, "d_model": 16}


def qwen(config: Any) -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
    return config(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision)


def llava() -> LlavaConfig:
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              intermediate_size=64, image_size=32, patch_size=16)  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT))


CONFIGS = {
    "qwen2 vl": lambda: qwen(Qwen2VLConfig),
    "qwen2.5 vl": lambda: qwen(Qwen2_5_VLConfig),
    "llava": llava,
}


@pytest.mark.parametrize("how", [{"route": "self_gram"}, {"routed_by": "text"}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_part_of_models_of_images_is_a_decoder(name: str, how: dict[str, Any]) -> None:
    model = AutoModelForImageTextToText.from_config(CONFIGS[name]())
    for target in (
        r".*language_model.*\.(gate|up|down)_proj", r".*language_model.*\.[qkvo]_proj", "lm_head",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="lets a token see later ones: refused for"):
            attach(model, RoutedConfig(target, r=4, **how))
    attach(model, RoutedConfig(r".*vis.*\.(fc1|gate_proj)", r=4, **how))


def test_what_a_later_token_changes() -> None:
    """What is not refused does not read it; the image is the same."""
    model = AutoModelForImageTextToText.from_config(qwen(Qwen2_5_VLConfig)).eval()
    attached = attach(model, RoutedConfig(r".*language_model.*gate_proj", r=4, route="gram"))
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    ids = torch.tensor([[3, 9, 4, 7]])
    with attached.using(torch.randn(1, 32)), torch.no_grad():
        one, other = (model(torch.cat([ids, torch.tensor([[x]])], 1)).logits for x in (5, 6))
    assert torch.equal(one[:, :4], other[:, :4]) and not torch.equal(one, other)


def prophetnet() -> nn.Module:
    heads = {f"num_{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes = {f"num_{side}_layers": 1 for side in ("encoder", "decoder")}
    ffn = {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    return ProphetNetForConditionalGeneration(
        ProphetNetConfig(vocab_size=50, hidden_size=16, **heads, **sizes, **ffn)
    )


def pix2struct() -> nn.Module:
    shared = {"hidden_size": 16, "d_ff": 16, "d_kv": 4}
    text = {**shared, "vocab_size": 50, "num_layers": 1, "num_heads": 4}
    vision = {**shared, "num_hidden_layers": 1, "num_attention_heads": 4, "seq_len": 8}
    vision["patch_embed_hidden_size"] = 16
    return Pix2StructForConditionalGeneration(
        Pix2StructConfig(text_config=text, vision_config=vision)
    )


def bart() -> nn.Module:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder")
             for what in ("layers", "attention_heads", "ffn_dim")}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**PAIR, **sides))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(**PAIR, d_kv=4, d_ff=16, num_layers=1, num_heads=4))


PAIRS = {
    "prophetnet": (prophetnet, [r".*decoder.*feed_forward\.intermediate", "lm_head"]),
    "pix2struct": (
        pix2struct,
        [r"decoder.*encoder_decoder_attention\.attention\.query", r"decoder.*\.wo"],
    ),
    "bart": (bart, [r".*decoder.*\.fc1", r".*decoder.*encoder_attn\.q_proj", "lm_head"]),
    "t5": (t5, [r"decoder.*\.wi", "lm_head"]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_decoders_of_pairs(name: str) -> None:
    make, targets = PAIRS[name]
    for target in targets:
        with pytest.raises(ValueError, match="part of a decoder"):
            attach(make(), RoutedConfig(target, r=2, route="self_gram"))
    within = "query_proj" if name == "prophetnet" else "(query|q_proj|SelfAttention.q)"
    attach(make(), RoutedConfig(rf".*encoder\..*(?<!cross_attn\.){within}", r=2, route="self_gram"))


def test_the_head_of_an_encoder_is_none() -> None:
    bert = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                                      num_attention_heads=4, intermediate_size=16))  # fmt: skip
    attach(bert, RoutedConfig(["decoder", "dense"], r=2, route="self_gram"))


def test_kinds_that_nobody_knows_are_left_to_what_is_around_them() -> None:
    text = qwen(Qwen2VLConfig).text_config
    assert decodes(text) is True and decodes(CLIPVisionConfig()) is False
    assert decodes(SimpleNamespace(model_type="granite4_vision_text")) is True
    assert decodes(BertConfig()) is False and decodes(LlamaConfig()) is True
    text.model_type = "some_text"
    assert decodes(text) is None


def test_a_decoder_of_a_model_of_images_does_not_see_tokens_behind_its_text() -> None:
    language = AutoModelForImageTextToText.from_config(qwen(Qwen2VLConfig)).model.language_model
    with pytest.raises(ValueError, match="reads from left to right"):
        VisionLanguageModel.from_parts(None, language, visual_width=32, visual_tokens="after")


class Within(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def sequence_first() -> dict[str, tuple[nn.Module, Any]]:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False
    )
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    longformer = LongformerConfig(vocab_size=50, hidden_size=16, pad_token_id=1, **sizes)
    xlnet = XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=4, d_inner=16)
    return {
        "encoder": (encoder, "linear1"),
        "decoder": (Within(nn.TransformerDecoderLayer(16, 4, 32)), "linear2"),
        "layer": (nn.TransformerEncoderLayer(16, 4, 32), "linear1"),
        "xlnet": (XLNetModel(xlnet), "layer_1"),
        "longformer": (LongformerModel(longformer), "query"),
    }


@pytest.mark.parametrize("name", ["encoder", "decoder", "layer", "xlnet", "longformer"])
def test_tokens_before_samples_are_refused(name: str) -> None:
    model, target = sequence_first()[name]
    with pytest.raises(ValueError, match=rf"target .*{target}: its hidden states are \(T, B, d\)"):
        attach(model, RoutedConfig([target], r=2))
    attach(model, RoutedConfig([target], r=2, route="none"))  # each token by itself


def test_what_lies_beside_them_is_taken() -> None:
    model, _ = sequence_first()["longformer"]
    attach(model, RoutedConfig(["intermediate.dense"], r=2))
    attention = nn.MultiheadAttention(16, 4)
    with pytest.raises(ValueError, match=r"target inner: its hidden states are \(T, B, d\)"):
        attach(Within(attention), RoutedConfig(["inner"], host="adapter", r=2))
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    attach(Within(attention), RoutedConfig(["inner"], host="adapter", r=2))


def test_the_message_of_a_batch_asks_for_the_order() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    attached = attach(layer, RoutedConfig(["0"], r=2))
    with attached.using(torch.randn(3, 8)):
        with pytest.raises(ValueError, match=r"is a batch of 5 \(samples come first: is it \(T, B"):
            layer(torch.randn(5, 3, 8))
        with pytest.raises(ValueError, match=r"is a batch of 5; nothing is broadcast"):
            layer(torch.randn(5, 4, 8))


class Reads(nn.Module):
    """Takes the weight of `taken`, asks about that of `asked`, fills that of `filled`."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.asked, self.filled = (nn.Linear(8, 8) for _ in range(3))
        nn.init.normal_(self.filled.weight)

    def init_weights(self) -> None:
        nn.init.normal_(
            self.filled.weight,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.asked.weight, torch.Tensor):
            x = x.to(self.asked.weight.dtype)
        return self.asked(x) @ self.taken.weight.unsqueeze(0)


class Inherits(Reads):
    pass


@pytest.mark.parametrize("kind", [Reads, Inherits])
def test_a_weight_that_is_taken(kind: type[Reads]) -> None:
    with pytest.warns(UserWarning, match=rf"target taken: {kind.__name__} reads its weight"):
        attach(kind(), RoutedConfig(["taken"], r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(kind(), RoutedConfig(["asked", "filled"], r=2))


def test_code_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited since its import, or made by hand: nothing is said of it."""
    surroundings._weights_read.cache_clear()
    monkeypatch.setattr(inspect, "getsource", lambda _: "def forward(self, x:\n    (")
    attach(Reads(), RoutedConfig(["taken"], r=2))
    surroundings._weights_read.cache_clear()


class OwnConfig(nn.Module):
    """Says that it generates, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="mine")
        self.inner = nn.Linear(8, 8)

    def can_generate(self) -> bool:
        return True


class OwnLayer(nn.TransformerEncoderLayer):
    """With an attention of another name."""

    def __init__(self) -> None:
        super().__init__(8, 2, 8, batch_first=True)
        self.attention = self.self_attn
        del self.self_attn


def test_models_of_ones_own_are_looked_at_in_peace() -> None:
    attach(OwnConfig(), RoutedConfig(["inner"], r=2, route="self_gram"))
    attach(OwnLayer(), RoutedConfig(["linear1"], r=2, route="self_gram"))


class WithTower(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
        self.tower = ViTModel(ViTConfig(hidden_size=16, image_size=32, **sizes))


def test_what_is_no_decoder_of_texts() -> None:
    model = WithTower(LlamaConfig(**TEXT))
    attach(model, RoutedConfig(r"tower\..*\.(fc1|q_proj)", r=2, route="self_gram")).detach()
    with pytest.raises(ValueError, match="part of a decoder"):
        attach(model, RoutedConfig(r"model\..*\.gate_proj", r=2, route="self_gram"))
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder")
             for what in ("layers", "attention_heads", "ffn_dim")}  # fmt: skip
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_indices=[2])
    detr = DetrForObjectDetection(
        DetrConfig(use_timm_backbone=False, backbone_config=backbone, d_model=16, **sides)
    )
    attach(detr, RoutedConfig(r".*decoder.*\.(fc1|q_proj)", r=2, route="self_gram"))


def test_a_weight_that_is_read_warns() -> None:
    beit: Beit = timm.create_model(
        "beit_base_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=4, num_classes=3
    )
    said = r"target blocks\.0\.attn\.qkv: Attention reads its weight; where it does so instead"
    with pytest.warns(UserWarning, match=said):
        attach(beit, RoutedConfig(["qkv"], r=4, adapted=(0, 2), of=3)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(beit, RoutedConfig(["attn.proj", "fc1"], r=4)).detach()
        attach(beit, RoutedConfig(["head"], r=4)).detach()  # whose weight its class fills
        attach(t5(), RoutedConfig(["wo"], r=2))  # whose weight's type is asked for
        attach(Within(nn.Linear(4, 4)), RoutedConfig(["inner"], r=2))
