"""Adapters after and before modules and norms, shared or not; and what of a model trains."""

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, module_compared
from test_attach import IDS, bart, bert, gpt2
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fused_route import Attached, RoutedAdapter, RoutedConfig, RoutedLinear, attach
from fused_route.modules import AdaptedModule
from fused_route.testing import assert_as_good_as_eager

IMAGE = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def drawn(attached: Attached) -> Attached:
    """With up-projections that show."""
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    return attached


def run(attached: Attached) -> Tensor:
    with attached.using(IMAGE):
        out: Any = attached.model(IDS)
    return out[0]


class Block(nn.Module):
    """A pre-norm block with a projection, as small as one can be."""

    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.dense = nn.Linear(8, 8)
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.dense(self.ln(x)))


BLOCK_POSITIONS = {
    "post_module": (["dense"], "after", lambda b, f, x: x + f(b.dense(b.ln(x)))),
    "pre_module": (["dense"], "before", lambda b, f, x: x + b.dense(f(b.ln(x)))),
    "pre_norm": (["ln"], "before", lambda b, f, x: x + b.dense(b.ln(f(x)))),
    "post_norm": (["ln"], "after", lambda b, f, x: x + b.dense(f(b.ln(x)))),
}


@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", BLOCK_POSITIONS)
def test_position_is_where_the_formula_says(name: str, residual: bool, norm: str) -> None:
    targets, position, formula = BLOCK_POSITIONS[name]
    block, x = Block(), torch.randn(2, 3, 8)
    attached = attach(
        block,
        RoutedConfig(
            targets, host="adapter", r=3, position=position, residual=residual, norm=norm,
            activation="silu",
        ),
    )  # fmt: skip
    adapter: Any = next(iter(attached.layers.values()))
    if residual:  # starts as the identity
        with attached.using(IMAGE):
            torch.testing.assert_close(block(x), formula(Block_of(block), lambda h: h, x))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)

    def by_hand(h: Tensor) -> Tensor:
        inside = h
        if norm == "before":
            inside = nn.functional.layer_norm(h, (8,), adapter.norm_weight, adapter.norm_bias)
        x_t = inside @ adapter.A.T + adapter.b_A
        x_v = IMAGE[:, None] @ adapter.A.T + adapter.b_A
        y = nn.functional.silu(x_t * x_v) @ adapter.B.T + adapter.b_B
        if norm == "after":
            y = nn.functional.layer_norm(y, (8,), adapter.norm_weight, adapter.norm_bias)
        return h + y if residual else y

    with attached.using(IMAGE):
        torch.testing.assert_close(block(x), formula(Block_of(block), by_hand, x))
    gradients = torch.autograd.grad(
        formula(Block_of(block), by_hand, x).sum(), list(adapter.parameters())
    )
    assert all(g.any() for g in gradients)
    assert len(gradients) == (4 if norm == "none" else 6)


def Block_of(block: Block) -> Block:
    """The block without its adapters: the same modules."""
    plain = Block()
    for name in ("ln", "dense", "drop"):
        module: Any = getattr(block, name)
        setattr(plain, name, module.base if isinstance(module, AdaptedModule) else module)
    return plain


def test_a_norm_after_it_can_learn_from_the_identity() -> None:
    adapter = RoutedAdapter(8, 3, "none", norm="after")
    x = torch.randn(2, 3, 8)
    y = adapter(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert adapter.norm_weight is not None and adapter.norm_weight.grad is not None
    assert adapter.norm_weight.grad.any()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["before", "after"])
def test_norms_around_the_kernels(norm: str, residual: bool, dtype: torch.dtype) -> None:
    adapter = RoutedAdapter(8, 3, "mul", norm=norm, residual=residual)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    assert_as_good_as_eager(
        *module_compared(adapter, torch.randn(3, 9, 8), torch.randn(3, 8), dtype)
    )


PLACES = {
    "whole attention": (bert, ["attention"], "after"),
    "whole attention before": (bert, ["attention"], "before"),
    "gpt2 attention": (gpt2, ["attn"], "after"),
    "gpt2 dropout": (gpt2, ["attn.resid_dropout"], "after"),
    "gpt2 norms": (gpt2, ["ln_1", "ln_2"], "before"),
    "bart attention": (bart, ["self_attn"], "before"),
    "bert norms": (bert, ["LayerNorm"], "after"),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_in_hugging_face_models(name: str) -> None:
    make, targets, position = PLACES[name]
    model = make()
    with torch.no_grad():
        before = model(IDS)[0]
    attached = attach(model, RoutedConfig(targets, host="adapter", position=position, r=4))
    torch.testing.assert_close(run(attached), before)
    assert (run(drawn(attached)) - before).abs().max() > 1e-3
    run(attached).sum().backward()
    assert all(layer.A.grad is not None for layer in attached.layers.values())
    attached.detach()
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], before)


def test_multihead_attention_as_a_whole() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    attached = attach(Attends(), RoutedConfig(["attention"], host="adapter", r=2))
    x = torch.randn(2, 3, 8)
    with attached.using(IMAGE):
        assert attached.model(x).shape == (2, 3, 8)


@pytest.mark.parametrize("share", ["none", "block"])
def test_adapters_are_shared_by_block_or_not(share: str, tmp_path: Any) -> None:
    config = RoutedConfig(["attn", "mlp"], host="adapter", share=share, r=4)
    model = gpt2()
    attached = drawn(attach(model, config))
    assert len(attached.layers) == 4
    assert len(set(map(id, attached.layers.values()))) == (2 if share == "block" else 4)
    assert len(attached.tensors()) == 4 * (2 if share == "block" else 4)
    expected = run(attached)
    attached.save(tmp_path)
    attached.detach()
    again = attach(model, tmp_path)
    assert torch.equal(run(again), expected)


def test_what_cannot_be_placed_is_refused() -> None:
    plain = nn.ModuleDict({"a": nn.Identity(), "b": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="target a: Identity does not tell how wide"):
        attach(plain, RoutedConfig(["a"], host="adapter"))
    with pytest.raises(ValueError, match="target b: share='block', but its name has no layer"):
        attach(plain, RoutedConfig(["b"], host="adapter", share="block"))
    widths = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6)})])
    with pytest.raises(ValueError, match="share='block', but 0 has targets 8 and 6 wide"):
        attach(widths, RoutedConfig(["a", "b"], host="adapter", share="block"))
    for setting in ({"norm": "before"}, {"position": "before"}, {"share": "block"}):
        with pytest.raises(ValueError, match="has no meaning for host='lora'"):
            RoutedConfig(["a"], **setting)  # type: ignore[arg-type]
    adapted = AdaptedModule(nn.Linear(8, 8), RoutedAdapter(8, 2, "none"), "before")
    with pytest.raises(ValueError, match="nothing to adapt in front of it"):
        adapted(input=torch.randn(1, 2, 8))
    assert adapted(torch.randn(1, 2, 8)).shape == (1, 2, 8) and adapted.in_features == 8


def test_an_adapter_is_as_its_target_is() -> None:
    """Mode, device and dtype of what it is put to, also where that tells no weight itself."""
    for targets in (["attn"], ["attn.resid_dropout"], ["ln_1"]):
        model = gpt2().to(torch.bfloat16).eval()
        attached = attach(model, RoutedConfig(targets, host="adapter", r=2, dropout=0.5))
        expected = torch.float32 if targets == ["attn.resid_dropout"] else torch.bfloat16
        for layer in attached.layers.values():
            assert not layer.training and layer.A.dtype == expected
        attached.detach()
        attached = attach(model.train(), RoutedConfig(targets, host="adapter", r=2))
        assert all(layer.training for layer in attached.layers.values())


def test_width_is_that_of_the_side_it_stands_on() -> None:
    model = nn.ModuleDict({"dense": nn.Linear(8, 6)})
    for position, width in (("before", 8), ("after", 6)):
        attached = attach(model, RoutedConfig(["dense"], host="adapter", position=position, r=2))
        assert attached.layers["dense"].d == width
        attached.detach()
    adapter = RoutedAdapter(8, 2, "none")
    with pytest.raises(
        ValueError, match=r"x_h must be \(…, 8\) for RoutedAdapter, got .*\(2, 3, 6\)"
    ):
        adapter(torch.randn(2, 3, 6))


def test_in_front_of_a_module_it_adapts_the_hidden_states() -> None:
    class Cross(nn.Module):
        def forward(self, other: Tensor, hidden_states: Tensor) -> Tensor:
            return other + hidden_states

    adapter = RoutedAdapter(8, 2, "none")
    nn.init.normal_(adapter.B)
    x, other = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    adapted = AdaptedModule(Cross(), adapter, "before")
    torch.testing.assert_close(adapted(other, hidden_states=x), other + adapter(x))
    with pytest.raises(ValueError, match="would adapt the query and neither key nor value"):
        AdaptedModule(nn.MultiheadAttention(8, 2), adapter, "before")


def llama(**settings: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2, **settings)
    )  # fmt: skip


def test_norms_of_other_kinds_and_other_indices() -> None:
    attached = attach(llama(), RoutedConfig(["q_proj"], train=("norms",)))
    assert sum("norm" in name for name in attached.tensors()) == 4  # not the last, in no block
    towers = nn.ModuleList(
        nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}) for _ in "ab"
    )
    config: dict[str, Any] = {
        "target_modules": ["dense"],
        "host": "adapter",
        "share": "block",
        "r": 2,
    }
    assert len(set(attach(towers, RoutedConfig(**config)).layers.values())) == 2
    towers = nn.ModuleList(
        nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}) for _ in "ab"
    )
    by_layer = attach(towers, RoutedConfig(**config, layers_pattern="layers", train=("norms",)))
    assert len(set(by_layer.layers.values())) == 4
    assert sum("ln" in name for name in by_layer.tensors()) == 8
    with pytest.raises(ValueError, match="without layers_to_transform, share='block' or train"):
        RoutedConfig(["dense"], layers_pattern="layers")


def test_heads_of_other_models() -> None:
    attached = attach(llama(), RoutedConfig(["q_proj"], train=("head",)))
    assert sum("lm_head" in name for name in attached.tensors()) == 1
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    t5 = attach(model, RoutedConfig(["q"], train=("head",)))
    assert sum("lm_head" in name for name in t5.tensors()) == 1
    with pytest.raises(ValueError, match="train has 'head', in which classifier is a target"):
        attach(classifier(), RoutedConfig(["classifier"], train=("head",)))


def test_a_shared_adapter_loads_where_it_was_only(tmp_path: Any) -> None:
    both: dict[str, Any] = {"host": "adapter", "share": "block", "r": 2}
    attach(gpt2(), RoutedConfig(["attn", "mlp"], **both)).save(tmp_path)
    other = attach(gpt2(), RoutedConfig(["attn"], **both))
    with pytest.raises(ValueError, match="target_modules is"):
        other.load(tmp_path)
    attach(gpt2(), RoutedConfig(["attn", "mlp"], **both)).load(tmp_path)


def classifier() -> BertForSequenceClassification:
    model = BertForSequenceClassification(bert().config)
    model.bert = bert()
    return model.eval()


TRAIN = {
    ("host_bias",): {"attention.self.query.base.bias": 3},
    ("norms",): {"attention.output.LayerNorm": 6, "layer.0.output.LayerNorm": 2},
    ("pooler",): {"bert.pooler.dense": 2},
    ("head",): {"classifier.": 2},
    ("host_bias", "norms", "pooler", "head"): {"bias": 11, "LayerNorm": 12, "classifier": 2},
}


@pytest.mark.parametrize("train", TRAIN, ids="-".join)
def test_what_trains_is_named_and_saved(train: tuple[str, ...], tmp_path: Any) -> None:
    model = classifier()
    before = {name: p.clone() for name, p in model.named_parameters()}
    attached = drawn(attach(model, RoutedConfig(["query"], train=train)))
    free = {n for n, p in model.named_parameters() if p.requires_grad and "query.A" not in n}
    free = {n for n in free if "query.B" not in n}
    for part, count in TRAIN[train].items():
        assert sum(part in name for name in free) == count, (part, sorted(free))
    assert "embeddings" not in " ".join(free)
    optimiser = torch.optim.SGD(attached.trainable_parameters(), lr=0.5)
    run(attached).square().sum().backward()
    optimiser.step()
    expected = run(attached)
    attached.save(tmp_path)
    attached.detach()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad, name
    again = attach(model, tmp_path)
    assert torch.equal(run(again), expected) and again.config.train == train


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match="train must be one of host_bias, norms, pooler, head"):
        RoutedConfig(["query"], train=("embeddings",))
    with pytest.raises(
        ValueError, match="train has 'head': this is no Hugging Face model with a head"
    ):
        attach(bert(), RoutedConfig(["query"], train=("head",)))
    tied = BertLMHeadModel(bert().config)
    with pytest.raises(ValueError, match=r"train has 'head': .* is tied"):
        attach(tied, RoutedConfig(["query"], train=("head",)))
    without = nn.Sequential(nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match="train has 'host_bias': no target has a bias"):
        attach(without, RoutedConfig(["0"], train=("host_bias",)))
    assert not isinstance(without[0], RoutedLinear)
