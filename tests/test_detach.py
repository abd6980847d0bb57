"""Detaching from models that have changed since: left alone, or refused before anything changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attach import bert, gpt2, train_a_little
from torch import Tensor, nn

from fused_route import RoutedConfig, attach


class Rotary(nn.Module):
    """Buffers that its own forward replaces, and one whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.cos: Tensor
        self.sin: Tensor | None
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.zeros(4, 8), persistent=False)
        self.register_buffer("ones", torch.ones(1, 8).expand(4, 8))
        self.longest = 4

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest = x.shape[1]
            self.cos, self.sin = torch.ones(self.longest, 8), None
        return self.fc(x) + self.cos[: x.shape[1]]


def test_a_buffer_that_the_model_replaced_is_left_alone() -> None:
    model = Rotary()
    weight = model.fc.weight
    attached = attach(model, RoutedConfig(["fc"], visual_width=5))
    x = torch.randn(2, 6, 8)
    with attached.using(torch.randn(2, 5)):
        expected = model(x)
    attached.detach()
    assert torch.equal(model(x), expected)  # B = 0
    assert torch.equal(model.cos, torch.ones(6, 8)) and model.sin is None
    assert model.fc.weight is weight and weight.requires_grad


def without(model: nn.Module, name: str) -> Callable[[], None]:
    """Takes a module out, and says how it comes back."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    delattr(model.get_submodule(parent), child)
    return lambda: setattr(model.get_submodule(parent), child, module)


def resized(model: Any) -> Callable[[], None]:
    """Gives the model more tokens, and says how they go again."""
    tokens = model.config.vocab_size
    model.resize_token_embeddings(tokens + 3)
    return lambda: model.resize_token_embeddings(tokens)


CHANGED: dict[str, tuple[Callable[[], nn.Module], RoutedConfig, Callable[[Any], Any], str]] = {
    "resized": (
        lambda: gpt2(tie_word_embeddings=False),
        RoutedConfig(["attn.c_proj"], modules_to_save=["wte"]), resized,
        r"transformer\.wte\.weight is \(23, 8\), was \(20, 8\)",
    ),
    "gone": (
        bert, RoutedConfig(["query"], modules_to_save=["pooler"]), lambda m: without(m, "pooler"),
        r"pooler\.dense\.weight is gone",
    ),
    "no place": (
        bert, RoutedConfig(["query"]), lambda m: without(m, "encoder.layer.1"),
        r"encoder\.layer\.1\.attention\.self is gone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_what_cannot_be_detached_stays_attached(what: str) -> None:
    make, config, change, message = CHANGED[what]
    model = make()
    before = copy.deepcopy(model)
    attached = attach(model, config)
    train_a_little(attached, torch.randn(2, 8))
    put_back = change(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        attached.detach()
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    put_back()
    attached.detach()
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in model.parameters())
