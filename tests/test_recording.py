"""Hidden states that transformers records where blocks are adapted: what the model goes on with."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attach import IDS, bert, gpt2
from test_positions import llama
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from fused_route import RoutedConfig, RoutingContext, attach

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedAdapterConfig, context_of  # noqa: E402

TINY: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip
TEXT = {**TINY, "vocab_size": 20, "max_position_embeddings": 20}
VISION = {**TINY, "image_size": 8, "patch_size": 4}
BART: dict[str, Any] = {
    "vocab_size": 20, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2
}  # fmt: skip
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
WORDS = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
IMAGE = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
# A model, its blocks, what is fed, and the name of what is recorded of the blocks.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = {
    "bert": (bert, r"encoder\.layer\.\d+", WORDS, "hidden_states"),
    "roberta": (
        lambda: RobertaModel(RobertaConfig(**TEXT)),
        r"encoder\.layer\.\d+",
        WORDS,
        "hidden_states",
    ),
    "gpt2": (gpt2, r"transformer\.h\.\d+", WORDS, "hidden_states"),
    "llama": (llama, r"model\.layers\.\d+", WORDS, "hidden_states"),
    "qwen": (
        lambda: Qwen2Model(Qwen2Config(**TEXT, num_key_value_heads=2)),
        r"layers\.\d+",
        WORDS,
        "hidden_states",
    ),
    "bart encoder": (
        lambda: BartModel(BartConfig(**BART)),
        r"encoder\.layers\.\d+",
        PAIR,
        "encoder_hidden_states",
    ),
    "bart decoder": (
        lambda: BartModel(BartConfig(**BART)),
        r"decoder\.layers\.\d+",
        PAIR,
        "decoder_hidden_states",
    ),
    "t5 encoder": (
        lambda: T5Model(T5Config(**T5)),
        r"encoder\.block\.\d+",
        PAIR,
        "encoder_hidden_states",
    ),
    "t5 decoder": (
        lambda: T5Model(T5Config(**T5)),
        r"decoder\.block\.\d+",
        PAIR,
        "decoder_hidden_states",
    ),
    "vit": (lambda: ViTModel(ViTConfig(**VISION)), r"layers\.\d+", PIXELS, "hidden_states"),
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
        r"encoder\.layers\.\d+",
        PIXELS,
        "hidden_states",
    ),
}


def by_attach(model: nn.Module, blocks: str, position: str) -> tuple[Any, RoutingContext, Any]:
    config = RoutedConfig(blocks, host="adapter", r=2, position=position)
    attached = attach(model, config)
    return model, attached.context, attached.detach


def by_peft(model: nn.Module, blocks: str, position: str) -> tuple[Any, RoutingContext, Any]:
    config = RoutedAdapterConfig(target_modules=blocks, r=2, position=position)
    made = peft.get_peft_model(model, config)
    return made, context_of(made), made.unload


def recorded(model: Any, name: str, fed: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out: Any = model(**fed, output_hidden_states=True)
    return tuple(getattr(out, name))


@pytest.mark.parametrize("asked", ["before", "after"])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("put", [by_attach, by_peft])
@pytest.mark.parametrize("name", BLOCKS)
def test_states_are_what_blocks_are_given(name: str, put: Any, position: str, asked: str) -> None:
    """Whether transformers put its recorders on before the adapters or after them."""
    make, blocks, fed, states = BLOCKS[name]
    torch.manual_seed(0)
    model = make().eval()
    plain = recorded(copy.deepcopy(model), states, fed)
    if asked == "before":
        recorded(model, states, fed)
    adapted, context, take_out = put(model, blocks, position)
    for tensor_name, parameter in adapted.named_parameters():
        if "adapter" in tensor_name:
            nn.init.normal_(parameter)
    given: list[Tensor] = []
    for module_name, block in adapted.named_modules():
        if re.fullmatch(rf"(base_model\.model\.)?{blocks}", module_name):
            block.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with context.using(IMAGE):
        first = recorded(adapted, states, fed)
        again = recorded(adapted, states, fed)
    assert len(first) == len(plain) and len(given) == 2 * (len(plain) - 1)
    for one, block_given in zip((*first[:-1], *again[:-1]), given, strict=True):
        assert torch.equal(one, block_given)
    assert torch.equal(first[0], plain[0]) and not torch.equal(first[1], plain[1])
    take_out()
    for one, other in zip(recorded(model, states, fed), plain, strict=True):
        assert torch.equal(one, other)


def test_the_last_states_are_adapted_where_no_norm_follows() -> None:
    make, blocks, fed, states = BLOCKS["clip"]
    model, context, _ = by_attach(make().eval(), blocks, "after")
    last: Any = model.get_submodule("encoder.layers.1")
    nn.init.normal_(last.adapter.B)
    left: list[Tensor] = []
    last.register_forward_hook(lambda _, args, out: left.append(out))
    with context.using(IMAGE):
        assert torch.equal(recorded(model, states, fed)[-1], left[0])


@pytest.mark.parametrize("put", [by_attach, by_peft])
def test_states_of_a_compiled_model(put: Any) -> None:
    """transformers cannot put its recorders on in a graph: it did before the adapters came."""
    make, blocks, fed, states = BLOCKS["qwen"]
    model = make().eval()
    recorded(model, states, fed)
    adapted, context, _ = put(model, blocks, "after")
    for name, parameter in adapted.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter)
    compiled = torch.compile(adapted, backend="eager", fullgraph=put is by_attach)
    fed = {**fed, "use_cache": False}
    with context.using(IMAGE):
        pairs = zip(recorded(compiled, states, fed), recorded(adapted, states, fed), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_other_hooks_stay_with_the_block() -> None:
    model, seen = nn.Sequential(nn.Linear(8, 8)), []
    model[0].register_forward_hook(lambda *_: seen.append("block"))
    attached = attach(model, RoutedConfig(["0"], host="adapter", route="none"))
    model(torch.randn(1, 3, 8))
    attached.detach()
    model(torch.randn(1, 3, 8))
    assert seen == ["block", "block"]
