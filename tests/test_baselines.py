"""Baselines: what cross-attention is put into, and who has how many parameters."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fused_route import RoutedConfig, RoutingContext, attach
from fused_route.training.baselines import (
    attach_cross_attention,
    matching_inner_rank,
    parameter_table,
    peft_lora,
    plain,
)

D = 16
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
ONE_TOKEN = "x_r has one visual token"


def bert() -> BertModel:
    config = BertConfig(
        vocab_size=20, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=D, n_layer=2, n_head=2, n_positions=16,
                   bos_token_id=0, eos_token_id=0)
    ).eval()  # fmt: skip


FUSED: dict[str, Any] = {"target_modules": ["c_attn"], "adapted": (0, 2), "of": 3}
QUERY_VALUE: dict[str, Any] = {"target_modules": ["query", "value"]}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "query and value": (bert, {**QUERY_VALUE, "r": 8}),
    "fused": (gpt2, {**FUSED, "r": 8, "segments": "joint", "route": "gram"}),
    "widths": (bert, {"target_modules": ["1.output.dense", "key"], "r": 8, "visual_width": 5}),
    "projector": (bert, {**QUERY_VALUE, "r": 8, "visual_width": 5, "projector": "frozen"}),
    "saved": (bert, {**QUERY_VALUE, "r": 8, "modules_to_save": ["pooler.dense"]}),
    "split": (bert, {**QUERY_VALUE, "r": 8, "inner_rank": 4}),
    "biases": (bert, {**QUERY_VALUE, "r": 8, "train": ["host_bias"]}),
}


def count(layer: nn.Module) -> int:
    return sum(p.numel() for k, p in layer.named_parameters() if not k.startswith("base."))


def by_hand(d: int, r: int, k: int, g: int) -> int:
    """Without B: A_text, A_img; W_q, W_k, W_v, W_o; U."""
    return 2 * (k * g * d) + 4 * (k * g) * (k * g) + (r * g) * (k * g)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize(("d", "r"), [(768, 128), (768, 16), (384, 8), (64, 32), (1024, 64)])
def test_the_matching_inner_rank_is_the_largest(d: int, r: int, g: int, heads: int) -> None:
    fitting = [k for k in range(r) if k * g % heads == 0 and by_hand(d, r, k, g) <= r * g * d]
    if fitting[-1]:
        assert matching_inner_rank(d, r, g, heads) == fitting[-1]
    else:
        with pytest.raises(ValueError, match=rf"heads={heads} must divide k·g, where at most k"):
            matching_inner_rank(d, r, g, heads)


def features(config: RoutedConfig, Nv: int = 3) -> Tensor:
    return torch.randn(2, Nv, config.visual_width or D)


@pytest.mark.parametrize("kind", MODELS)
def test_attach_train_detach_restores_bit_for_bit(kind: str) -> None:
    make, arguments = MODELS[kind]
    model, config = make(), RoutedConfig(**arguments)
    next(iter(model.parameters())).requires_grad_(False)
    before = copy.deepcopy(model)
    modules = dict(model.named_modules())
    attached = attach_cross_attention(model, config, heads=2)
    x_r = features(config)
    with attached.using(x_r):
        torch.testing.assert_close(model(IDS)[0], before(IDS)[0], rtol=1e-6, atol=1e-6)

    optimiser = torch.optim.SGD(attached.trainable_parameters(), lr=1.0)
    for _ in range(3):
        with attached.using(x_r):
            out = model(IDS)
        optimiser.zero_grad()
        (out[0][..., 0].sum() + getattr(out, "pooler_output", torch.zeros(())).sum()).backward()
        optimiser.step()
    with attached.using(x_r):
        assert not torch.allclose(model(IDS)[0], before(IDS)[0], atol=1e-4)

    assert attached.detach() is model
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(IDS)[0], before(IDS)[0])
    for (name, now), (_, then) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(now, then) and now.requires_grad == then.requires_grad, name
    with pytest.raises(ValueError, match="detached"):
        attached.detach()
    attach(model, config).detach()


@pytest.mark.parametrize("kind", MODELS)
def test_trains_its_layers_alone_and_never_more_than_routing(kind: str) -> None:
    make, arguments = MODELS[kind]
    config = RoutedConfig(**arguments)
    table = parameter_table(make(), config, heads=1)
    cross, routed = attach_cross_attention(make(), config, heads=1), attach(make(), config)
    mine, theirs = (sum(p.numel() for p in x.trainable_parameters()) for x in (cross, routed))
    assert mine - table["cross-attention"] == theirs - table["routed"]
    for name, layer in cross.layers.items():
        d, r, k, g = layer.d, layer.rank, layer.inner_rank, len(layer.adapted)
        assert count(layer) == by_hand(d, r, k, g) + layer.B.numel()
        assert count(layer) <= count(routed.layers[name])
        assert by_hand(d, r, k + 1, g) + layer.B.numel() > count(routed.layers[name])


def test_layers_take_over_settings_and_training_mode() -> None:
    config = RoutedConfig(**QUERY_VALUE, r=8, alpha=4, dropout=0.1)
    model = bert().train()
    model.encoder.layer[0].eval()
    attached = attach_cross_attention(model, config, inner_rank=6, heads=3)
    for name, layer in attached.layers.items():
        assert (layer.inner_rank, layer.heads, layer.rank, layer.label) == (6, 3, 8, name)
        assert (layer.alpha, layer.dropout, layer.context) == (4, 0.1, attached.context)
        assert layer.training == ("layer.1" in name)


def test_a_shared_module_is_replaced_everywhere() -> None:
    shared = nn.Linear(D, D)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    attached = attach_cross_attention(model, RoutedConfig(["a.0", "b.0"], r=8), heads=1)
    (layer,) = attached.layers.values()
    assert model.get_submodule("a.0") is layer and model.get_submodule("b.0") is layer
    attached.detach()
    assert model.get_submodule("a.0") is shared and model.get_submodule("b.0") is shared


def test_torchs_own_encoder_calls_it() -> None:
    model = encoder().eval()
    attached = attach_cross_attention(model, RoutedConfig(["linear1"], r=8), heads=1)
    nn.init.normal_(attached.layers["linear1"].B)
    outputs, x_h = [], torch.randn(2, 3, D)
    for _ in range(2):
        with attached.using(torch.randn(2, 3, D)), torch.no_grad():
            outputs.append(model(x_h))
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("kind", ["query and value", "fused", "projector", "saved", "biases"])
def test_values_go_through_a_file(kind: str, tmp_path: Path) -> None:
    make, arguments = MODELS[kind]
    base, config = make(), RoutedConfig(**arguments)
    one = attach_cross_attention(copy.deepcopy(base), config, heads=2)
    two = attach_cross_attention(copy.deepcopy(base), config, heads=2)
    for tensor in one.state_dict().values():
        tensor.normal_()
    save_file(one.state_dict(), tmp_path / "baseline.safetensors")
    two.load_state_dict(load_file(tmp_path / "baseline.safetensors"))
    outputs, x_r = [], features(config)
    for attached in (one, two):
        with attached.using(x_r):
            outputs.append(attached.model(IDS))
    assert torch.equal(outputs[0][0], outputs[1][0])
    if kind == "saved":
        assert torch.equal(outputs[0].pooler_output, outputs[1].pooler_output)
    trained = {p.data_ptr() for p in one.trainable_parameters()}
    assert trained <= {tensor.data_ptr() for tensor in one.state_dict().values()}

    state = one.state_dict()
    name = next(iter(state))
    for broken in ({**state, name: torch.zeros(1)}, {**state, "more": torch.zeros(1)}, {}):
        before = {k: v.clone() for k, v in two.state_dict().items()}
        with pytest.raises(ValueError, match="tensors does not fit this model"):
            two.load_state_dict(broken)
        assert all(torch.equal(v, before[k]) for k, v in two.state_dict().items())


NORMED = {**FUSED, "route": "gram", "segments": "joint", "normalize": "unit", "alpha": 2}
ADAPTER: dict[str, Any] = {"target_modules": ["output.dense"], "host": "adapter"}
HOSTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (gpt2, {**NORMED, "dropout": 0.1}),
    "published": (bert, {**QUERY_VALUE, "route": "gram", "transpose": "eccv24"}),
    "pooled": (bert, {**QUERY_VALUE, "pool": "first", "visual_width": 5}),
    "text": (bert, {**QUERY_VALUE, "routed_by": "text"}),
    "adapter": (bert, {**ADAPTER, "activation": "relu", "residual": False}),
    "adapter of a block": (bert, {**ADAPTER, "share": "block"}),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_plain_has_the_same_parameters_and_no_route(kind: str) -> None:
    make, arguments = HOSTS[kind]
    config = RoutedConfig(**arguments)
    without = plain(config)
    assert without.routing().route.name == "none"
    mine, theirs = without.to_json(), config.to_json()
    default = RoutedConfig(["x"], config.host).to_json()
    for key, value in mine.items():
        reset = key in ("transpose", "segments", "pool", "normalize", "inner_rank", "routed_by")
        assert key == "route" or value == (default if reset else theirs)[key], key
    counts = []
    for given in (config, without):
        attached = attach(make(), given, RoutingContext())  # shared: a prefix may be projected
        counts.append(sum(p.numel() for p in attached.trainable_parameters()))
    assert counts[0] == counts[1]
    table = parameter_table(make(), config, heads=1)
    assert table["routed"] == table["plain"]
    alone = attach(make(), without)
    assert sum(p.numel() for p in alone.trainable_parameters()) == table["plain"]
    if config.visual_width is None:
        assert table["routed"] == counts[0]


def test_the_table_is_counted_by_hand_and_changes_nothing() -> None:
    model, config = gpt2(), RoutedConfig(**FUSED, r=8)
    before, generator = state_of(model), torch.get_rng_state()
    table = parameter_table(model, config, heads=2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert state_of(model) == before
    # R·d + g·n·r, with R = 16, d = 16; PEFT's r' (16 + 48), r' = 8
    assert table["routed"] == table["plain"] == 2 * (16 * D + 2 * D * 8)
    assert table["PEFT LoRA"] == 2 * 8 * (D + 3 * D)
    k = matching_inner_rank(D, 8, 2, 2)
    assert table["cross-attention"] == 2 * (by_hand(D, 8, k, 2) + 2 * D * 8)


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("kind", ["query and value", "fused", "widths"])
def test_pefts_lora_is_the_closest(kind: str, r: int) -> None:
    from peft import inject_adapter_in_model

    make, arguments = MODELS[kind]
    config = RoutedConfig(**{**arguments, "r": r, "alpha": 2.0 * r})
    model = make()
    matched = peft_lora(model, config)
    layers = attach(make(), config).layers
    routed = sum(count(layer) for layer in layers.values())
    assert matched.difference == matched.parameters - routed
    inject_adapter_in_model(matched.config, model)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert sum(p.numel() for p in lora.values()) == matched.parameters
    assert {name.partition(".lora_")[0] for name in lora} == set(layers)
    step = matched.parameters // matched.config.r
    assert abs(matched.difference) <= step / 2
    assert matched.config.lora_alpha / matched.config.r == 2.0
    if kind == "query and value":
        assert (matched.config.r, matched.difference) == (r, 0)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 12, batch_first=True)


def attached_already() -> nn.Module:
    model = bert()
    attach_cross_attention(model, RoutedConfig(**QUERY_VALUE, r=8), heads=1)
    return model


def routed_already() -> nn.Module:
    model = bert()
    attach(model, RoutedConfig(**QUERY_VALUE))
    return model


LORA = RoutedConfig(**QUERY_VALUE, r=8)
ONLY_ADAPTER = "config must be a RoutedConfig with host='lora', got host='adapter'"
MANY = r"heads=4 must divide k·g, where at most k = 2 \(with g = 1\) .* rank=8 and d=16"
BAD: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "no model": (dict, LORA, {}, "model must be a torch module, got dict"),
    "no config": (bert, "query", {}, "config must be a RoutedConfig .*, got 'query'"),
    "adapter": (bert, RoutedConfig(**ADAPTER), {}, ONLY_ADAPTER),
    "context": (bert, LORA, {"context": 3}, "context must be a RoutingContext, got int"),
    "nothing": (bert, RoutedConfig(["q_proj"]), {}, "matches no module"),
    "twice": (attached_already, LORA, {}, "model has cross-attention already"),
    "routed": (routed_already, LORA, {}, "model has a routed layer already"),
    "no place": (encoder, RoutedConfig(["self_attn.out_proj"]), {}, "nn.MultiheadAttention"),
    "heads": (
        bert,
        LORA,
        {"heads": 3, "inner_rank": 4},
        r"target encoder.layer.0.*query: heads must divide inner_rank · g = 4, got 3",
    ),
    "no heads": (bert, LORA, {"heads": 0}, "heads must be a whole number of at least 1, got 0"),
    "too many heads": (bert, LORA, {"heads": 4}, MANY),
    "no inner rank": (bert, LORA, {"inner_rank": 0}, "inner_rank must be .* at least 1, got 0"),
}


def state_of(model: Any) -> list[Any]:
    is_model = isinstance(model, nn.Module)
    return [*model.modules(), *(p.requires_grad for p in model.parameters())] if is_model else []


@pytest.mark.parametrize("kind", BAD)
def test_refused_and_nothing_changed(kind: str) -> None:
    make, config, given, message = BAD[kind]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        attach_cross_attention(model, config, **given)
    assert state_of(model) == before


def test_peft_is_for_lora() -> None:
    with pytest.raises(ValueError, match=ONLY_ADAPTER):
        peft_lora(bert(), RoutedConfig(**ADAPTER))
