"""The study's own vision tower: a small ViT, trained on images and labels without any text."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench.study.folders import made_once
from fused_route.training.data import easy_vqa
from fused_route.training.data.images import load_image
from fused_route.training.encoders import encoder_of
from fused_route.training.tables import without_nan
from fused_route.training.towers import wrap_timm

NAME = "vit_small_patch16_224"
ARGUMENTS = {"img_size": 64, "depth": 4}  # 384 wide, as MiniLM is: no projector; 16 patches
ACCURACY = "accuracy.json"
BATCH, RATE, DECAY = 64, 5e-4, 0.05
CLASSES = {
    "shape": sorted(easy_vqa.SHAPES),
    "colour": sorted(easy_vqa.COLOURS),
}


def write_vit(
    out: Path, epochs: int = 12, fit: int = 3750, images: int = 4000, seed: int = 0
) -> Path:
    """A folder with the ViT as a model of transformers, and accuracy.json; made once.

    It learns shape and colour of easy-VQA's images, as far as the answers of type "shape" and
    "colour" tell them, with the mean of two cross-entropies on its class token.

    Args:
        out: the folder.
        epochs, seed: of the training.
        fit: images of the split "train" that it is trained on, from the first: those of "fit".
        images: up to which one the others tell how well it sees.

    Raises:
        ValueError: the package easy-vqa is not installed, or `out` holds something else.
    """
    return made_once(out, ACCURACY, lambda folder: _fill(folder, epochs, fit, images, seed))


def _fill(folder: Path, epochs: int, fit: int, number: int, seed: int) -> None:
    import timm

    torch.manual_seed(seed)
    model: Any = timm.create_model(NAME, num_classes=0, **ARGUMENTS)
    tower = wrap_timm(model, **ARGUMENTS)
    preprocess = encoder_of(tower, None, "pooled").preprocess
    paths = easy_vqa.image_paths("train")[:number]
    bar = tqdm(paths, desc="reading images", leave=False)
    images = torch.stack([preprocess(load_image(path)) for path in bar])
    labels = image_labels(easy_vqa.load("train"))
    heads = nn.ModuleDict({kind: nn.Linear(384, len(CLASSES[kind])) for kind in CLASSES})
    _train(model, heads, images[:fit], _among(labels, slice(fit)), epochs)
    found = accuracy(model, heads, images[fit:], _among(labels, slice(fit, number)))
    tower.save_pretrained(folder)
    (folder / ACCURACY).write_text(json.dumps(without_nan(found)) + "\n")


def image_labels(questions: easy_vqa.Questions) -> dict[str, Tensor]:
    """Class of each image (images,) by kind, −100 where no answer tells it."""
    labels = {kind: torch.full((max(questions.image_ids) + 1,), -100) for kind in CLASSES}
    for answer, image in zip(questions.answers, questions.image_ids, strict=True):
        kind = easy_vqa.answer_type(answer)
        if kind in labels:
            labels[kind][image] = CLASSES[kind].index(answer)
    return labels


def _among(labels: dict[str, Tensor], images: slice) -> dict[str, Tensor]:
    return {kind: values[images] for kind, values in labels.items()}


def _train(
    model: nn.Module, heads: nn.ModuleDict, images: Tensor, labels: dict[str, Tensor], epochs: int
) -> None:
    every = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(every, RATE, weight_decay=DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    bar = tqdm(total=steps, desc="training the ViT", unit="step")
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for index in order[: len(images) // BATCH * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                states = model(images[index])
                losses = [
                    F.cross_entropy(head(states).float(), labels[kind][index])
                    for kind, head in heads.items()
                ]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix_str(f"loss {float(loss.detach()):.3f}")
    bar.close()


@torch.no_grad()
def accuracy(
    model: nn.Module, heads: nn.ModuleDict, images: Tensor, labels: dict[str, Tensor]
) -> dict[str, float]:
    """Share of images, among those with a label, whose shape and whose colour is told right."""
    model.eval()
    states = torch.cat([model(part) for part in images.split(256)])
    found = {}
    for kind, head in heads.items():
        known = labels[kind] >= 0
        right = head(states[known]).argmax(-1) == labels[kind][known]
        found[kind] = float(right.float().mean())
    return found
