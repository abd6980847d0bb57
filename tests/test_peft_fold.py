"""Images folded into PEFT's routed layers: equal to unfolded ones, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import IDS
from test_peft import IMAGE, MODELS, adapter, drawn, lora
from torch import Tensor

from fused_route import attach, fold, merge

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


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("route", ["mul", "published"])  # into A, and beside it
def test_the_folded_adapter_may_be_any_of_several(route: str, B: int) -> None:
    model = peft.get_peft_model(MODELS["bert"](), lora("bert", route))
    model.add_adapter("b", lora("bert", "none"))
    drawn(model).eval()
    context, image = context_of(model), IMAGE[:B]
    model.base_model.set_adapter(["b", "default"])
    with context.using(image):
        expected = model(IDS[:B])[0]
    model.base_model.set_adapter(["default"])
    with fold(model, image), context.using(image + 1):
        for order in (["b", "default"], ["default", "b"]):
            model.base_model.set_adapter(order)
            torch.testing.assert_close(model(IDS[:B])[0], expected, rtol=1e-4, atol=1e-5)


def test_a_host_that_holds_an_image_comes_first() -> None:
    model = peft.get_peft_model(MODELS["bert"](), lora("bert"))
    model.add_adapter("b", lora("bert", "none"))
    drawn(model).eval()
    model.base_model.set_adapter(["default", "b"])
    with context_of(model).using(IMAGE[:1]):
        expected = model(IDS[:1])[0]
    model.base_model.set_adapter(["default"])
    with fold(model, IMAGE[:1], into="host"):
        model.base_model.set_adapter(["default", "b"])
        torch.testing.assert_close(model(IDS[:1])[0], expected, rtol=1e-4, atol=1e-5)
        model.base_model.set_adapter(["b", "default"])
        with pytest.raises(ValueError, match="folded into its base: activate its adapter first"):
            model(IDS[:1])


MERGES: dict[str, Callable[[Any], object]] = {
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "merge_adapter": lambda m: m.merge_adapter(),
    "a layer's": lambda m: next(x for x in m.modules() if hasattr(x, "active_views")).merge(),
    "fused_route.merge": merge,
}


@pytest.mark.parametrize("way", MERGES)
def test_plain_lora_merges_as_the_refusal_says(way: str, tmp_path: Path) -> None:
    model = drawn(peft.get_peft_model(MODELS["bert"](), lora("bert", "none")))
    with context_of(model).using(IMAGE):
        expected = model(IDS)[0]
    with pytest.raises(ValueError, match=r"save_pretrained.*attach\(base, directory\)\.merge\(\)"):
        MERGES[way](model)
    model.save_pretrained(tmp_path)
    merged = attach(model.unload(), tmp_path).merge()
    assert merged.state_dict().keys() == MODELS["bert"]().state_dict().keys()
    torch.testing.assert_close(merged(IDS)[0], expected, rtol=1e-4, atol=1e-5)


def test_what_an_image_routes_folds_as_the_refusal_says() -> None:
    model = peft.get_peft_model(MODELS["bert"](), lora("bert"))
    with pytest.raises(ValueError, match=r"depends on the image.* fold\(model, x_r\) holds one"):
        merge(model)
    plain = peft.get_peft_model(MODELS["bert"](), adapter("bert", "none"))
    for refused in (merge, lambda m: m.merge_and_unload()):
        with pytest.raises(ValueError, match="only routed linear layers merge"):
            refused(plain)
