"""Images folded into PEFT's routed layers: equal to unfolded ones, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attach import IDS
from test_peft import IMAGE, MODELS, adapter, drawn, lora
from torch import Tensor

from fused_route import fold

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import context_of  # noqa: E402


@pytest.mark.parametrize("config", [lora, adapter])
def test_an_image_folds_in(config: Any) -> None:
    model = drawn(peft.get_peft_model(MODELS["gpt2"](), config("gpt2", "gram unit"))).eval()
    with context_of(model).using(IMAGE[:1]):
        expected = model(IDS[:1])[0]
    with fold(model, IMAGE[:1]):
        torch.testing.assert_close(model(IDS[:1])[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has no routing input"):
        model(IDS[:1])


def of(model: Any, ending: str) -> Tensor:
    """The first parameter whose name ends so."""
    return next(p for name, p in model.named_parameters() if name.endswith(ending))


CHANGES: dict[str, Callable[[Any], object]] = {
    "adapter": lambda m: of(m, "query.lora_A.default.weight").mul_(2),
    "base": lambda m: of(m, "query.base_layer.weight").mul_(2),
    "base's bias": lambda m: of(m, "query.base_layer.bias").add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("into", ["bottleneck", "host"])
def test_a_change_is_noticed(into: str, change: str) -> None:
    model = drawn(peft.get_peft_model(MODELS["bert"](), lora("bert"))).eval()
    with fold(model, IMAGE[:1], into=into), torch.no_grad():
        model(IDS[:1])
        CHANGES[change](model)
        with pytest.raises(ValueError, match="has changed since an image was folded in"):
            model(IDS[:1])
