"""Routed adapters under PEFT: models × configurations × operations, and what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors import safe_open
from test_attach import CONFIGS, IDS, bart, bert, gpt2
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from fused_route import RoutedConfig, RoutingContext, attach, fold

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import (  # noqa: E402
    RoutedAdapterConfig,
    RoutedLoraConfig,
    checkpoint_activations,
    context_of,
)

integration = pytest.importorskip("transformers.integrations.peft")
# transformers 5.24 asks for peft 0.22 before it adds or loads an adapter by itself.
takes_this_peft = Version(peft.__version__) >= Version(integration.MIN_PEFT_VERSION)

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], Any]:
    """The same model every time."""

    def model() -> Any:
        torch.manual_seed(11)
        return make().eval()

    return model


MODELS: dict[str, Callable[[], Any]] = {
    "bert": seeded(bert),
    "gpt2": seeded(gpt2),
    "bart": seeded(bart),
    "roberta": seeded(lambda: RobertaModel(RobertaConfig(**TINY, max_position_embeddings=20))),
    "llama": seeded(lambda: LlamaModel(LlamaConfig(**TINY, num_key_value_heads=2))),
    "qwen": seeded(lambda: Qwen2Model(Qwen2Config(**TINY, num_key_value_heads=2))),
    "t5": seeded(
        lambda: T5Model(
            T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
        )
    ),
}
TARGETS = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "bart": ["q_proj", "v_proj"],
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "qwen": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mul": {"route": "mul", "lora_alpha": 8},
    "gram unit": {"route": "gram", "normalize": "unit"},
    "split": {"route": "gram", "inner_rank": 2},
    "none": {"route": "none"},
    "published": {"route": "add", "transpose": "eccv24", "segments": "joint"},
}


def lora(model: str, setting: str = "mul", **more: Any) -> RoutedLoraConfig:
    fused: dict[str, Any] = {"adapted": (0, 2), "of": 3} if model == "gpt2" else {}
    return RoutedLoraConfig(
        r=4, target_modules=TARGETS[model], **fused, **SETTINGS[setting], **more
    )


def adapter(model: str, setting: str = "mul", **more: Any) -> RoutedAdapterConfig:
    settings = {k: v for k, v in SETTINGS[setting].items() if k != "lora_alpha"}
    targets = {"gpt2": ["attn", "mlp"], "t5": ["wo"]}.get(model, TARGETS[model])
    return RoutedAdapterConfig(r=4, target_modules=targets, **settings, **more)


CASES = [
    (make, model, setting) for make in (lora, adapter) for model in MODELS for setting in SETTINGS
]
ids = [f"{make.__name__}-{model}-{setting}" for make, model, setting in CASES]
IMAGE = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))


def drawn(model: Any) -> Any:
    """With values in every parameter that trains."""
    for name, parameter in model.named_parameters():
        if any(part.startswith(("lora_", "adapter_")) for part in name.split(".")):
            with torch.no_grad():
                parameter.normal_(std=0.4)
    return model


def run(model: Any, context: RoutingContext | None = None, image: Tensor = IMAGE) -> Tensor:
    context = context_of(model) if context is None else context
    pair = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with context.using(image):
        return model(input_ids=IDS, **pair)[0]


def assert_same(one: Tensor, other: Tensor) -> None:
    """Equal but for the last bit, which in T5 follows from where tensors lie in memory."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("config", "name", "setting"), CASES, ids=ids)
def test_round_trips(config: Any, name: str, setting: str, tmp_path: Path) -> None:
    """PEFT writes, PEFT and attach read, attach writes, PEFT reads: the same bits each time."""
    make = MODELS[name]
    plain = make()
    model = drawn(peft.get_peft_model(plain, config(name, setting)))
    expected = run(model)
    assert setting == "none" or not torch.equal(run(model, image=IMAGE.flip(-1)), expected)
    model.save_pretrained(tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "peft")
    assert torch.equal(run(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "peft")) is type(config(name))
    attached = attach(make(), tmp_path / "peft")
    with attached.using(IMAGE):
        assert torch.equal(run(attached.model, attached.context), expected)
    attached.save(tmp_path / "attach")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "attach", is_trainable=True)
    assert torch.equal(run(again), expected)
    keys = [set(stored(tmp_path / folder)) for folder in ("peft", "attach")]
    assert keys[0] == keys[1]


def stored(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize("kind", ["conv1d", "adapter", "projector", "saved"])
def test_layout_is_pinned(kind: str, tmp_path: Path) -> None:
    """The names that `attach` writes, from the same file."""
    make, arguments, _ = CONFIGS[kind]
    routed = RoutedConfig(**arguments).to_json()
    config = {"lora": RoutedLoraConfig, "adapter": RoutedAdapterConfig}[
        arguments.get("host", "lora")
    ](**{key: value for key, value in routed.items() if key != "peft_type"})
    peft.get_peft_model(make(), config).save_pretrained(tmp_path)
    golden = json.loads((Path(__file__).parent / "golden" / "checkpoint_keys.json").read_text())
    assert stored(tmp_path) == golden[kind]["tensors"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(golden[kind]["config"]) <= set(written)


@pytest.mark.parametrize(("config", "name", "setting"), CASES, ids=ids)
def test_gradients_reach_the_adapter_alone(config: Any, name: str, setting: str) -> None:
    model = drawn(peft.get_peft_model(MODELS[name](), config(name, setting)))
    run(model)[..., 0].square().sum().backward()  # norms make a sum over all constant
    for n, parameter in model.named_parameters():
        is_adapter = any(part.startswith(("lora_", "adapter_")) for part in n.split("."))
        assert parameter.requires_grad == is_adapter == (parameter.grad is not None), n
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), n


@pytest.mark.parametrize("config", [lora, adapter])
@pytest.mark.parametrize("name", MODELS)
def test_disabled_and_unloaded_it_is_the_base(config: Any, name: str) -> None:
    base = MODELS[name]()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    expected = run(base, RoutingContext())
    model = drawn(peft.get_peft_model(base, config(name)))
    assert not torch.equal(run(model), expected)
    with model.disable_adapter():
        assert_same(run(model), expected)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == state.keys()
    assert all(torch.equal(unloaded.state_dict()[k], v) for k, v in state.items())
    assert_same(run(unloaded, RoutingContext()), expected)


@pytest.mark.skipif(not takes_this_peft, reason="transformers refuses this version of peft")
@pytest.mark.parametrize("config", [lora, adapter])
@pytest.mark.parametrize("name", MODELS)
def test_through_transformers(config: Any, name: str, tmp_path: Path) -> None:
    make = MODELS[name]
    model = make()
    plain = run(model, RoutingContext())
    model.add_adapter(config(name), "mine")
    expected = run(drawn(model))
    model.save_pretrained(tmp_path)
    loaded = make()
    info = loaded.load_adapter(str(tmp_path), "other")
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(run(loaded), expected)
    assert torch.equal(run(peft.PeftModel.from_pretrained(make(), tmp_path)), expected)
    loaded.disable_adapters()
    assert_same(run(loaded, RoutingContext()), plain)
    loaded.enable_adapters()
    assert torch.equal(run(loaded), expected)


@pytest.mark.parametrize("config", [lora, adapter])
def test_several_adapters(config: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(MODELS["bert"](), config("bert", "mul"))
    model.add_adapter("second", config("bert", "split"))
    drawn(model)
    first = run(model)
    model.set_adapter("second")
    second = run(model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(".second." in n for n in trains)
    model.base_model.set_adapter(["default", "second"])
    both = run(model)
    assert len({y[0, 0, 0].item() for y in (first, second, both)}) == 3
    with pytest.raises(ValueError, match="has 2 active adapters: activate one to fold"):
        fold(model.eval(), IMAGE[:1])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MODELS["bert"](), tmp_path)
    loaded.load_adapter(tmp_path / "second", "other name")
    assert torch.equal(run(loaded), first)
    loaded.set_adapter("other name")
    assert torch.equal(run(loaded), second)
    loaded.delete_adapter("default")
    assert torch.equal(run(loaded), second)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied), both) and context_of(copied) is not context_of(model)


def test_modules_to_save_and_projector(tmp_path: Path) -> None:
    config = lora("bert", visual_width=5, modules_to_save=["pooler"])
    model = drawn(peft.get_peft_model(MODELS["bert"](), config))
    image = torch.randn(2, 3, 5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("visual_projector" in n for n in trained) == 2
    assert sum("pooler.modules_to_save" in n for n in trained) == 2
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    context = context_of(model)
    with context.using(image):
        expected = model(IDS).pooler_output
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MODELS["bert"](), tmp_path)
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad]
    attached = attach(MODELS["bert"](), tmp_path)
    for other, held in ((loaded, context_of(loaded)), (attached.model, attached.context)):
        with held.using(image):
            assert torch.equal(other(IDS).pooler_output, expected)
    with pytest.raises(ValueError, match="visual_width with several adapters"):
        model.add_adapter("second", config)


def test_unloading_takes_hooks_out() -> None:
    config = RoutedLoraConfig(r=2, target_modules=["encoder_attn.q_proj"], routed_by="encoder")
    base = MODELS["bart"]()
    model = peft.get_peft_model(base, config)
    assert any(module._forward_pre_hooks for module in model.modules())
    unloaded = model.unload()
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


def test_the_models_own_context_is_used() -> None:
    base = MODELS["bert"]()
    base.context = RoutingContext()
    model = peft.get_peft_model(base, lora("bert"))
    assert model.context is base.context is context_of(model)
    with pytest.raises(ValueError, match="has no routed adapter of PEFT's"):
        context_of(MODELS["bert"]())


@pytest.mark.parametrize("way", ["ours", "raw"])
def test_gradient_checkpointing(way: str) -> None:
    model = drawn(peft.get_peft_model(MODELS["bert"](), lora("bert"))).train()
    for module in model.modules():  # one mask for both
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    context, images = context_of(model), (IMAGE, IMAGE.flip(-1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        total = torch.zeros(())
        for image in images:  # two forwards, then one backward
            total = total + run(model, context, image)[..., 0].square().sum()
        total.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    if way == "ours":
        checkpoint_activations(model)
        for mine, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        return
    raw = {"use_reentrant": False}
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": raw})
    with pytest.raises(RuntimeError, match="is called inside a backward pass"):
        gradients()


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "merge_and_unload": (lambda m: m.merge_and_unload(), "depends on the image"),
    "merge_adapter": (lambda m: m.merge_adapter(), "depends on the image"),
    "layer merge": (lambda m: layer_of(m).merge(), "depends on the image"),
    "weighted": (lambda m: m.add_weighted_adapter(["default"], [1.0], "w"), "by weights"),
    "adapter_names": (
        lambda m: m(IDS, adapter_names=["default", "default"]), "would drop the image",
    ),
    "plain LoRA beside": (
        lambda m: m.add_adapter("plain", peft.LoraConfig(target_modules=["query"])), "ROUTED_LORA",
    ),
}  # fmt: skip


def layer_of(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "active_views"))


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_silently_wrong_is_refused(what: str) -> None:
    model = peft.get_peft_model(MODELS["bert"](), lora("bert"))
    call, message = REFUSED[what]
    with context_of(model).using(IMAGE), pytest.raises(ValueError, match=message):
        call(model)
    assert not model.base_model.supports_lora_conversion()
    assert not layer_of(model).supports_lora_conversion()


def test_targets_are_matched_as_attach_matches_them() -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        ({"query", "value"}, {}),
        (r".*layer\.[02].*query", {}),
        (["query"], {"layers_to_transform": [1]}),
    ]
    for targets, more in cases:
        config = RoutedLoraConfig(target_modules=targets, r=2, **more)
        model = peft.get_peft_model(MODELS["bert"](), config)
        names = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "active_views")]
        listed = sorted(targets) if isinstance(targets, set) else targets
        assert names == list(attach(MODELS["bert"](), RoutedConfig(listed, r=2, **more)).layers)
    for targets, message in ((["nowhere"], "matches no module"), (["query", "nowhere"], "nowhere")):
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(MODELS["bert"](), RoutedLoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="part of a decoder"):
        config = RoutedLoraConfig(target_modules=["c_attn"], route="self_gram")
        peft.get_peft_model(MODELS["gpt2"](), config)


def test_a_routed_checkpoint_never_comes_back_as_lora(tmp_path: Path) -> None:
    peft.get_peft_model(MODELS["bert"](), lora("bert")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "ROUTED_LORA" and written["route"] == "mul"
    script = (
        "import sys, peft\n"
        "try: peft.PeftConfig.from_pretrained(sys.argv[1])\n"
        "except KeyError as error: assert 'ROUTED_LORA' in str(error)\n"
        "else: sys.exit('it was taken for something else')"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_with_little_memory(low_memory: bool, tmp_path: Path) -> None:
    model = drawn(peft.get_peft_model(MODELS["bert"](), lora("bert")))
    expected = run(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        MODELS["bert"](), tmp_path, low_cpu_mem_usage=low_memory
    )
    assert torch.equal(run(loaded), expected)


def test_a_model_may_name_the_input_as_its_own_layer_does() -> None:
    layer = layer_of(drawn(peft.get_peft_model(MODELS["bert"](), lora("bert", "none"))))
    x_h = torch.randn(2, 3, 8)
    expected = layer(x_h)
    assert torch.equal(layer(input=x_h), expected)
    layer.enable_adapters(False)
    assert torch.equal(layer(input=x_h), layer.base_layer(x_h))
