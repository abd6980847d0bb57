"""Half-precision models under PEFT, which keeps in fp32 what it trains."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import IDS
from test_peft import IMAGE, MODELS, adapter, drawn, lora, run

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedLoraConfig  # noqa: E402

HALF: dict[str, Any] = {
    "lora": lora("bert", "gram unit"),
    "adapter": adapter("bert"),
    "norm before": adapter("bert", norm="before"),
    "norm after": adapter("bert", norm="after", residual=False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", HALF)
def test_half_precision_models_keep_adapters_in_fp32(kind: str, dtype: torch.dtype) -> None:
    model = peft.get_peft_model(MODELS["bert"]().to(dtype), copy.deepcopy(HALF[kind]))
    trained = {n: p for n, p in drawn(model).named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    model.add_adapter("second", copy.deepcopy(HALF[kind]))
    model.base_model.set_adapter(["default", "second"])
    y = run(model, image=IMAGE.to(dtype))
    assert y.dtype == dtype and y.isfinite().all()
    exact = run(copy.deepcopy(model).float(), image=IMAGE.to(dtype).float())
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    y[..., 0].float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_projector_is_in_the_dtype_of_the_adapter(
    dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    config = RoutedLoraConfig(target_modules=["query"], r=4, visual_width=5)
    how: Any = {"autocast_adapter_dtype": autocast}
    made = peft.get_peft_model(MODELS["bert"]().to(dtype), config, **how)
    saved = {n: p.clone() for n, p in made.named_parameters() if p.requires_grad}
    made.save_pretrained(tmp_path)
    loaded = [
        peft.PeftModel.from_pretrained(
            MODELS["bert"]().to(dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low, **how
        )
        for low in (False, True)
    ]
    for model in (made, *loaded):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum("visual_projector" in name for name in trained) == 2
        assert {p.dtype for p in trained.values()} == {torch.float32 if autocast else dtype}
        assert all(torch.equal(trained[n], p) for n, p in saved.items())
        with model.context.using(torch.randn(2, 3, 5)):
            y = model(IDS)[0]
        y[..., 0].float().square().sum().backward()
        assert y.dtype == dtype and all(p.grad is not None for p in trained.values())


def test_a_double_precision_projector_stays() -> None:
    config = RoutedLoraConfig(target_modules=["query"], r=4, visual_width=5)
    model = peft.get_peft_model(MODELS["bert"]().double(), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}
