"""Layers routed by text: their own or the encoder's, pooled over valid tokens."""

from typing import Any

import pytest
import torch
from test_attach import bart, bert, gpt2
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    BloomConfig,
    BloomModel,
    CLIPTextConfig,
    CLIPTextModel,
    MambaConfig,
    MambaModel,
    OpenAIGPTConfig,
    OpenAIGPTModel,
    T5Config,
    T5Model,
)

from fused_route import RoutedAdapter, RoutedConfig, RoutedLinear, attach, masked_mean

D = 8
IDS = torch.tensor([[3, 4, 5, 6], [6, 7, 1, 1]])
VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def t5() -> T5Model:
    return T5Model(
        T5Config(vocab_size=20, d_model=D, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
                 decoder_start_token_id=0, pad_token_id=0)
    ).eval()  # fmt: skip


def drawn(attached: Any) -> Any:
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    return attached


def test_masked_mean() -> None:
    states = torch.randn(2, 4, D)
    expected = torch.stack([states[0].mean(0), states[1, :2].mean(0)]).unsqueeze(1)
    states[1, 2:] = float("nan")
    torch.testing.assert_close(masked_mean(states, VALID), expected)
    torch.testing.assert_close(masked_mean(states[:1]), states[:1].mean(1, keepdim=True))
    assert not masked_mean(states, torch.zeros(2, 4).int()).any()
    assert masked_mean(torch.randn(2, 0, D)).shape == (2, 1, D)
    with pytest.raises(
        ValueError, match=r"states must be a floating-point tensor \(B, T, d\), got .*\(2, 8\)"
    ):
        masked_mean(torch.randn(2, D))
    with pytest.raises(
        ValueError,
        match=r"mask must be a bool or integer tensor \(B, T\) = \(2, 4\) on cpu, got .*\(2, 3\)",
    ):
        masked_mean(states, VALID[:, :3])


@pytest.mark.parametrize("route", ["add", "mul", "gram", "ones_relu"])
@pytest.mark.parametrize("host", ["linear", "adapter"])
def test_routed_by_ones_own_text(host: str, route: str) -> None:
    """The formula, and each valid token's share of the gradient that goes through the mean."""
    layer: Any = (
        RoutedAdapter(D, 3, route, routed_by="text")
        if host == "adapter"
        else RoutedLinear(nn.Linear(D, D), 3, route=route, routed_by="text")
    )
    nn.init.normal_(layer.B)
    layer.double()
    x_h = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    with layer.context.using(text_mask=VALID):
        ours = layer(x_h)
    weights = VALID / VALID.sum(1, keepdim=True)
    x_r = torch.einsum("bt,btd->bd", weights.double(), x_h)
    layer.routed_by = "image"
    with layer.context.using(x_r):
        theirs = layer(x_h)
    torch.testing.assert_close(ours, theirs)
    mine, expected = (torch.autograd.grad(y.sin().sum(), x_h)[0] for y in (ours, theirs))
    torch.testing.assert_close(mine, expected)


def test_a_text_mask_is_needed_and_must_fit() -> None:
    layer = RoutedAdapter(D, 3, routed_by="text")
    x_h = torch.randn(2, 4, D)
    with pytest.raises(ValueError, match="does not know which tokens are padding"):
        layer(x_h)
    with layer.context.using(torch.randn(2, D)), pytest.raises(ValueError, match="padding"):
        layer(x_h)
    with (
        layer.context.using(text_mask=VALID[:, :2]),
        pytest.raises(ValueError, match="mask must be"),
    ):
        layer(x_h)
    with layer.context.using(text_mask="all"):
        assert layer(x_h).shape == x_h.shape
    for wrong in (torch.ones(3), "none", 3):
        with pytest.raises(ValueError, match=r"text_mask must be a tensor \(B, T\) or 'all'"):
            layer.context.set(text_mask=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x_r is missing: give features"):
        layer.context.set()
    with pytest.raises(ValueError, match="routed_by must be one of image, text; got 'encoder'"):
        RoutedAdapter(D, 3, routed_by="encoder")


ENCODERS = {"bart": (bart, ["fc1"], "encoder"), "t5": (t5, ["q"], "encoder")}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_own_text(name: str) -> None:
    make, targets, part = ENCODERS[name]
    model: Any = make()
    regex = rf"{part}\..*\.({'|'.join(targets)})"
    attached = drawn(attach(model, RoutedConfig(regex, r=3, routed_by="text")))
    call = {"decoder_input_ids": IDS[:, :2]}
    y = model(input_ids=IDS, attention_mask=VALID, **call).encoder_last_hidden_state
    other = IDS.clone()
    other[1, 2:] = 9  # what is padding
    again = model(input_ids=other, attention_mask=VALID, **call).encoder_last_hidden_state
    torch.testing.assert_close(y[VALID.bool()], again[VALID.bool()])
    alone = model(input_ids=IDS[1:, :2], decoder_input_ids=IDS[1:, :2]).encoder_last_hidden_state
    torch.testing.assert_close(y[1:, :2], alone, rtol=1e-4, atol=1e-5)
    assert repr(attached.context) == "RoutingContext(empty)"
    assert attached.context._thread.held.text_mask is None  # and set back
    attached.detach()
    assert not model.get_encoder()._forward_pre_hooks and not model.get_encoder()._forward_hooks


DECODERS = {"bart": (bart, "fc1"), "t5": (t5, "q")}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_routed_by_the_encoder(name: str) -> None:
    make, target = DECODERS[name]
    model: Any = make()
    attached = drawn(
        attach(model, RoutedConfig(rf"decoder\..*\.{target}", r=3, routed_by="encoder"))
    )
    seen: list[Tensor] = []
    layer: Any = next(iter(attached.layers.values()))
    layer.register_forward_pre_hook(
        lambda module, args: seen.append(attached.context.get(D, "test").x_r)
    )
    out = model(input_ids=IDS, attention_mask=VALID, decoder_input_ids=IDS[:, :3])
    torch.testing.assert_close(seen[0], masked_mean(out.encoder_last_hidden_state, VALID))
    shorter = model(input_ids=IDS, attention_mask=VALID, decoder_input_ids=IDS[:, :2])
    torch.testing.assert_close(  # no token saw a later one
        out.last_hidden_state[:, :2], shorter.last_hidden_state, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="has no routing input"):
        layer(torch.randn(2, 3, D))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_beams(beams: int) -> None:
    model: Any = BartForConditionalGeneration(bart().config).eval()
    model.generation_config.forced_eos_token_id = None
    drawn(attach(model, RoutedConfig(r".*decoder.*\.(fc1|v_proj)", r=3, routed_by="encoder")))
    settings = {"num_beams": beams, "max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    together = model.generate(IDS, attention_mask=VALID, **settings)
    alone = [
        model.generate(IDS[:1], attention_mask=VALID[:1], **settings),
        model.generate(IDS[1:, :2], attention_mask=VALID[1:, :2], **settings),
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(
        together, model.generate(IDS, attention_mask=VALID, use_cache=False, **settings)
    )


def test_what_would_read_the_future_is_refused() -> None:
    refused: list[tuple[nn.Module, Any, str, str]] = [
        (gpt2(), ["c_attn"], "text", r"routed_by='text' lets a token see later ones"),
        (bart(), r"decoder\..*\.fc1", "text", "routed_by='text' lets a token see later ones"),
        (t5(), r"decoder\..*\.q", "text", "routed_by='text' lets a token see later ones"),
        (bart(), ["fc1"], "encoder", r"encoder\.layers\.0\.fc1 is not part of the decoder"),
        (bert(), ["query"], "encoder", "BertModel is no encoder-decoder model"),
        (gpt2(), ["c_attn"], "encoder", "GPT2LMHeadModel is no encoder-decoder model"),
    ]
    for model, targets, routed_by, message in refused:
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            attach(model, RoutedConfig(targets, r=2, routed_by=routed_by))
        assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(ValueError, match="inner_rank and routed_by have no meaning"):
        RoutedConfig(["a"], route="none", routed_by="text")
    with pytest.raises(ValueError, match="visual_width has no meaning for routed_by='text'"):
        RoutedConfig(["a"], routed_by="text", visual_width=4)


TINY: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1}
DECODER_ONLY: dict[str, tuple[Any, list[str]]] = {
    "bloom": (lambda: BloomModel(BloomConfig(**TINY, n_head=2)), ["dense_h_to_4h"]),
    "mamba": (lambda: MambaModel(MambaConfig(**TINY, state_size=4)), ["in_proj"]),
    "openai": (
        lambda: OpenAIGPTModel(OpenAIGPTConfig(vocab_size=20, n_embd=8, n_layer=1, n_head=2)),
        ["c_fc"],
    ),
    "clip text": (
        lambda: CLIPTextModel(
            CLIPTextConfig(**TINY, intermediate_size=12, num_attention_heads=2, eos_token_id=2)
        ),
        ["fc1"],
    ),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", DECODER_ONLY)
def test_decoders_of_all_kinds_are_known(name: str, wrapped: bool) -> None:
    make, targets = DECODER_ONLY[name]
    model = nn.ModuleDict({"language_model": make()}) if wrapped else make()
    settings: list[dict[str, Any]] = [{"routed_by": "text"}, {"route": "self_gram"}]
    for setting in settings:
        with pytest.raises(ValueError, match="which is part of a decoder"):
            attach(model, RoutedConfig(targets, r=2, **setting))


@pytest.mark.parametrize("make", [bert, lambda: nn.ModuleDict({"text": bert()})])
def test_encoders_are_not_decoders(make: Any) -> None:
    assert attach(make(), RoutedConfig(["query"], r=2, route="self_gram")).layers


def test_long_texts_in_half_precision() -> None:
    states = (torch.randn(1, 8192, 2) + 20).half()
    for mask in (None, torch.ones(1, 8192, dtype=torch.bool)):
        torch.testing.assert_close(
            masked_mean(states, mask), torch.full((1, 1, 2), 20.0).half(), rtol=0.01, atol=0.1
        )
    with pytest.raises(ValueError, match=r"mask must be a bool or integer .*: mask\.bool\(\)"):
        masked_mean(states, torch.zeros(1, 8192))


def test_what_meets_A_is_pooled() -> None:
    adapter = RoutedAdapter(D, 3, "mul", norm="before", routed_by="text")
    nn.init.normal_(adapter.B)
    assert adapter.norm_bias is not None
    nn.init.normal_(adapter.norm_bias)
    x_h = torch.randn(2, 4, D) * 30
    with adapter.context.using(text_mask="all"):
        ours = adapter(x_h)
    adapter.routed_by = "image"
    with adapter.context.using(adapter._normed(x_h).mean(1)):
        torch.testing.assert_close(ours, adapter(x_h))


def test_models_may_be_called_by_position() -> None:
    model: Any = bart()
    attached = drawn(attach(model, RoutedConfig(r"encoder\..*\.fc1", r=3, routed_by="text")))
    assert attached.layers
    encoder = model.get_encoder()
    expected = encoder(input_ids=IDS, attention_mask=VALID).last_hidden_state
    assert torch.equal(encoder(IDS, VALID).last_hidden_state, expected)


def test_a_hook_that_fails_in_front_of_ours() -> None:
    model: Any = bart()

    def fails(*_: Any) -> None:
        raise RuntimeError("in front")

    model.get_encoder().register_forward_pre_hook(fails)
    attached = drawn(attach(model, RoutedConfig(r"encoder\..*\.fc1", r=3, routed_by="text")))
    with attached.using(torch.randn(2, D)):
        with pytest.raises(RuntimeError, match="in front"):
            model(input_ids=IDS)
        assert attached.context.get(D, "test").batch_size == 2


def test_an_encoder_alone_is_told_its_mask() -> None:
    model: Any = bert()
    attached = drawn(attach(model, RoutedConfig(["query"], r=3, routed_by="text")))
    with attached.using(text_mask=VALID):
        y = model(IDS, attention_mask=VALID)[0]
    with attached.using(text_mask="all"):
        alone = model(IDS[1:, :2])[0]
    torch.testing.assert_close(y[1:, :2], alone, rtol=1e-4, atol=1e-5)


def test_hooks_set_back_after_an_error() -> None:
    model: Any = bart()
    attached = drawn(attach(model, RoutedConfig(r"decoder\..*\.fc1", r=3, routed_by="encoder")))
    image = torch.randn(2, D)
    with attached.using(image):
        for _ in range(2):
            with pytest.raises(ValueError, match="the decoder was called without the encoder's"):
                model.get_decoder()(input_ids=IDS)
        assert torch.equal(attached.context.get(D, "test").x_r[:, 0], image)
    assert attached.context._thread.before == []
