"""Answers a question about an image from a saved adapter."""

from pathlib import Path

import torch

from fused_route import attach
from fused_route.training.data.images import load_image
from fused_route.training.demo.models import VqaClassifier, load_encoder
from fused_route.training.demo.task import encoder_directory, read_task
from fused_route.training.demo.vision import load_efficientnet_lite0


@torch.no_grad()
def answer(adapter: Path, image: Path | str, question: str) -> list[tuple[str, float]]:
    """Answers and their probabilities, the likeliest first.

    Raises:
        ValueError: what is given cannot be used; the message says what and why, in one line.
    """
    if not question.strip():
        raise ValueError("question is empty")
    try:
        picture = load_image(image)
    except ValueError as error:
        raise ValueError(f"image must be a picture's file: {error}") from None
    task = read_task(adapter)
    tower = load_efficientnet_lite0()
    if tower.name != task.vision:
        raise ValueError(f"{adapter} was trained on features of {task.vision}, not {tower.name}")
    encoder, tokenizer = load_encoder(encoder_directory(), task.layers)
    model = VqaClassifier(encoder, len(task.answers), prefix=task.prefix)
    attach(model, adapter)
    tokens = tokenizer([question], return_tensors="pt")
    longest = encoder.config.max_position_embeddings - int(task.prefix)
    if tokens["input_ids"].shape[1] > longest:
        raise ValueError(
            f"question has {tokens['input_ids'].shape[1]} tokens; the model takes {longest}"
        )
    features = tower.encode(tower.transform(picture).unsqueeze(0))
    scores = model.eval()(tokens["input_ids"], tokens["attention_mask"], features)["logits"]
    probabilities = scores.softmax(-1)[0].tolist()
    return sorted(zip(task.answers, probabilities, strict=True), key=lambda item: -item[1])
