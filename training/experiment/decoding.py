"""A trained model's answers: the likeliest class, a generated text, or the likelier candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.experiment.batches import IGNORED, Batches
from fused_route.training.experiment.tasks import TASKS
from fused_route.training.vlm import VisionLanguageModel

Row = dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """Rows as the model takes them to answer, made where data are loaded.

    Attributes:
        name: of their task.
        ids: of the rows.
        inputs: one batch; of a task with candidates one for each of these.
    """

    name: str
    ids: list[str]
    inputs: list[dict[str, Any]]


@dataclass(frozen=True)
class Asking:
    """Collates rows of one task to `Questions`."""

    batches: Batches

    def __call__(self, rows: Sequence[Row]) -> Questions:
        name = rows[0]["name"]
        candidates = candidates_of(self.batches, name)
        if candidates:
            inputs = [self.batches.candidates(rows, answer) for answer in candidates]
        else:
            inputs = [self.batches.prompts(rows)]
        return Questions(name, [row["id"] for row in rows], inputs)


def candidates_of(batches: Batches, name: str) -> tuple[str, ...]:
    """The texts that a task's answers are among; none for a classifier, which has its own."""
    if batches.kind == "classifier":
        return ()
    return TASKS[LAYOUTS[batches.tasks[name].layout].task].candidates


@torch.no_grad()
def answers(
    model: VisionLanguageModel, batches: Batches, questions: Questions, **generation: Any
) -> list[str]:
    """An answer to each question.

    Args:
        model: in eval mode, on the device of the questions' tensors.
        generation: for `generate`, in place of and beside the task's.
    """
    candidates = candidates_of(batches, questions.name)
    if candidates:
        scores = [log_likelihood(model, inputs) for inputs in questions.inputs]
        return [candidates[place] for place in torch.stack(scores, 1).argmax(1).tolist()]
    (inputs,) = questions.inputs
    if batches.kind == "classifier":
        return [batches.answers[place] for place in model(**inputs).logits.argmax(1).tolist()]
    task = batches.tasks[questions.name]
    settings = {
        "num_beams": task.num_beams,
        "max_new_tokens": task.max_new_tokens,
        "do_sample": False,
        "pad_token_id": batches.tokenizer.pad_token_id,
    }
    ids = model.generate(**inputs, **(settings | generation))
    prompt = inputs["input_ids"].shape[1] if batches.kind == "decoder" else 0
    return batches.text(ids[:, prompt:])


def log_likelihood(model: VisionLanguageModel, inputs: dict[str, Any]) -> Tensor:
    """log p(labels | image, text) of each row, (B,): the sum over the labels' tokens."""
    is_pair = model.config.text_config.is_encoder_decoder
    labels = inputs["labels"]
    logits = model(**inputs).logits.float()
    if not is_pair:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return -token_losses(logits, labels).sum(1)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p of each label (B, T), zero where there is none.

    Args:
        logits: (B, T, vocabulary), fp32.
        labels: (B, T).
    """
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses
