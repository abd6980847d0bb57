"""A routing function of one's own, in plain PyTorch layers, with packed sequences.

    python examples/own_route.py

The route squashes x_v and gates the text with it: z = x_t ∘ σ(x_v). The library needs to know how
to turn an image into one of five operands, and nothing about layers, masks or kernels.
"""

import torch
from torch import Tensor, nn

from fused_route import (
    ROUTES,
    Route,
    RoutedAdapter,
    RoutedLinear,
    RoutingContext,
    RoutingInput,
    scale,
)

D = 64


class Block(nn.Module):
    """A gated layer with a frozen base, then an adapter; both are told the image by one context."""

    def __init__(self, context: RoutingContext) -> None:
        super().__init__()
        base = nn.Linear(D, D).requires_grad_(False)
        self.linear = RoutedLinear(base, rank=8, route="gate", context=context)
        self.adapter = RoutedAdapter(D, rank=8, route="gate", context=context)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapter(torch.tanh(self.linear(x)))
        return y


def main() -> None:
    torch.manual_seed(0)
    ROUTES.register(Route("gate", lambda x_v: scale(torch.sigmoid(x_v)), takes="vector"))
    context = RoutingContext()
    block = Block(context)
    nn.init.normal_(block.linear.B)
    nn.init.normal_(block.adapter.B)

    images = torch.randn(2, 9, D)  # nine visual tokens each, of which the second image has five
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    texts = [torch.randn(4, D), torch.randn(7, D)]

    with context.using(RoutingInput(images, valid)):  # a padded batch …
        padded = torch.stack([torch.cat([t, torch.zeros(7 - len(t), D)]) for t in texts])
        batch = block(padded)
    sample_index = torch.tensor([0] * 4 + [1] * 7)  # … or all tokens in one row, without padding
    with context.using(RoutingInput(images, valid, sample_index)):
        packed = block(torch.cat(texts))
    torch.testing.assert_close(packed[:4], batch[0, :4])
    torch.testing.assert_close(packed[4:], batch[1])

    packed.square().mean().backward()
    trained = [name for name, p in block.named_parameters() if p.grad is not None]
    print(f"packed and padded agree; gradients for {', '.join(trained)}")
    print("Next: README.md, “On your own model”")


if __name__ == "__main__":
    main()
