"""A frozen text encoder that answers questions about images through routed layers."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_route import RoutingContext

HEAD = "head"


class VqaClassifier(nn.Module):
    """Questions and image features to scores of answers.

    The encoder's text states, mean over the question's tokens, go through a linear head. The image
    reaches them through routed layers, if `attach` has put any, and, with `prefix`, as a token
    before the question.

    Args:
        encoder: a Hugging Face encoder (its forward takes inputs_embeds); frozen by `attach`.
        answers: number of answers.
        prefix: whether the projected features stand before the question as a token.
    """

    def __init__(self, encoder: nn.Module, answers: int, *, prefix: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, answers)  # type: ignore[union-attr, arg-type]
        self.prefix = prefix
        self.context = RoutingContext()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scores of the answers, and the loss where labels are given.

        Args:
            input_ids, attention_mask: (B, T) integers.
            features: (B, Nv, visual_width) or (B, visual_width), as the context takes them.
            labels: (B,) integers.
        """
        with self.context.using(features):
            states = self._encode(input_ids, attention_mask)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        logits = self.head((states * weights).sum(1) / weights.sum(1))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        encoder: Any = self.encoder
        if not self.prefix:
            return encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embedding = encoder.get_input_embeddings()(input_ids)
        visual = self.context.get(embedding.shape[-1], "the visual prefix").x_r
        seen = attention_mask.new_ones(visual.shape[:2])
        states: Tensor = encoder(
            inputs_embeds=torch.cat([visual, embedding], 1),
            attention_mask=torch.cat([seen, attention_mask], 1),
        ).last_hidden_state
        return states[:, visual.shape[1] :]


def load_encoder(directory: Path, layers: int | None = None) -> Any:
    """A BERT-like encoder and its tokenizer from a local directory: (encoder, tokenizer).

    Args:
        layers: how many of its layers to keep, from the first; None: all.

    Raises:
        ValueError: not a directory with a model.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds no config.json: not a model directory")
    config = AutoConfig.from_pretrained(directory)
    encoder = AutoModel.from_pretrained(directory, config=config)
    if layers is not None:
        del encoder.encoder.layer[layers:]
        encoder.config.num_hidden_layers = layers
    encoder.pooler = None  # the classifier reads the states of all tokens
    return encoder.eval(), AutoTokenizer.from_pretrained(directory)
