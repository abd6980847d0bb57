"""Frozen bases that are no nn.Linear: quantised layers, and anything from (…, d) to (…, n)."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vlm import lora
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from vlm_models import LAYERS, drawn, images, texts, vision_language, vit

from fused_route import RoutedConfig, attach
from fused_route.training.vlm import VisionLanguageModel

peft = pytest.importorskip("peft", minversion="0.21")


class Int8(nn.Module):
    """A weight in whole numbers, as quantised layers keep it."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def two_linears(linear: nn.Linear) -> nn.Module:
    """No weight of its own."""
    both: Any = nn.Sequential(linear, nn.Linear(linear.out_features, linear.out_features))
    both.in_features, both.out_features = linear.in_features, linear.out_features
    made: nn.Module = both
    return made


def bitsandbytes_8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
    )
    made.load_state_dict(linear.state_dict(), strict=False)
    return made.to("cpu")


def bitsandbytes_4(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4",
        compute_dtype=torch.float32,
    )  # fmt: skip
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def torchao_8(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    around = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(around, quantization.Int8WeightOnlyConfig())
    return around[0]


WIDTH = 64  # bitsandbytes' kernels for the CPU take widths divisible by 32

KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8": Int8,
    "two linears": two_linears,
    "bitsandbytes 8": bitsandbytes_8,
    "bitsandbytes 4": bitsandbytes_4,
    "torchao 8": torchao_8,
}


def quantised(kind: str) -> Any:
    """A Llama whose query and value projections are of this kind."""
    torch.manual_seed(4)
    config = LlamaConfig(**{**LAYERS, "hidden_size": WIDTH, "initializer_range": 0.1})
    model = VisionLanguageModel.from_parts(vit(), LlamaForCausalLM(config))
    for name, module in list(model.language.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            parent, _, child = name.rpartition(".")
            setattr(model.language.get_submodule(parent), child, KINDS[kind](module))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_routed_as_any_other(kind: str, tmp_path: Path) -> None:
    """The base's output and the update, gradients of the adapter, both ways of putting it in."""
    given: dict[str, Any] = {"input_ids": texts(2), "pixel_values": images(2)}
    model = peft.get_peft_model(quantised(kind), lora("llama"))
    layers = [m for m in model.modules() if hasattr(m, "active_views")]
    heard: list[tuple[Tensor, Tensor]] = []
    layers[0].base_layer.register_forward_hook(lambda m, args, out: heard.append((args[0], out)))
    layers[0].register_forward_hook(lambda m, args, out: heard.append((args[0], out)))
    model(**given)
    assert torch.equal(heard[0][1], heard[1][1]), "an update of zero"
    heard.clear()
    drawn(model)
    model(**given, labels=texts(2)).loss.backward()
    (x_h, base), (_, y) = heard
    view = layers[0].views["default"]
    x_r = model.base_model.visual_projector(model.get_base_model().encode_images(images(2)))[WIDTH]
    routed = (x_h @ view.A.T) * (x_r @ view.A.T) @ view.B.T
    torch.testing.assert_close(y, base + view.s * routed, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(quantised(kind), tmp_path)
        attached = attach(quantised(kind), tmp_path)
        assert torch.equal(attached.model(**given).logits, loaded(**given).logits)


def test_a_base_that_tells_no_widths_is_refused_by_name() -> None:
    model = vision_language("llama")
    model.language.model.layers[0].self_attn.q_proj = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: Sequential is no linear"):
        attach(model, RoutedConfig(["q_proj"], r=2))
