"""Layers in torch's own encoders, which in evaluation read weights instead of calling modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_route import RoutedAdapter, RoutedConfig, RoutedLinear, RoutingContext, attach

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig, context_of  # noqa: E402

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
TARGETS = {"lora": "linear1", "adapter": "linear2"}
Put = tuple[nn.Module, RoutingContext, Callable[[], object]]


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


class Inside(nn.Module):
    """An encoder that is part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: Tensor, **mask: Tensor) -> Tensor:
        out: Tensor = self.encoder(x, **mask)
        return out


def by_attach(model: nn.Module, host: str, **settings: Any) -> Put:
    attached = attach(model, RoutedConfig([TARGETS[host]], host=host, **settings))
    return model, attached.context, attached.detach


def by_peft(model: nn.Module, host: str, **settings: Any) -> Put:
    kind: Any = RoutedLoraConfig if host == "lora" else RoutedAdapterConfig
    made = peft.get_peft_model(model, kind(target_modules=[TARGETS[host]], **settings))
    return made, context_of(made), made.unload


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "the second"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("host", TARGETS)
@pytest.mark.parametrize("put", [by_attach, by_peft])
@pytest.mark.parametrize("make", [encoder, Inside])
def test_routed_in_evaluation_as_in_training(
    make: Any, put: Any, host: str, masked: bool, layers: list[int] | None
) -> None:
    mask = {"src_key_padding_mask": PADDING} if masked else {}
    model = make().eval()
    with torch.no_grad():
        plain = model(X, **mask)
    adapted, context, take_out = put(model, host, layers_to_transform=layers)
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    with context.using(IMAGE), torch.no_grad():
        training, evaluation = adapted.train()(X, **mask), adapted.eval()(X, **mask)
    torch.testing.assert_close(training, evaluation)
    counts = ~PADDING if masked else torch.ones_like(PADDING)
    assert not torch.allclose(evaluation[counts], plain[counts])
    take_out()
    with torch.no_grad():
        assert torch.equal(model.eval()(X, **mask), plain)
    assert all(m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder))


@pytest.mark.parametrize("target", ["norm1", "norm2", "self_attn"])
def test_what_the_encoder_reads_of_its_parts_is_there(target: str, tmp_path: Path) -> None:
    """eps and batch_first, in evaluation; the values are those with attach."""
    model = encoder().eval()
    with torch.no_grad():
        plain = model(X)
    attached = attach(model, RoutedConfig([target], host="adapter", r=4))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    attached.save(tmp_path)
    with attached.context.using(IMAGE), torch.no_grad():
        expected = model(X)
    loaded = peft.PeftModel.from_pretrained(encoder().eval(), tmp_path)
    with context_of(loaded).using(IMAGE), torch.no_grad():
        assert torch.equal(loaded(X), expected) and not torch.allclose(expected, plain)


def test_an_encoder_that_was_told_to_pad_stays_so() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1, enable_nested_tensor=False
    )
    attach(model, RoutedConfig(["linear1"])).detach()
    assert model.use_nested_tensor is False


@pytest.mark.parametrize("layer", [RoutedLinear(nn.Linear(8, 8), 2), RoutedAdapter(8, 2)])
def test_nested_tensors_are_refused(layer: Any) -> None:
    with layer.context.using(IMAGE), pytest.raises(ValueError, match=r"x_h .* nested tensor: pad"):
        layer(torch._nested_tensor_from_mask(X, ~PADDING))
