"""Language models of the benchmarks: their architectures, sizes and what is adapted in each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fused_route import RoutedConfig


@dataclass(frozen=True)
class Family:
    """What language models of one architecture share.

    Args:
        name: its model_type.
        hosts: what each host adapts: settings of `RoutedConfig`.
        first_norms: what is trained without a bottleneck: the backward pass then runs through all.
        task: what a training step learns: the next "token", an "answer" from the first token's
            state, or a "caption" of tokens, by a decoder, after visual tokens and text.
        spelling, fixed: fields of its configuration beside those that Hugging Face has common
            names for; body: arguments of its class.
        reserved: positions of its table that no token has.
    """

    name: str
    hosts: Mapping[str, Mapping[str, Any]]
    first_norms: tuple[str, ...]
    task: str
    spelling: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    reserved: int = 0


GPT2 = Family(
    "gpt2",
    hosts={
        "qkv": {"target_modules": ("c_attn",), "adapted": (0, 2), "of": 3},
        "adapter": {"host": "adapter", "target_modules": ("attn.c_proj", "mlp.c_proj")},
    },
    first_norms=("h.0.ln_1",),
    task="token",
    fixed={"bos_token_id": None, "eos_token_id": None},  # lie outside a tiny vocabulary
)
ROBERTA = Family(
    "roberta",
    hosts={
        "linear": {"target_modules": ("query", "value")},
        # of attention.output.dense and of the layer's own output.dense
        "adapter": {"host": "adapter", "target_modules": ("output.dense",)},
    },
    first_norms=("embeddings.LayerNorm",),
    task="answer",
    spelling={"intermediate_size": "inner"},
    fixed={"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    body={"add_pooling_layer": False},
    reserved=2,  # up to that of the padding token, which is 1
)
BART = Family(
    "bart",
    hosts={
        # of self-attention in encoder and decoder, and of the decoder's cross-attention
        "linear": {"target_modules": ("q_proj", "v_proj")},
        "adapter": {"host": "adapter", "target_modules": ("out_proj", "fc2")},
    },
    first_norms=("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
    task="caption",
    spelling={
        "decoder_layers": "layers", "decoder_attention_heads": "heads",
        "encoder_ffn_dim": "inner", "decoder_ffn_dim": "inner",
    },
)  # fmt: skip
LLAMA = Family(
    "llama",
    hosts={
        "linear": {"target_modules": ("q_proj", "v_proj")},
        "adapter": {"host": "adapter", "target_modules": ("o_proj", "down_proj")},
    },
    first_norms=("layers.0.input_layernorm",),
    task="token",
    spelling={"intermediate_size": "inner"},
    fixed={"bos_token_id": None, "eos_token_id": None},
)


@dataclass(frozen=True)
class Model:
    """A language model's size, and the vision model before it.

    Args:
        d, layers, heads: of its text; an encoder-decoder has as many layers in each of the two.
        vocabulary, positions: of its tables; of positions those that tokens can have.
        vision: what its vision model has otherwise than `bench.vision.VISION`: arguments of timm's.
    """

    family: Family
    d: int
    layers: int
    heads: int
    vocabulary: int
    positions: int
    vision: Mapping[str, Any] = field(default_factory=dict)

    def config(self, layers: int = 0) -> Any:
        """The Hugging Face configuration with this many layers; 0: the model's own number."""
        from transformers import AutoConfig

        sizes = {"layers": layers or self.layers, "heads": self.heads, "inner": 4 * self.d}
        config = AutoConfig.for_model(
            self.family.name, hidden_size=self.d, num_hidden_layers=sizes["layers"],
            num_attention_heads=self.heads, vocab_size=self.vocabulary,
            max_position_embeddings=self.positions + self.family.reserved, use_cache=False,
            **{name: sizes[size] for name, size in self.family.spelling.items()},
            **self.family.fixed,
        )  # fmt: skip
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)  # so that all ways compute the same
        return config

    def body(self, layers: int = 0) -> Any:
        """The model without a head, with random weights, in training mode."""
        from transformers import AutoModel

        body = AutoModel.from_config(self.config(layers), **self.family.body).train()
        if body.config.is_encoder_decoder:
            # In training transformers 5.17 draws a number for each layer, which may be left
            # out, and a compiler stops at it: ten graphs where others have one. No layer is left
            # out here, so these two flags, which ask for nothing else, change no value.
            body.encoder.training = body.decoder.training = False
        return body

    def routed(self, host: str, **settings: Any) -> RoutedConfig:
        """What `attach` is told for a host.

        Raises:
            ValueError: a host that the model has not.
        """
        if host not in self.family.hosts:
            accepted = ", ".join(self.family.hosts)
            raise ValueError(f"host must be one of {accepted} for {self.family.name}, got {host!r}")
        return RoutedConfig(**self.family.hosts[host], **settings)


_TINY_VISION = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
MODELS = {
    "gpt2": Model(GPT2, 768, 12, 12, 50257, 1024),
    "gpt2-medium": Model(GPT2, 1024, 24, 16, 50257, 1024),
    "roberta-base": Model(ROBERTA, 768, 12, 12, 50265, 512),
    "roberta-large": Model(ROBERTA, 1024, 24, 16, 50265, 512),
    "bart-base": Model(BART, 768, 6, 12, 50265, 1024),
    "llama-small": Model(LLAMA, 768, 12, 12, 32000, 2048),
    "tiny": Model(GPT2, 32, 2, 2, 64, 64, _TINY_VISION),
}
