"""Generate text about an image with a routed language model: routed at every step, or folded once.

    python examples/generate_with_an_image.py                 # a small GPT-2 with random weights
    python examples/generate_with_an_image.py --model path/to/gpt2 --tokens 40

`fold` puts one image into the weights, so that decoding costs what the plain model costs; leaving
the `with` block takes it out again.
"""

import argparse
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fused_route import RoutedConfig, attach, fold

VISUAL_WIDTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a GPT-2; default: a small random one")
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()
    if args.model and not Path(args.model).is_dir():
        parser.error(f"--model must be the directory of a model, got {args.model!r}")
    torch.manual_seed(0)
    small = GPT2Config(
        vocab_size=100, n_embd=128, n_layer=4, n_head=4, n_positions=128, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = (
        AutoModelForCausalLM.from_pretrained(args.model) if args.model else GPT2LMHeadModel(small)
    )
    model.eval()
    attached = attach(
        model,
        RoutedConfig(
            ["c_attn"], r=16, route="gram", adapted=(0, 2), of=3, visual_width=VISUAL_WIDTH
        ),
    )
    for layer in attached.layers.values():  # in place of training, so that the image shows
        nn.init.normal_(layer.B, std=0.5)

    prompt, images = torch.tensor([[5, 6, 7]]), torch.randn(2, 1, VISUAL_WIDTH)

    def generate(around: AbstractContextManager[object]) -> tuple[Tensor, float]:
        start = time.perf_counter()
        with around:
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens,
                min_new_tokens=args.tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return tokens[0, prompt.shape[1] :], time.perf_counter() - start

    generate(attached.using(images[0]))  # the first call of anything is slow
    for number, image in enumerate(images):
        routed, seconds = generate(attached.using(image))
        print(f"image {number}: {routed[:8].tolist()} …  routed {seconds * 1e3:.0f} ms", end="")
        for into in ("bottleneck", "host"):
            folded, seconds = generate(fold(model, image, into=into))
            assert torch.equal(folded, routed)
            print(f", folded into the {into} {seconds * 1e3:.0f} ms", end="")
        print()
    print("the same tokens each way. Next: examples/own_route.py")


if __name__ == "__main__":
    main()
