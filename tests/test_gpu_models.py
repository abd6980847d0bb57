"""A routed vision-language model on a GPU: training steps and texts as with the reference.

As in test_gpu.py, in the interpreter on the CPU. transformers is imported by the tests that need
it: every process of `pytest -n` would, with the module.
"""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_route import RoutedConfig, attach

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers"),
    *([pytest.mark.filterwarnings("default")] if ON_GPU else []),
]

# What is adapted in a GPT-2, by name.
ADAPTED: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["c_attn"], "adapted": (0, 2), "of": 3},
    "adapter": {"target_modules": ["mlp"], "host": "adapter"},
}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"route": "mul"},
    "lora-tokens": {"route": "gram"},
    "adapter": {"route": "mul"},
    "adapter-tokens": {"route": "gram"},
}


def routed(way: str, strength: float = 1.0) -> Any:
    """On the CPU in fp32, the same every time; the stronger, the more its image decides."""
    from vlm_models import VISUAL_WIDTH, drawn, vision_language

    host, _, features = way.partition("-")
    model = vision_language("gpt2", features=features or "pooled")
    config = RoutedConfig(r=4, visual_width=VISUAL_WIDTH, **ADAPTED[host], **WAYS[way])
    layers = attach(model, config).layers.values()
    drawn(model)
    with torch.no_grad():
        for layer in layers:
            layer.B.mul_(strength)
    return model


def with_impl(model: Any, impl: str, dtype: torch.dtype) -> Any:
    """A copy on the device."""
    made = copy.deepcopy(model).to(DEVICE, dtype)
    layers = [module for module in made.modules() if hasattr(module, "impl")]
    assert layers
    for layer in layers:
        layer.impl = impl
    return made


def step(model: Any) -> dict[str, Tensor]:
    """The loss of one batch, and all gradients as one: of a tensor of few elements luck decides."""
    from vlm_models import images, texts

    ids, dtype = texts(8, 12), next(model.parameters()).dtype
    out = model.train()(
        ids.to(DEVICE),
        pixel_values=images(8).to(DEVICE, dtype),
        labels=ids.to(DEVICE),
    )
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) > 2 and all(bool(grad.any()) for grad in grads)
    return {"loss": out.loss.detach(), "gradients": torch.cat([grad.flatten() for grad in grads])}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_training_step(way: str, dtype: torch.dtype) -> None:
    from bench.models import disagreement

    model = routed(way).to(dtype)
    actual = step(with_impl(model, "triton", dtype))
    eager = step(with_impl(model, "reference", dtype))
    truth = step(with_impl(model, "reference", torch.float64))
    assert disagreement(actual, eager, truth) <= 3.0  # 1.8 at most in 40 other batches of texts


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_generates_the_same_text(way: str, beams: int) -> None:
    from vlm_models import images, texts

    model, ids = routed(way, strength=8.0 if "lora" in way else 1.0), texts(3).to(DEVICE)
    found = []
    for impl, seed in (("triton", 1), ("reference", 1), ("reference", 8)):
        made = with_impl(model, impl, torch.float32).eval()
        text: Tensor = made.generate(
            input_ids=ids, pixel_values=images(3, seed).to(DEVICE), num_beams=beams,
            max_new_tokens=8, min_new_tokens=8, do_sample=False,
        )  # fmt: skip
        found.append(text)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2]), "the image changes nothing"


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_graph_captured_inside_using_sees_the_features_of_its_replay() -> None:
    """x_v that the context has made is from before the capture: layers make their own."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    attached = attach(model, RoutedConfig(r"\d", r=8))
    for layer in attached.layers.values():
        torch.nn.init.normal_(layer.B)
    model.to(DEVICE)
    x_h, features = torch.randn(2, 3, 64, device=DEVICE), torch.randn(2, 64, device=DEVICE)
    other, graph = torch.randn_like(features), torch.cuda.CUDAGraph()
    with torch.no_grad():
        attached.context.together.remove(attached.layers.values())
        with attached.using(features):
            model(x_h)  # loads the kernels of layers that project by themselves
            torch.cuda.synchronize()
        with attached.using(features):
            assert attached.context._thread.held.projected
            with torch.cuda.graph(graph):
                y = model(x_h)
        with attached.using(other):
            expected = model(x_h)
        features.copy_(other)
        graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_image_follows_the_layers_of_a_model_on_two_gpus() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12)))
    attached = attach(model, RoutedConfig(r"\d+", r=8))
    for layer in attached.layers.values():
        torch.nn.init.normal_(layer.B)
    x_h, features = torch.randn(2, 3, 64), torch.randn(2, 64)
    results = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        first, second = (model[i : i + 6].to(d) for i, d in zip((0, 6), devices, strict=True))
        image = features.to(devices[0]).requires_grad_()
        for grad in (True, False):
            with torch.set_grad_enabled(grad), attached.using(image):
                y = second(first(x_h.to(devices[0])).to(devices[1]))
            results.append(y.cpu())
            if grad:
                y.square().sum().backward()
                results.append(image.grad.cpu())  # type: ignore[union-attr]
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
