"""Train routed LoRA in a frozen Hugging Face encoder, save it, and load it into the model again.

    python examples/train_routed_lora.py                      # a small BERT with random weights
    python examples/train_routed_lora.py --model path/to/bert --steps 500

The question is the same for every sample, only the image says what the answer is: without routing
the loss would stay at log(classes).
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, BertConfig, BertModel

from fused_route import ROUTES, RoutedConfig, attach

CLASSES, VISUAL_WIDTH, BATCH = 4, 32, 32


class Classifier(nn.Module):
    """Classes from the first token's state."""

    def __init__(self, encoder: nn.Module, d: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(d, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(input_ids).last_hidden_state[:, 0])
        return logits


def samples(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Image features (B, VISUAL_WIDTH) around their class's prototype, and the classes (B,)."""
    labels = torch.randint(CLASSES, (BATCH,))
    return prototypes[labels] + 0.3 * torch.randn(BATCH, VISUAL_WIDTH), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="directory of a BERT-like encoder; default: a small random one"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--route", default="mul", choices=list(ROUTES))
    args = parser.parse_args()
    if args.model and not Path(args.model).is_dir():
        parser.error(f"--model must be the directory of a model, got {args.model!r}")
    torch.manual_seed(0)
    small = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    encoder = AutoModel.from_pretrained(args.model) if args.model else BertModel(small)
    model = Classifier(encoder, encoder.config.hidden_size)
    config = RoutedConfig(
        ["query", "value"],
        r=8,
        route=args.route,
        visual_width=VISUAL_WIDTH,
        modules_to_save=["head"],
    )
    attached = attach(model, config)
    print(attached)

    prototypes, question = torch.randn(CLASSES, VISUAL_WIDTH), torch.full((BATCH, 6), 7)
    optimiser = torch.optim.AdamW(attached.trainable_parameters(), lr=3e-3)
    for step in (bar := tqdm(range(args.steps), desc="training")):
        image, labels = samples(prototypes)
        with attached.using(image):
            loss = F.cross_entropy(model(question), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()  # without dropout
    image, labels = samples(prototypes)
    with torch.no_grad(), attached.using(image):
        expected = model(question)
    accuracy = (expected.argmax(-1) == labels).float().mean()
    print(
        f"accuracy {accuracy:.0%}; log(classes) = {math.log(CLASSES):.2f}, loss {loss.item():.2f}"
    )
    with tempfile.TemporaryDirectory() as directory:
        attached.save(directory)
        attached.detach()  # the model is what it was
        again = attach(model, directory)
        with torch.no_grad(), again.using(image):
            assert torch.equal(model(question), expected)
    print("saved, detached and loaded: the same logits. Next: examples/generate_with_an_image.py")


if __name__ == "__main__":
    main()
