"""Attaching to models and detaching; which modules are found; what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fused_route import (
    Attached,
    RoutedAdapter,
    RoutedConfig,
    RoutedLinear,
    RoutingContext,
    VisualProjector,
    attach,
)

QUERY_VALUE = r".*attention\.self\.(query|value)"


def bert(layers: int = 3) -> BertModel:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=True).eval()


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16,
                   bos_token_id=0, eos_token_id=0, **settings)
    ).eval()  # fmt: skip


def bart() -> BartModel:
    return BartModel(
        BartConfig(
            vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=12,
            decoder_ffn_dim=12, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=16,
        )
    ).eval()  # fmt: skip


IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def pooled(out: Any) -> Tensor:
    return getattr(out, "pooler_output", torch.zeros(()))


def train_a_little(attached: Attached, features: Tensor) -> None:
    optimiser = torch.optim.SGD(attached.trainable_parameters(), lr=1.0)
    for _ in range(3):
        with attached.using(features):
            out: Any = attached.model(IDS)
        optimiser.zero_grad()
        (out[0][..., 0].sum() + pooled(out).square().sum()).backward()
        optimiser.step()


CONFIGS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "suffixes": (bert, {"target_modules": ["query", "value"]}, 6),
    "regex": (bert, {"target_modules": QUERY_VALUE}, 6),
    "name": (bert, {"target_modules": ("encoder.layer.1.attention.self.query",)}, 1),
    "layers": (bert, {"target_modules": ["query"], "layers_to_transform": (0, 2)}, 2),
    "pattern": (
        bert,
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
        1,
    ),
    "conv1d": (
        gpt2,
        {"target_modules": ["c_attn"], "adapted": (0, 2), "of": 3, "route": "gram"},
        2,
    ),
    "adapter": (
        bert,
        {"target_modules": ["attention.output.dense", "output.dense"], "host": "adapter"},
        6,
    ),
    "projector": (bert, {"target_modules": ["query"], "visual_width": 5}, 3),
    "frozen projector": (
        bert,
        {"target_modules": ["query"], "visual_width": 5, "projector": "frozen"},
        3,
    ),
    "two widths": (
        bert,
        {"target_modules": [r"layer.0.output.dense", "query"], "visual_width": 8},
        4,
    ),
    "saved": (bert, {"target_modules": ["query"], "modules_to_save": ["pooler.dense"]}, 3),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_attach_train_detach_restores_bit_for_bit(kind: str) -> None:
    make, arguments, layers = CONFIGS[kind]
    model = make()
    before = copy.deepcopy(model)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    attached = attach(model, RoutedConfig(**arguments))
    assert len(attached.layers) == layers
    features = torch.randn(2, 3, arguments.get("visual_width", 8))

    with attached.using(features):
        same = model(IDS)[0]
    torch.testing.assert_close(
        same, before(IDS)[0], rtol=1e-6, atol=1e-6
    )  # B = 0, adapters residual
    train_a_little(attached, features)
    with attached.using(features):
        assert not torch.allclose(model(IDS)[0], before(IDS)[0], atol=1e-4)

    assert attached.detach() is model
    assert torch.equal(model(IDS)[0], before(IDS)[0])
    assert list(model.state_dict()) == list(before.state_dict())
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert [m for m, _ in model.named_modules()] == [m for m, _ in before.named_modules()]
    expected = {name: p is not frozen for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected
    with pytest.raises(ValueError, match="detached"):
        attached.detach()


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_what_was_asked_for_trains(kind: str) -> None:
    make, arguments, _ = CONFIGS[kind]
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attached = attach(model, RoutedConfig(**arguments))
    saved = [f"{name}." for name in arguments.get("modules_to_save", ())]
    train_a_little(attached, torch.randn(2, arguments.get("visual_width", 8)))
    for name, parameter in model.named_parameters():
        original = name.replace(".base.", ".")
        if original in before:
            changed = any(original.startswith(item) for item in saved)
            assert parameter.requires_grad == changed
            assert torch.equal(parameter, before[original]) != changed, name
        else:
            is_frozen = name.startswith("visual_projector") and kind == "frozen projector"
            assert parameter.requires_grad != is_frozen, name


def test_two_lines_count_what_trains() -> None:
    attached = attach(bert(), RoutedConfig(["query", "value"], r=2))
    assert sum(p.numel() for p in attached.trainable_parameters()) == 6 * (2 * 8 + 8 * 2)
    assert "6 layers, route=mul, r=2, 192 of" in repr(attached)


def test_hosts_sit_where_the_paper_has_them() -> None:
    model = bert()
    attached = attach(model, RoutedConfig(["attention.output.dense"], host="adapter", r=2))
    adapted = model.get_submodule("encoder.layer.0.attention.output.dense")
    assert isinstance(adapted.adapter, RoutedAdapter)
    assert isinstance(adapted.base, nn.Linear) and adapted.weight is adapted.base.weight
    attached.detach()
    attach(model, RoutedConfig(["query"], r=2))
    linear = model.get_submodule("encoder.layer.0.attention.self.query")
    assert isinstance(linear, RoutedLinear) and linear.weight is linear.base.weight


def test_a_shared_module_is_wrapped_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Twice()
    attached = attach(model, RoutedConfig(["first", "second"]))
    assert len(attached.layers) == 1 and model.first is model.second
    attached.detach()
    assert isinstance(model.first, nn.Linear) and model.first is model.second


def test_train_mode_and_copies_follow() -> None:
    model = bert()
    attach(model, RoutedConfig(["query"], dropout=0.5))
    assert not model.get_submodule("encoder.layer.0.attention.self.query").training
    copied = copy.deepcopy(model)
    contexts = {m.context for m in copied.modules() if isinstance(m, RoutedLinear)}
    assert len(contexts) == 1


def test_self_gram_reads_the_future_so_decoders_refuse_it() -> None:
    config: dict[str, Any] = {"route": "self_gram", "r": 2}
    for model, target in (
        (gpt2(), "attn.c_proj"),
        (gpt2(), "transformer.h.0.mlp.c_fc"),
        (bart(), "decoder.layers.0.self_attn.q_proj"),
        (bart(), "decoder.layers.0.fc1"),
    ):
        with pytest.raises(ValueError, match="part of a decoder"):
            attach(model, RoutedConfig([target], **config))
    attach(bart(), RoutedConfig(["encoder.layers.0.self_attn.q_proj"], **config))
    attach(bart(), RoutedConfig(["encoder.layers.0.fc1"], **config))
    attached = attach(bert(), RoutedConfig(["query"], **config))
    with attached.using(torch.randn(2, 8)):
        assert attached.model(IDS)[0].isfinite().all()


@pytest.mark.parametrize("clear", ["using", "sticky"])
def test_gradient_checkpointing_of_a_hugging_face_model(clear: str) -> None:
    model = bert().train()
    attached = attach(model, RoutedConfig(["query"]))
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    images = torch.randn(2, 2, 8)

    def gradients() -> list[Tensor]:
        total = torch.zeros(())
        for image in images:  # two forwards, then one backward
            torch.manual_seed(0)
            if clear == "using":
                with attached.using(image):
                    total = total + model(IDS)[0][..., 0].sum()
            else:
                attached.context.set(image)
                total = total + model(IDS)[0][..., 0].sum()
        return list(torch.autograd.grad(total, [layer.A for layer in attached.layers.values()]))

    expected = gradients()
    attached.checkpoint_activations()
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        with pytest.raises(ValueError, match=f"{name}=.*use_reentrant and context_fn are set here"):
            attached.checkpoint_activations(**{name: {"use_reentrant": True}})
    plain = attach(nn.Sequential(nn.Linear(8, 8)), RoutedConfig(["0"]))
    with pytest.raises(ValueError, match="has no activation_checkpointing_enable"):
        plain.checkpoint_activations()


def test_running_statistics_and_integer_buffers_come_back() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.head = (
                nn.Linear(8, 8),
                nn.BatchNorm1d(8),
                nn.BatchNorm1d(8),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.linear(x)))

    model = Normed()
    before = copy.deepcopy(model)
    attached = attach(model, RoutedConfig(["linear"], modules_to_save=["head"]))
    assert "base_model.model.head.num_batches_tracked" in attached.tensors()
    with attached.using(torch.randn(4, 8)):
        model(torch.randn(4, 8)).square().sum().backward()
    attached.detach()
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.grad is None for p in model.parameters())


def test_modes_of_submodules_are_left_alone() -> None:
    model = bert().train()
    frozen = model.get_submodule("encoder.layer.0.attention.self.query")
    frozen.eval()
    attach(model, RoutedConfig(["query"]))
    now = model.get_submodule("encoder.layer.0.attention.self.query")
    assert not now.training and not now.base.training
    assert model.get_submodule("encoder.layer.1.attention.self.query").training


def test_one_context_for_two_models_and_a_projector_of_ones_own() -> None:
    context = RoutingContext(VisualProjector(5, {8}))
    one, two = (attach(bert(), RoutedConfig(["query"]), context) for _ in range(2))
    assert not any("visual_projector" in name for name in one.tensors())
    with context.using(torch.randn(2, 5)):
        one.model(IDS)
        two.model(IDS)
        one.detach()
        two.model(IDS)
    with pytest.raises(ValueError, match="context has a projector already"):
        attach(one.model, RoutedConfig(["query"], visual_width=5), context)
    projected = attach(one.model, RoutedConfig(["query"], visual_width=5))
    assert projected.context.projector is projected.projector is not None
    projected.detach()
    assert projected.context.projector is None


def test_projector_follows_the_model() -> None:
    model = bert().to(torch.bfloat16)
    attached = attach(model, RoutedConfig(["query"], visual_width=5))
    with attached.using(torch.randn(2, 5)):  # features in fp32
        assert model(IDS)[0].dtype == torch.bfloat16
    assert attached.projector is not None and not attached.projector.training
    attached.detach()
    same = attach(model, RoutedConfig(["query"], visual_width=8))
    assert same.projector is None


class Prefixed(nn.Module):
    """A model that has a context of its own, and may say whether it reads it."""

    def __init__(self, **says: bool) -> None:
        super().__init__()
        self.bert, self.context = bert(), RoutingContext()
        for name, value in says.items():
            setattr(self, name, value)


READERS: dict[str, tuple[Callable[[], nn.Module], str, RoutingContext | None, bool]] = {
    "layers": (bert, "mul", None, True),
    "nothing": (bert, "none", None, False),
    "a context that is shared": (bert, "none", RoutingContext(), True),
    "the model": (Prefixed, "none", None, True),
    "not the model": (lambda: Prefixed(reads_routing_input=False), "none", None, False),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_projector_is_added_where_something_reads_it(reader: str) -> None:
    make, route, context, is_added = READERS[reader]
    attached = attach(make(), RoutedConfig(["query"], route=route, visual_width=5), context)
    assert (attached.projector is not None) == is_added
    if reader == "nothing":
        attached.model(IDS)[0].sum().backward()  # as the plain LoRA that it is
        assert all(p.grad is not None for p in attached.trainable_parameters())
