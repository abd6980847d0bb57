"""The frozen models of a recipe, with what prepares their inputs, from directories or the hub."""

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fused_route.training.encoders import weights_digest
from fused_route.training.experiment.packaged import LANGUAGES, TOWERS
from fused_route.training.towers import as_tower

TOWER_SEED = 0  # of layers that a tower's files lack: the same in whatever process loads it
LANGUAGE_CLASSES = {
    "classifier": AutoModelForSequenceClassification,
    "decoder": AutoModelForCausalLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


def load_tower(name: str, features: str = "pooled") -> tuple[PreTrainedModel, Any]:
    """(a vision tower, its image processor; None for a model of timm's).

    Of a model of images and texts, such as CLIP, the tower alone; or one of `packaged`. Pooled
    features of a tower whose pooling layer the files lack are those of a random layer, the same in
    every process: a line on standard error says so. The caller's random state stays as it is.

    Raises:
        ValueError: nothing there, or no vision model.
    """
    if name in TOWERS:
        tower, processor = TOWERS[name]()
        return tower.requires_grad_(False).eval(), processor
    config = _loaded("model.vision", name, lambda: AutoConfig.from_pretrained(name))
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(TOWER_SEED)  # torch.manual_seed sets the GPUs' too
        model, told = _loaded(
            "model.vision", name, lambda: AutoModel.from_pretrained(name, output_loading_info=True)
        )
    whole = hasattr(config, "vision_config") and hasattr(model, "vision_model")
    tower = as_tower(model.vision_model if whole else model)
    pooling = [key for key in told["missing_keys"] if "pooler" in key and "text" not in key]
    if features == "pooled" and pooling:
        print(
            f"{name} has no {pooling[0]}: its pooled features are those of a random layer, drawn "
            f"from seed {TOWER_SEED} whatever the run's; model.features=tokens are not",
            file=sys.stderr,
        )
    processor = None  # a model of timm's knows its own transform
    if not hasattr(tower, "timm_model"):
        processor = _loaded("model.vision", name, lambda: AutoImageProcessor.from_pretrained(name))
    return tower.requires_grad_(False).eval(), processor


def load_language(
    name: str, kind: str, answers: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    """(a language model of `kind`, its tokenizer, names of its modules that the files lack).

    Args:
        answers: of a classifier, how many it chooses among; its loss is the binary cross-entropy
            with soft targets, mean over questions and answers.

    Raises:
        ValueError: nothing there, or a model of another kind.
    """
    name = LANGUAGES[name]() if name in LANGUAGES else name
    config = _loaded("model.language", name, lambda: AutoConfig.from_pretrained(name))
    pair = bool(getattr(config, "is_encoder_decoder", False))
    if kind != "classifier" and pair != (kind == "encoder-decoder"):
        other = "an encoder-decoder" if pair else "no encoder-decoder"
        raise ValueError(f"model.kind={kind!r}, but {name} is {other} ({config.model_type})")
    settings: dict[str, Any] = {}
    if kind == "classifier":
        settings = {
            "num_labels": answers,
            "problem_type": "multi_label_classification",
            "ignore_mismatched_sizes": True,  # a head for other classes is made anew
        }
    load = LANGUAGE_CLASSES[kind].from_pretrained
    settings["output_loading_info"] = True
    language, told = _loaded("model.language", name, lambda: load(name, **settings))
    tokenizer = _loaded("model.language", name, lambda: AutoTokenizer.from_pretrained(name))
    if kind == "decoder" and tokenizer.eos_token is None:
        raise ValueError(f"model.language: the tokenizer of {name} has no eos_token to end with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if language.config.pad_token_id is None:
        language.config.pad_token_id = tokenizer.pad_token_id
    lacking = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    new = dict.fromkeys(_part_of(language, key) for key in lacking)
    return language, tokenizer, tuple(new)


def loaded_digest(language: PreTrainedModel, new: Collection[str]) -> str:
    """Digest of a language model's weights without its modules that the files lack."""
    state = language.state_dict()
    return weights_digest({k: t for k, t in state.items() if _part_of(language, k) not in new})


def _part_of(language: PreTrainedModel, key: str) -> str:
    """The module that a weight belongs to, such as "classifier" or "encoder"."""
    return key.removeprefix(f"{language.base_model_prefix}.").partition(".")[0]


def _loaded(argument: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        place = (
            f"{name} is a directory, but"
            if Path(name).is_dir()
            else f"{name!r} is no directory here, and as a name on the hub:"
        )
        raise ValueError(f"{argument}: {place} {reason}") from None
