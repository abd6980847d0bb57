"""What the modules around a target make of it: order of tokens, order of axes, its weight alone."""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

from torch import nn

MAKES = re.compile("init|reset|load")  # in the names of methods
QUESTIONS = ("dtype", "device", "shape", "size", "is_meta", "requires_grad", "numel", "dim", "ndim")
TEXT_PART = re.compile(r"_text(_model)?$")  # of the kinds of configurations within others
# Tables of transformers with encoder-decoders that write; DETR's decoder, say, reads no text.
OF_PAIRS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")
# Models whose attention says that it is not causal, and is by its mask.
CAUSAL_BY_MASK = ("clip_text_model", "xclip_text_model", "owlvit_text_model")


def is_causal(model: nn.Module, name: str) -> bool:
    """Whether the named module sits in a decoder, where a token must not see later ones.

    The nearest enclosing module that says so decides: torch's decoders, attentions by their flags,
    Hugging Face models by the kind of their configuration, which counts before the flags of
    attentions within. The decoder of what makes texts of texts, images or speech is one, whatever
    its attentions to the encoder say; so is the head of what generates.
    """
    if _is_in_pair(model, name):
        return True
    module, says_no = model.get_submodule(name), False
    for end in range(name.count("."), -1, -1):
        enclosing = model.get_submodule(".".join(name.split(".")[:end]))
        config = _config(enclosing)
        if isinstance(enclosing, (nn.TransformerDecoder, nn.TransformerDecoderLayer)):
            return True
        if getattr(config, "model_type", None) in CAUSAL_BY_MASK:
            return True
        if config is not None and _is_head(enclosing, module):
            return True
        if not says_no and enclosing is not model:
            said = _flags(enclosing)
            if any(said):
                return True
            says_no = bool(said)
        decoder = decodes(config)
        if decoder is not None or (says_no and config is not None):
            return bool(decoder)
    return False


def _flags(module: nn.Module) -> list[bool]:
    """What the attentions in a module say of themselves."""
    return [
        bool(getattr(inner, flag))
        for inner in module.modules()
        for flag in ("is_causal", "is_decoder")
        if isinstance(getattr(inner, flag, None), bool)
    ]


def _is_head(model: Any, module: nn.Module) -> bool:
    """Whether a module is what a Hugging Face model chooses tokens by, one after another."""
    can, head = (getattr(model, name, None) for name in ("can_generate", "get_output_embeddings"))
    return callable(can) and callable(head) and bool(can()) and head() is module


def _is_in_pair(model: nn.Module, name: str) -> bool:
    """Whether the named module sits in the decoder of a Hugging Face model that writes texts."""
    parts = name.split(".")
    if "decoder" not in parts:
        return False
    around = (".".join(parts[:end]) for end in range(parts.index("decoder") + 1))
    configs = (_config(model.get_submodule(outer)) for outer in around)
    return any(
        getattr(config, "is_encoder_decoder", False)
        and getattr(config, "model_type", None) in kinds(*OF_PAIRS)
        for config in configs
    )


@cache
def kinds(*tasks: str) -> frozenset[str]:
    """Kinds of configurations whose models transformers lists for these tasks."""
    from transformers.models.auto import modeling_auto

    tables = (getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in tasks)
    return frozenset(chain.from_iterable(tables))


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
    kind = str(config.model_type)
    masked = kind in kinds("MASKED_LM")
    if getattr(config, "is_decoder", False) or (kind in kinds("CAUSAL_LM") and not masked):
        return True
    whole = TEXT_PART.sub("", kind)
    if whole != kind and whole in kinds("IMAGE_TEXT_TO_TEXT"):
        return True
    return False if masked or "vision" in kind or "audio" in kind else None


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
        is_layer = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        attention = getattr(module, "self_attn", None) if is_layer else module
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            return True
        pattern = SEQUENCE_FIRST.get(getattr(_config(module), "model_type", None) or "")
        if pattern is not None and pattern.fullmatch(name):
            return True
    return False


def reads_weight(parent: nn.Module, attribute: str) -> bool:
    """Whether a module's code takes the weight of a part of it: what is routed is not called there.

    torch's own are known, and left out; so are what makes or fills a module, and questions about a
    weight: its dtype, device or type.
    """
    kind: Any = type(parent)
    return attribute in _weights_read(kind)


@cache
def _weights_read(kind: Any) -> frozenset[str]:
    """Attributes of a class whose weights its methods, inherited ones too, take."""
    methods: dict[str, Any] = {}
    for of in kind.__mro__:
        if of.__module__.startswith("torch."):
            break
        for name, method in vars(of).items():
            if inspect.isfunction(method) and not MAKES.search(name):
                methods.setdefault(name, method)
    return frozenset(chain.from_iterable(map(_weights_in, methods.values())))


def _weights_in(method: Any) -> Iterator[str]:
    """Each `a` of self.a.weight in a method's source that is more than a question about it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError, TypeError, ValueError):  # made by hand, or edited since
        return
    asked: set[int] = set()
    for node in ast.walk(tree):  # outer nodes come first
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "getattr" | "hasattr"), args=[first, *_]):
                asked.add(id(first))
            case ast.Attribute(attr=asks, value=inner) if asks in QUESTIONS:
                asked.add(id(inner))
            case ast.Attribute(
                attr="weight", value=ast.Attribute(attr=name, value=ast.Name(id="self"))
            ) if id(node) not in asked:
                yield name
