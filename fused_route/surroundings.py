"""What the modules around a target make of it: order of tokens, order of axes, its weight alone."""

import inspect
import re
import sys
from functools import cache
from typing import Any

from torch import nn

TEXT_PART = re.compile(r"_text(_model)?$")  # of the kinds of configurations within others
# Models whose attention says that it is not causal, and is by its mask.
CAUSAL_BY_MASK = ("clip_text_model", "xclip_text_model", "owlvit_text_model")


def is_causal(model: nn.Module, name: str) -> bool:
    """Whether the named module sits in a decoder, where a token must not see later ones.

    The nearest enclosing module that is sure decides: torch's decoders, attentions by their flags,
    where these say so, and Hugging Face models by the kind of their configuration. The decoder of
    an encoder-decoder is one, whatever its attentions to the encoder say; so is the head of what
    generates.
    """
    if _is_in_pair(model, name):
        return True
    module, says_no = model.get_submodule(name), False
    for end in range(name.count("."), -1, -1):
        enclosing = model.get_submodule(".".join(name.split(".")[:end]))
        if isinstance(enclosing, (nn.TransformerDecoder, nn.TransformerDecoderLayer)):
            return True
        if getattr(_config(enclosing), "model_type", None) in CAUSAL_BY_MASK:
            return True
        if _config(enclosing) is not None and _is_head(enclosing, module):
            return True
        said = [
            bool(getattr(inner, flag))
            for inner in enclosing.modules()
            for flag in ("is_causal", "is_decoder")
            if isinstance(getattr(inner, flag, None), bool)
        ]
        if said and not says_no and enclosing is not model:
            if any(said):
                return True
            says_no = True  # a block's attentions: what is farther has others too
        decoder = decodes(_config(enclosing))
        if decoder is not None:
            return decoder
    return False


def _is_head(model: Any, module: nn.Module) -> bool:
    """Whether a module is what a Hugging Face model chooses tokens by, one after another."""
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can()) and model.get_output_embeddings() is module


def _is_in_pair(model: nn.Module, name: str) -> bool:
    """Whether the named module sits in the decoder of a Hugging Face encoder-decoder."""
    parts = name.split(".")
    if "decoder" not in parts:
        return False
    around = (".".join(parts[:end]) for end in range(parts.index("decoder") + 1))
    configs = (_config(model.get_submodule(outer)) for outer in around)
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def _config(module: nn.Module) -> object:
    """A Hugging Face model's configuration."""
    return getattr(module, "config", None) if "transformers" in sys.modules else None


def decodes(config: object) -> bool | None:
    """Whether models of this configuration generate from left to right; None where it is none,
    or of a kind that transformers' tables of models do not tell.

    Kinds that can do both, such as BERT, do it where the configuration says is_decoder. The text
    part of a model that answers about images is a decoder.
    """
    if not hasattr(config, "model_type"):
        return None
    if getattr(config, "is_encoder_decoder", False):
        return False
    from transformers.models.auto import modeling_auto

    causal, masked, of_images = (
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        for task in ("CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")
    )
    kind = str(config.model_type)
    if getattr(config, "is_decoder", False) or (kind in causal and kind not in masked):
        return True
    if kind in masked or "vision" in kind or "audio" in kind:
        return False
    whole = TEXT_PART.sub("", kind)
    return True if whole != kind and whole in of_images else None


# Kinds of Hugging Face models whose hidden states are (T, B, d), and in which modules.
SEQUENCE_FIRST = {
    "xlnet": re.compile(r".*"),
    "fsmt": re.compile(r".*"),
    "longformer": re.compile(r".*\.(query|key|value)(_global)?"),
    "led": re.compile(r".*\.(query|key|value)(_global)?"),
}


def is_sequence_first(model: nn.Module, name: str) -> bool:
    """Whether the named module is given hidden states (T, B, d): tokens before samples."""
    for end in (0, *(dot.start() for dot in re.finditer(r"\.", name)), len(name)):
        module = model.get_submodule(name[:end])
        layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        attention = module.self_attn if isinstance(module, layers) else module
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            return True
        pattern = SEQUENCE_FIRST.get(getattr(_config(module), "model_type", None) or "")
        if pattern is not None and pattern.fullmatch(name):
            return True
    return False


def reads_weight(parent: nn.Module, attribute: str) -> bool:
    """Whether a module's code hands on the weight of a part of it: what is routed is not called.

    torch's own are known, and left out; so are checks of its type and functions that fill it.
    """
    if type(parent).__module__.startswith("torch."):
        return False
    name = re.escape(attribute)
    read = re.compile(rf"(?<!isinstance\()(?<!_\()\bself\.{name}\.weight\s*[,)]")
    kind: Any = type(parent)
    return read.search(_code_of(kind)) is not None


@cache
def _code_of(kind: Any) -> str:
    """The source of a class."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made by hand, or without its file
        return ""
