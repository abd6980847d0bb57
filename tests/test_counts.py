"""Trainable parameters of the published configurations, built from configs (no memory: meta)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from fused_route import Attached, RoutedConfig, attach

ANSWERS = 3129  # of VQAv2
MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
GPT2_LORA = {"target_modules": ["attn.c_attn"], "r": 128, "adapted": (0, 2), "of": 3}
GPT2_LORA |= {"segments": "joint", "route": "add", "train": ("host_bias", "norms")}
GPT2_ADAPTER = {"target_modules": ["attn", "mlp"], "host": "adapter", "share": "block", "r": 128}
GPT2_ADAPTER |= {"activation": "gelu_tanh", "route": "add", "train": ("norms",)}
QUERY_VALUE = {"target_modules": ["query", "value"], "r": 128, "route": "gram"}
TWO_ADAPTERS = {"target_modules": ["output.dense"], "host": "adapter", "r": 64, "residual": False}
TWO_ADAPTERS |= {"route": "gram", "train": ("norms",)}
BOTH = {"train": ("host_bias", "norms")}
SPLIT = {"inner_rank": 32, "train": ("norms",)}


class Vqa(nn.Module):
    """RoBERTa without its language model head, and the published two-layer answer head."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.roberta = RobertaModel(config)
        self.classifier = nn.Sequential(
            nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, ANSWERS)
        )


def gpt2(**sizes: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**sizes))


def roberta(**sizes: Any) -> nn.Module:
    return Vqa(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **sizes)
    )


def trained(model: Any, **config: Any) -> Attached:
    """Of a model of these sizes; its head, where it has one of its own, trains too."""
    make, sizes = model
    with torch.device("meta"):
        made = make(**sizes)
    saved = ("classifier",) if make is roberta else ()
    return attach(made, RoutedConfig(**config, modules_to_save=saved))


BASE_HEAD, LARGE_HEAD = 5_993_529, 8_514_617
PUBLISHED: dict[str, tuple[Any, dict[str, Any], int, int | None]] = {
    "gpt2 lora": ((gpt2, {}), GPT2_LORA, 4_783_104, 129_158_400),
    "gpt2 lora, norms frozen": (
        (gpt2, {}),
        {**GPT2_LORA, "train": ("host_bias",)},
        4_746_240,
        None,
    ),
    "gpt2 adapter": ((gpt2, {}), GPT2_ADAPTER, 2_406_912, 126_809_856),
    "gpt2-medium lora": ((gpt2, MEDIUM), GPT2_LORA, 12_754_944, None),
    "gpt2-medium adapter": ((gpt2, MEDIUM), GPT2_ADAPTER, 6_417_408, None),
    "roberta lora": ((roberta, {}), QUERY_VALUE | BOTH, BASE_HEAD + 4_773_888, None),
    "roberta split": ((roberta, {}), QUERY_VALUE | SPLIT, BASE_HEAD + 3_772_416, None),
    "roberta adapter": ((roberta, {}), TWO_ADAPTERS, 8_409_657, None),
    "roberta-large lora": ((roberta, LARGE), QUERY_VALUE | BOTH, 21_244_985, None),
    "roberta-large split": ((roberta, LARGE), QUERY_VALUE | SPLIT, 18_443_321, None),
    "roberta-large adapter": ((roberta, LARGE), TWO_ADAPTERS, 14_956_601, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    model, config, expected, total = PUBLISHED[name]
    attached = trained(model, **config)
    assert sum(p.numel() for p in attached.trainable_parameters()) == expected
    if total is not None:
        assert sum(p.numel() for p in attached.model.parameters()) == total
    stored = sum(tensor.numel() for tensor in attached.tensors().values())
    assert stored == expected  # what trains is what a checkpoint holds


def test_the_readme_says_so() -> None:
    """The snippet's own configurations are the ones that were counted."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gpt2_lora" in b
    )
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    for name, count, total in (
        ("gpt2_lora", "4,783,104", "129,158,400"),
        ("gpt2_adapter", "2,406,912", "126,809,856"),
    ):
        with torch.device("meta"):
            model = gpt2()
        attached = attach(model, names[name])
        assert f"{sum(p.numel() for p in attached.trainable_parameters()):,}" == count
        assert f"{sum(p.numel() for p in model.parameters()):,}" == total
        assert f"# {count} of {total}" in block


@pytest.mark.parametrize("route", ["add", "mul", "gram", "expand", "gram_relu", "ones"])
def test_routing_adds_no_parameters(route: str) -> None:
    counts = {
        sum(
            p.numel()
            for p in trained((roberta, {}), **QUERY_VALUE | {"route": r}).trainable_parameters()
        )
        for r in ("none", route)
    }
    assert len(counts) == 1
