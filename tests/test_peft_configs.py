"""Settings of the PEFT configurations that are refused, and those of peft.LoraConfig."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import bert
from test_peft import MODELS, drawn, run, seeded
from test_positions import classifier
from transformers import BertForTokenClassification
from vlm_models import VISUAL_WIDTH, vision_language

from fused_route import RoutedConfig, attach

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig  # noqa: E402
from fused_route.peft.configs import OF_LORA  # noqa: E402

BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: RoutedLoraConfig(), "target_modules is empty"),
    (lambda: RoutedLoraConfig(target_modules=["a"], route="sum"), "route must be one of none, add"),
    (lambda: RoutedLoraConfig(target_modules=["a"], r=0), "r must be a whole number"),
    (
        lambda: RoutedLoraConfig(target_modules=["a"], lora_dropout=1.0),
        r"dropout must be in \[0, 1\)",
    ),
    (
        lambda: RoutedLoraConfig(target_modules=["a"], train=("norms",)),
        "PEFT trains what modules_to",
    ),
    (lambda: RoutedAdapterConfig(target_modules=["a"], share="block"), "shared with `attach` only"),
    (lambda: RoutedAdapterConfig(target_modules=["a"], norm="rms"), "norm must be one of"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


ALL: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "bert": (MODELS["bert"], {}, 19),
    "no pooler": (MODELS["bert"], {"modules_to_save": ["pooler"]}, 18),
    "one block": (MODELS["bert"], {"layers_to_transform": [1], "layers_pattern": "layer"}, 6),
    "gpt2": (MODELS["gpt2"], {"visual_width": 5}, 8),  # Conv1D, without the output embedding
    "classifier": (classifier, {"task_type": "SEQ_CLS"}, 19),
    "beside a tower": (lambda: vision_language("gpt2"), {"visual_width": VISUAL_WIDTH}, 8),
}


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("name", ALL)
def test_all_linear_layers(name: str, kind: str, tmp_path: Path) -> None:
    make, settings, count = ALL[name]
    configured: Any = RoutedLoraConfig if kind == "lora" else RoutedAdapterConfig

    def config() -> Any:
        return configured(target_modules="all-linear", r=2, **settings)

    def adapted(model: Any, adapter: str = "default") -> list[str]:
        layers = ((n, m) for n, m in model.named_modules() if hasattr(m, "active_views"))
        return [n for n, m in layers if adapter in m.views]

    model = peft.get_peft_model(make(), config())
    assert len(adapted(model)) == count and not any("vision" in n for n in adapted(model))
    model.save_pretrained(tmp_path)
    assert adapted(peft.PeftModel.from_pretrained(make(), tmp_path)) == adapted(model)
    if "visual_width" not in settings:
        model.add_adapter("second", config())
        assert adapted(model, "second") == adapted(model)


def test_attach_refuses_a_model_with_routed_adapters_of_pefts() -> None:
    """They would be frozen."""
    base = MODELS["bert"]()
    model = peft.get_peft_model(base, RoutedLoraConfig(target_modules=["query"], r=2))
    trains = [p.requires_grad for p in model.parameters()]
    for of in (model, base):
        with pytest.raises(ValueError, match=r"of PEFT's already \(.*layer\.0.*query\).*unload"):
            attach(of, RoutedConfig(["value"], r=2))
    assert [p.requires_grad for p in model.parameters()] == trains
    attach(model.unload(), RoutedConfig(["value"], r=2)).detach()
    base.views = 2  # of a model's own, which may be called anything
    attach(base, RoutedConfig(["value"], route="none", r=2)).merge()


def tokens_classifier() -> BertForTokenClassification:
    return BertForTokenClassification(bert().config)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_names_that_peft_adds_for_a_task_are_left_out(task: str, tmp_path: Path) -> None:
    """PEFT names "classifier" and "score", one of which a model has: files go both ways."""
    make = seeded(classifier if task == "SEQ_CLS" else tokens_classifier)
    config = RoutedLoraConfig(target_modules=["query"], r=2, task_type=task)
    model = drawn(peft.get_peft_model(make(), config))
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    expected = run(model)
    model.save_pretrained(tmp_path / "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["classifier", "score"]

    attached = attach(make(), tmp_path / "peft")
    assert attached.config.modules_to_save == ("classifier",)
    assert torch.equal(run(attached.model, attached.context), expected)
    attached.load(tmp_path / "peft")
    attached.save(tmp_path / "attach")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "attach")
    assert torch.equal(run(again), expected)
    own = attach(make(), RoutedConfig(["query"], r=2, modules_to_save=["classifier"]))
    own.load(tmp_path / "peft")
    assert torch.equal(run(own.model, own.context), expected)
    with pytest.raises(ValueError, match=r"unexpected: base_model\.model\.classifier\.bias"):
        attach(make(), RoutedConfig(["query"], r=2)).load(tmp_path / "peft")


VARIANTS: dict[str, Any] = {
    "use_dora": True,
    "use_rslora": True,
    "init_lora_weights": "pissa",
    "layer_replication": [(0, 2)],
    "target_parameters": ["weight"],
    "rank_pattern": {"query": 4},
    "bias": "all",
    "exclude_modules": ["value"],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1, 2],
    "ensure_weight_tying": True,
    "kasa_config": {},
    "megatron_core": "another",
    "qalora_group_size": 32,
    "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "use_bdlora": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora_are_refused_and_their_absence_is_not(name: str) -> None:
    make: Any = RoutedLoraConfig
    with pytest.raises(ValueError, match=f"^{name}=.* has no such variant, only "):
        make(target_modules=["query"], **{name: VARIANTS[name]})
    kept = make(target_modules=["query"], **{name: getattr(peft.LoraConfig(), name)})
    assert kept == make(target_modules=["query"])


def test_all_that_lora_has_may_stay_at_its_default() -> None:
    make: Any = RoutedLoraConfig
    own = {f.name for f in dataclasses.fields(RoutedLoraConfig)}
    names = {f.name for f in dataclasses.fields(peft.LoraConfig)} - own
    defaults = {name: getattr(peft.LoraConfig(), name) for name in names}
    assert names > OF_LORA.keys()
    assert make(target_modules=["query"], **defaults) == make(target_modules=["query"])
    with pytest.raises(TypeError, match="use_something"):
        make(target_modules=["query"], use_something=False)


def test_loading_sees_the_fields_alone() -> None:
    """PEFT passes on what the signature has."""
    fields = {f.name for f in dataclasses.fields(RoutedLoraConfig) if f.init}
    assert set(inspect.signature(RoutedLoraConfig).parameters) == fields
