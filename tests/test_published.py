"""Tensors under the names of the published code, read into routed layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fused_route import Attached, RoutedAdapter, RoutedConfig, RoutedLinear, Routing, attach
from fused_route.bottleneck import Bottleneck
from fused_route.published import load_published

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
D = 6


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-300))


def golden_layer(meta: dict[str, Any], t: dict[str, Tensor]) -> Bottleneck:
    """The layer that a golden file is of, with its base, but with other A and B."""
    routing = Routing(meta["routing"], compat="eccv24")
    if meta["kind"] == "adapter":
        settings: dict[str, Any] = {"residual": meta["residual"], "dtype": torch.float64}
        return RoutedAdapter(meta["d"], meta["r"], routing, "gelu_tanh", **settings)
    qkv = meta["kind"] == "lora_qkv"
    base: Any = Conv1D(meta["n"], meta["d"]) if qkv else nn.Linear(meta["d"], meta["n"])
    base.double().load_state_dict({"weight": t["param.weight"], "bias": t["param.bias"]})
    segments: dict[str, Any] = {"adapted": (0, 2), "of": 3} if qkv else {}
    return RoutedLinear(base, meta["r"], meta["alpha"], routing, **segments)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_numbers_under_published_names(path: Path) -> None:
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layer = golden_layer(meta, t)
    state = {f"module.gpt.h.1.attn.{k[6:]}": v for k, v in t.items() if k.startswith("param.")}
    load_published({"h.1.attn": layer}, state)

    inputs = {name: t[name].requires_grad_() for name in ("x_h", "x_r") if name in t}
    if "x_r" in inputs:
        layer.context.set(inputs["x_r"])
    y = layer(inputs["x_h"])
    assert relative_error(y, t["y"]) < 1e-12
    y.backward(t["grad_y"])
    grads = {f"grad_{name}": tensor.grad for name, tensor in inputs.items()}
    if isinstance(layer, RoutedAdapter):
        assert layer.b_A is not None and layer.b_B is not None
        grads["grad.down_sampler.bias"] = layer.b_A.grad
        grads["grad.up_sampler.bias"] = layer.b_B.grad
    down, up = ("lora_A", "lora_B")
    if isinstance(layer, RoutedAdapter):
        down, up = ("down_sampler.weight", "up_sampler.weight")
    grads |= {f"grad.{down}": layer.A.grad, f"grad.{up}": layer.B.grad}
    for name, grad in grads.items():
        assert grad is not None and relative_error(grad, t[name]) < 1e-12, name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(D, D)
        self.mlp = nn.Linear(D, D)


def model(blocks: int = 12) -> nn.Module:
    """Layers h.0 to h.11: "h.1" is the end of no other, but its beginning."""
    return nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(blocks))})


def lora(**settings: Any) -> Attached:
    return attach(model(), RoutedConfig(["attn", "mlp"], r=2, **settings))


def adapters(**settings: Any) -> Attached:
    return attach(model(2), RoutedConfig(["attn", "mlp"], host="adapter", r=2, **settings))


def lora_state(prefix: str = "module.") -> dict[str, Tensor]:
    paths = [f"{prefix}h.{i}.{kind}" for i in range(12) for kind in ("attn", "mlp")]
    shapes = {"lora_A": (2, D), "lora_B": (D, 2)}
    return {f"{p}.{ending}": torch.randn(s) for p in paths for ending, s in shapes.items()}


def adapter_state(paths: list[str]) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "down_sampler.weight": (2, D),
        "down_sampler.bias": (2,),
        "up_sampler.weight": (D, 2),
        "up_sampler.bias": (D,),
    }
    return {f"{p}.{ending}": torch.randn(s) for p in paths for ending, s in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "gpt.", "module.module.gpt."])
def test_every_layer_gets_its_own(prefix: str) -> None:
    attached, state = lora(), lora_state(prefix)
    own = {f"{prefix}h.0.attn.weight": torch.randn(D, D), f"{prefix}ln_f.bias": torch.randn(D)}
    base = attached.model.get_submodule("h.0.attn.base").get_parameter("weight").clone()
    load_published(attached, state | own)
    for name, layer in attached.layers.items():
        assert torch.equal(layer.A, state[f"{prefix}{name}.lora_A"]), name
        assert torch.equal(layer.B, state[f"{prefix}{name}.lora_B"]), name
        assert layer.A.requires_grad and layer.A.is_leaf
    after = attached.model.get_submodule("h.0.attn.base").get_parameter("weight")
    assert torch.equal(after, base)  # the language model's own values are left out


def test_layers_keep_their_dtype() -> None:
    attached = attach(model().bfloat16(), RoutedConfig(["attn", "mlp"], r=2))
    state = lora_state()
    load_published(attached, state)
    A = attached.layers["h.3.mlp"].A
    assert A.dtype == torch.bfloat16 and torch.equal(A, state["module.h.3.mlp.lora_A"].bfloat16())


@pytest.mark.parametrize("share", ["none", "block"])
def test_one_published_adapter_for_two_of_ours(share: str) -> None:
    attached = adapters(share=share)
    state = adapter_state([f"gpt.h.{i}.adapter" for i in range(2)])
    names = {f"h.{i}.{kind}": f"h.{i}.adapter" for i in range(2) for kind in ("attn", "mlp")}
    load_published(attached, state, names)
    for name, layer in attached.layers.items():
        assert isinstance(layer, RoutedAdapter) and layer.b_A is not None and layer.b_B is not None
        block = name.rpartition(".")[0]
        ours = {
            "down_sampler.weight": layer.A,
            "down_sampler.bias": layer.b_A,
            "up_sampler.weight": layer.B,
            "up_sampler.bias": layer.b_B,
        }
        for ending, tensor in ours.items():
            assert torch.equal(tensor, state[f"gpt.{block}.adapter.{ending}"])


def test_adapters_without_biases() -> None:
    attached = adapters(bias=False)
    state = adapter_state(list(attached.layers))
    weights = {k: v for k, v in state.items() if k.endswith("weight")}
    load_published(attached, weights)
    assert torch.equal(attached.layers["h.0.mlp"].B, state["h.0.mlp.up_sampler.weight"])
    with pytest.raises(ValueError, match=r"unexpected: down_sampler.bias of h.0.attn"):
        load_published(attached, state)


def test_of_nested_names_the_longest_is_meant() -> None:
    layers = {name: RoutedLinear(nn.Linear(D, D), 2) for name in ("attn", "b.attn")}
    state = {
        f"x.{name}.{ending}": torch.randn(shape)
        for name in layers
        for ending, shape in (("lora_A", (2, D)), ("lora_B", (D, 2)))
    }
    load_published(layers, state)
    for name, layer in layers.items():
        assert torch.equal(layer.A, state[f"x.{name}.lora_A"])


def split_layer() -> dict[str, Bottleneck]:
    return {"h.0.attn": RoutedLinear(nn.Linear(D, D), 2, inner_rank=1)}


def normed_adapter() -> dict[str, Bottleneck]:
    return {"h.0.attn": RoutedAdapter(D, 2, norm="before")}


def shared_adapters() -> Attached:
    return adapters(share="block")


def on_meta() -> Attached:
    return attach(model().to("meta"), RoutedConfig(["attn", "mlp"], r=2))


def without(*keys: str) -> dict[str, Any]:
    return {k: v for k, v in lora_state().items() if k not in keys}


KEY = "module.h.11.mlp.lora_B"
BAD: dict[str, tuple[Callable[[], Any], Any, Any, str]] = {
    "missing": (lora, without(KEY), None, r"missing: lora_B of h.11.mlp$"),
    "missing layer": (
        lora,
        without(KEY, "module.h.11.mlp.lora_A"),
        None,
        r"missing: lora_A of h.11.mlp, lora_B of h.11.mlp$",
    ),
    "no part of a name": (
        lambda: {"1.mlp": RoutedLinear(nn.Linear(D, D), 2)},
        {f"h.11.mlp.lora_{x}": torch.zeros(2) for x in "AB"},
        None,
        r"missing: lora_A of 1.mlp, lora_B of 1.mlp; "
        r"unexpected: h.11.mlp.lora_A, h.11.mlp.lora_B$",
    ),
    "left over": (
        lora,
        lora_state() | {"module.h.12.attn.lora_A": torch.zeros(2, D)},
        None,
        r"unexpected: module.h.12.attn.lora_A$",
    ),
    "left over, of another host": (
        lora,
        lora_state() | {"module.h.0.adapter.up_sampler.bias": torch.zeros(2)},
        None,
        r"unexpected: module.h.0.adapter.up_sampler.bias$",
    ),
    "published split": (
        lora,
        lora_state() | {"module.h.0.attn.lora_A_text.weight": torch.zeros(2, D)},
        None,
        r"unexpected: lora_A_text.weight of h.0.attn$",
    ),
    "shape": (
        lora,
        lora_state() | {KEY: torch.zeros(D, 3)},
        None,
        r"lora_B of h.11.mlp is \(6, 3\), the model has \(6, 2\)$",
    ),
    "whole numbers": (
        lora,
        lora_state() | {KEY: torch.zeros(D, 2, dtype=torch.int64)},
        None,
        r"lora_B of h.11.mlp is torch.int64 \(6, 2\)",
    ),
    "no tensor": (
        lora,
        lora_state() | {KEY: [0.0]},
        None,
        r"lora_B of h.11.mlp must be a tensor, got",
    ),
    "no values": (
        lora,
        lora_state() | {KEY: torch.zeros(D, 2, device="meta")},
        None,
        r"lora_B of h.11.mlp is on the meta device",
    ),
    "no memory": (on_meta, lora_state(), None, r"the model is on the meta device"),
    "ambiguous": (
        lora,
        lora_state() | {"ema.h.11.mlp.lora_B": torch.zeros(D, 2)},
        None,
        r"h.11.mlp could be module.h.11.mlp or ema.h.11.mlp: tell by names",
    ),
    "unknown layer in names": (
        lora,
        lora_state(),
        {"h.12.attn": "h.0.attn"},
        r"names has 'h.12.attn'; the layers are h.0.attn, h.0.mlp",
    ),
    "no path in names": (lora, lora_state(), {"h.0.attn": ""}, r"names\['h.0.attn'\] must be"),
    "names": (lora, lora_state(), ["h.0.attn"], r"names must be .* by layer, got list"),
    "split layer": (
        split_layer,
        {"h.0.attn.lora_A": torch.zeros(2, D), "h.0.attn.lora_B": torch.zeros(D, 2)},
        None,
        r"h.0.attn holds a split projection, U, A_v, U_v: the published layers have no such",
    ),
    "normed adapter": (
        normed_adapter,
        adapter_state(["h.0.attn"]),
        None,
        r"h.0.attn has norm_weight, norm_bias: the published layers have no such tensors",
    ),
    "one layer, two values": (
        shared_adapters,
        adapter_state(["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]),
        None,
        r"h.0.attn and h.0.mlp are one layer: give it one path by names",
    ),
    "kind of layer": (
        lambda: {"h.0.attn": nn.Linear(2, 2)},
        {},
        None,
        r"h.0.attn is a Linear, which",
    ),
    "tensors": (lora, [torch.zeros(2)], None, r"tensors must be tensors by name, got list"),
    "keys": (lora, {3: torch.zeros(2)}, None, r"tensors must be tensors by name"),
    "into": (lambda: model(1), {}, None, r"into must be what attach returned"),
    "nothing": (dict, {}, None, r"into must be what attach returned, .* got \{\}"),
}


def layers_of(into: Any) -> dict[str, Bottleneck]:
    return getattr(into, "layers", into if isinstance(into, dict) else {})


@pytest.mark.parametrize("kind", BAD)
def test_refused_and_nothing_changed(kind: str) -> None:
    make, tensors, names, message = BAD[kind]
    into = make()
    parameters = [p for layer in layers_of(into).values() for p in layer.parameters()]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match=message):
        load_published(into, tensors, names)
    for now, then in zip(parameters, before, strict=True):
        assert now.is_meta or torch.equal(now, then)
