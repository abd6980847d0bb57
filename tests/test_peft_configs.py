"""Settings of the PEFT configurations that are refused, and those of peft.LoraConfig."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig  # noqa: E402

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
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora_are_refused_and_their_absence_is_not(name: str) -> None:
    make: Any = RoutedLoraConfig
    defaults = {f.name: f.default for f in dataclasses.fields(peft.LoraConfig)}
    with pytest.raises(ValueError, match=f"^{name}=.* has no such variant"):
        make(target_modules=["query"], **{name: VARIANTS[name]})
    default = defaults[name] if defaults[name] is not dataclasses.MISSING else {}
    kept = make(target_modules=["query"], **{name: default})
    assert kept == make(target_modules=["query"])


def test_loading_sees_the_fields_alone() -> None:
    """PEFT passes on what the signature has."""
    fields = {f.name for f in dataclasses.fields(RoutedLoraConfig) if f.init}
    assert set(inspect.signature(RoutedLoraConfig).parameters) == fields
