"""Small vision-language models of every kind, the same weights every time, for the tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from fused_route.training.vlm import VisionLanguageModel

VOCABULARY, CLASSES, VISUAL_WIDTH = 30, 5, 12
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BIG: dict[str, Any] = {"initializer_range": 0.5}  # so that what is generated varies
LAYERS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    **BIG,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], Any]:
    """The same model every time."""

    def model() -> Any:
        torch.manual_seed(11)
        return make().eval()

    return model


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TOKENS, **BIG,
        )
    )  # fmt: skip


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=8, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12,
            decoder_ffn_dim=12, max_position_embeddings=64, dropout=0.0, init_std=0.5,
            forced_eos_token_id=None, decoder_start_token_id=2, **TOKENS,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
            dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
            initializer_factor=3.0,
        )
    )  # fmt: skip


LANGUAGE: dict[str, Callable[[], Any]] = {
    "gpt2": seeded(gpt2),
    "llama": seeded(
        lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **LAYERS, **TOKENS))
    ),
    "qwen": seeded(
        lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **LAYERS, **TOKENS))
    ),
    "bert": seeded(lambda: BertModel(BertConfig(**LAYERS, **NO_DROPOUT))),
    "roberta": seeded(
        lambda: RobertaForSequenceClassification(
            RobertaConfig(num_labels=CLASSES, **LAYERS, **NO_DROPOUT)
        )
    ),
    "bart": seeded(bart),
    "t5": seeded(t5),
}
DECODERS = ("gpt2", "llama", "qwen")
PAIRS = ("bart", "t5")
# What is adapted, as everywhere by target names alone.
TARGETS: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn"], "adapted": (0, 2), "of": 3},
    "llama": {"target_modules": ["q_proj", "v_proj"]},
    "qwen": {"target_modules": ["q_proj", "v_proj"]},
    "bert": {"target_modules": ["query", "value"]},
    "roberta": {"target_modules": ["query", "value"]},
    "bart": {"target_modules": ["q_proj", "v_proj"]},
    "t5": {"target_modules": ["q", "v"]},
}

vit = seeded(
    lambda: ViTModel(
        ViTConfig(
            hidden_size=VISUAL_WIDTH, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, image_size=8, patch_size=4, **BIG,
        )
    )
)  # fmt: skip
clip = seeded(
    lambda: CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=VISUAL_WIDTH, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, image_size=8, patch_size=4,
        )
    )
)  # fmt: skip


def vision_language(language: str, vision: Any = vit, **settings: Any) -> Any:
    """Untouched by PEFT."""
    tower = vision if vision is None or isinstance(vision, nn.Module) else vision()
    model = VisionLanguageModel.from_parts(tower, LANGUAGE[language](), **settings)
    return model.eval()


def drawn(model: Any) -> Any:
    """With values in every parameter that PEFT or attach has added."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            is_ours = parts[-1] in ("A", "B", "b_A", "b_B")  # of attach's layers
            if is_ours or any(part.startswith(("lora_", "adapter_")) for part in parts):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def images(batch: int, seed: int = 1) -> Tensor:
    """pixel_values of small images."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def texts(batch: int, length: int = 5, seed: int = 2) -> Tensor:
    """Token numbers without special ones."""
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
