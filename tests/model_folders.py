"""Small models in folders, as from_pretrained takes them: towers and languages with tokenizers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

TEXTS = (
    "what color is the shape? what shape is in the image? is there a red circle in the image?",
    "yes no red green blue yellow teal brown gray black circle triangle rectangle true false",
    "a red circle. a blue triangle. a gray rectangle. vqa: gqa: nlvr: caption: one two three",
)
SIZE = 16  # pixels a side
END = "<|endoftext|>"


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of GPT-2, RoBERTa and BART, or T5."""
    special = {"gpt2": [END], "t5": ["<pad>", "</s>", "<unk>"]}.get(
        kind, ["<s>", "<pad>", "</s>", "<unk>"]
    )
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if kind == "t5":
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    else:
        names["bos_token"] = "<s>"
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def vit(width: int = 16, size: int = SIZE) -> ViTModel:
    return ViTModel(
        ViTConfig(
            hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=size, patch_size=size // 2,
        )
    )  # fmt: skip


def clip() -> CLIPModel:
    vision = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8,
    }  # fmt: skip
    text = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text))


def roberta(vocabulary: int, dropout: float = 0.0) -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
            eos_token_id=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2(vocabulary: int, dropout: float = 0.0) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
            eos_token_id=0, initializer_range=0.3, resid_pdrop=dropout, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )  # fmt: skip


def bart(vocabulary: int, dropout: float = 0.0) -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=64, dropout=dropout, init_std=0.3,
            bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )  # fmt: skip


def t5(vocabulary: int, dropout: float = 0.0) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1,
            num_decoder_layers=1, dropout_rate=dropout, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


LANGUAGES: dict[str, Callable[..., Any]] = {
    "roberta": roberta,
    "gpt2": gpt2,
    "bart": bart,
    "t5": t5,
}


def save_tower(folder: Path, kind: str = "vit", **settings: int) -> Path:
    """A vision tower with its image processor."""
    torch.manual_seed(3)
    size = settings.get("size", SIZE)
    (clip() if kind == "clip" else vit(**settings)).save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def save_language(folder: Path, kind: str, dropout: float = 0.0) -> Path:
    """A language model with its tokenizer."""
    torch.manual_seed(4)
    own = tokenizer(kind)
    LANGUAGES[kind](len(own), dropout).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def save_models(folder: Path, kinds: Sequence[str] = tuple(LANGUAGES)) -> Path:
    """A folder with "vit", "clip" and languages."""
    for tower in ("vit", "clip"):
        save_tower(folder / tower, tower)
    for kind in kinds:
        save_language(folder / kind, kind)
    return folder
