"""Answers a question about an image from a saved adapter."""

import json
from pathlib import Path
from typing import Any

import torch

from fused_route import checkpoint
from fused_route.training.demo import ENCODER, TASK, encoder_directory
from fused_route.training.models import VqaClassifier, attach_routing, load_encoder
from fused_route.training.vision import load_efficientnet_lite0, load_image


def read_task(adapter: Path) -> dict[str, Any]:
    """What the adapter was trained to answer.

    Raises:
        ValueError: not an adapter, one for another model, or a damaged file.
    """
    if not adapter.is_dir():
        raise ValueError(f"adapter={str(adapter)!r} is no directory")
    mapping = checkpoint.read_config(adapter).get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if model != VqaClassifier.__name__:
        raise ValueError(
            f"{adapter} is an adapter for {model or 'an unknown model'}; "
            f"predict runs {VqaClassifier.__name__}, which `fused-route demo` trains"
        )
    try:
        task = json.loads((adapter / TASK).read_text(encoding="utf-8"))
        answers, layers, encoder = task["answers"], task["layers"], task["encoder"]
        assert answers and isinstance(layers, int)
    except FileNotFoundError:
        raise ValueError(f"{adapter / TASK} does not exist: not from `fused-route demo`") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{adapter / TASK} is damaged") from None
    if encoder != ENCODER:
        raise ValueError(f"{adapter} is an adapter for {encoder}; predict runs {ENCODER}")
    return dict(task)


@torch.no_grad()
def answer(adapter: Path, image: Path, question: str) -> list[tuple[str, float]]:
    """Answers and their probabilities, the likeliest first.

    Raises:
        ValueError: what is given cannot be used; the message says what and why, in one line.
    """
    if not question.strip():
        raise ValueError("question is empty")
    picture = load_image(image)
    task = read_task(adapter)
    tower = load_efficientnet_lite0()
    if tower.name != task["vision"]:
        raise ValueError(f"{adapter} was trained on features of {task['vision']}, not {tower.name}")
    encoder, tokenizer = load_encoder(encoder_directory(), task["layers"])
    model = VqaClassifier(encoder, len(task["answers"]), prefix=bool(task["prefix"]))
    attach_routing(model, adapter)
    tokens = tokenizer([question], return_tensors="pt", truncation=True)
    features = tower.encode(tower.transform(picture).unsqueeze(0))
    scores = model.eval()(tokens["input_ids"], tokens["attention_mask"], features)["logits"]
    probabilities = scores.softmax(-1)[0].tolist()
    ranked = sorted(zip(task["answers"], probabilities, strict=True), key=lambda item: -item[1])
    return ranked
