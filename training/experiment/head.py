"""The published classifier of answers, in place of a language model's own head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class AnswerHead(nn.Module):
    """Scores of answers from the state at the first place.

        Linear(d, 2d) · LayerNorm · GELU · Linear(2d, answers),  of tanh(Linear(d, d)(states[:, 0]))

    The head of the published scripts (arXiv 2403.09377). With visual tokens before the text the
    first place is the image's. Current RoBERTa files have no pooling layer, so that a frozen one is
    a random projection; the published code freezes it.

    Args:
        d, answers: widths of input and output.
        pooler: "trained" or "frozen".

    Shapes: (B, T, d) to (B, answers).
    """

    pooler_weight: Tensor
    pooler_bias: Tensor

    def __init__(self, d: int, answers: int, pooler: str = "trained") -> None:
        super().__init__()
        for name, value in nn.Linear(d, d).named_parameters():
            if pooler == "trained":
                self.register_parameter(f"pooler_{name}", value)
            else:  # modules_to_save trains every parameter that it saves
                self.register_buffer(f"pooler_{name}", value.detach())
        self.layers = nn.Sequential(
            nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, answers)
        )

    def forward(self, states: Tensor, **_: Any) -> Tensor:
        """Scores (B, answers) of states (B, T, d)."""
        pooled = torch.tanh(F.linear(states[:, 0], self.pooler_weight, self.pooler_bias))
        scores: Tensor = self.layers(pooled)
        return scores


def put_head(language: PreTrainedModel, answers: int, pooler: str) -> None:
    """Puts an `AnswerHead` where a classifier of transformers has its own.

    Raises:
        ValueError: its head does not take the states of all tokens, or is called otherwise.
    """
    own = getattr(language, "classifier", None)
    if not isinstance(own, nn.Module) or not type(own).__name__.endswith("ClassificationHead"):
        raise ValueError(
            f"model.head='two-layer': {type(language).__name__} has no head that reads the states "
            "of all tokens, as RoBERTa's; take 'native'"
        )
    width = int(language.config.hidden_size)
    head = AnswerHead(width, answers, pooler)
    head.layers.apply(language._init_weights)  # as its own head's layers start
    language.classifier = head
