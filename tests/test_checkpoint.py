"""Checkpoints: round trips, and files that do not fit."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_attach import CONFIGS, IDS, bert, gpt2, train_a_little
from torch import nn

from fused_route import (
    ROUTES,
    Attached,
    Route,
    RoutedConfig,
    RoutingContext,
    attach,
    checkpoint,
    scale,
)

KEYS = Path(__file__).parent / "golden" / "checkpoint_keys.json"


def trained(**arguments: Any) -> Attached:
    attached = attach(bert(), RoutedConfig(**arguments))
    train_a_little(attached, torch.randn(2, arguments.get("visual_width", 8)))
    return attached


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    make, arguments, _ = CONFIGS[kind]
    model = make()
    attached = attach(model, RoutedConfig(**arguments))
    features = torch.randn(2, 3, arguments.get("visual_width", 8))
    train_a_little(attached, features)
    attached.save(tmp_path)
    with attached.using(features):
        expected = model(IDS)[0]

    attached.detach()
    again = attach(model, tmp_path)  # configuration and values from the directory
    assert again.config == attached.config
    with again.using(features):
        assert torch.equal(model(IDS)[0], expected)
    again.detach()
    fresh = attach(model, RoutedConfig(**arguments))
    fresh.load(str(tmp_path))
    with fresh.using(features):
        assert torch.equal(model(IDS)[0], expected)


def test_layout_is_pinned(tmp_path: Path) -> None:
    """Names in both files, PEFT's: changing them breaks what users have saved."""
    found = {}
    for kind in ("conv1d", "adapter", "projector", "saved"):
        make, arguments, _ = CONFIGS[kind]
        attach(make(), RoutedConfig(**arguments)).save(tmp_path / kind)
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        with safe_open(tmp_path / kind / "adapter_model.safetensors", "pt") as file:
            assert file.metadata()["format"] == "pt"
            found[kind] = {"tensors": sorted(file.keys()), "config": sorted(config)}
    assert found == json.loads(KEYS.read_text())


def test_config_says_what_it_is(tmp_path: Path) -> None:
    attach(bert(), RoutedConfig(["query"], route="gram", normalize="unit", alpha=4)).save(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "ROUTED_LORA"
    assert written["auto_mapping"] == {"base_model_class": "BertModel"}
    assert (written["route"], written["normalize"], written["lora_alpha"]) == ("gram", "unit", 4)
    assert written["target_modules"] == ["query"]


def edit(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        written = json.loads(path.read_text())
        if value is KeyError:
            del written[name]
        else:
            written[name] = value
        path.write_text(json.dumps(written))

    return change


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return rewrite


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


FIRST = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda f: shutil.rmtree(f), "not an adapter checkpoint"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "is incomplete"),
    "truncated": (truncate, "damaged or incomplete"),
    "empty": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
        "damaged or incomplete",
    ),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    "route": (edit("route", "add"), "route is 'add' there, 'mul' here"),
    "rank": (edit("r", 4), "r is 4 there, 8 here"),
    "alpha": (edit("lora_alpha", 16), "lora_alpha is 16"),
    "type": (edit("peft_type", "LORA"), "peft_type is 'LORA'"),
    "host": (edit("peft_type", "ROUTED_ADAPTER"), "not know"),
    "type of type": (edit("peft_type", ["x"]), "peft_type is"),
    "float rank": (edit("r", 8.5), "r must be a whole number"),
    "kind": (
        retensor(lambda t: t.update({FIRST: torch.ones(8, 8, dtype=torch.int64)})),
        "torch.int64",
    ),
    "unknown": (edit("use_dora", True), "use_dora=True is a setting"),
    "bad value": (edit("r", "eight"), "adapter_config.json: "),
    "no targets": (edit("target_modules", KeyError), "target_modules is missing"),
    "unknown route": (edit("route", "grum"), "route must be one of"),
    "model": (edit("auto_mapping", {"base_model_class": "GPT2Model"}), "adapter for GPT2Model"),
    "mixed saves": (edit("new_setting", "none"), "saved with other settings"),
    "missing": (retensor(lambda t: t.pop(FIRST)), "missing: base_model.*layer.0.*lora_A"),
    "unexpected": (retensor(lambda t: t.update(x=torch.ones(1))), "unexpected: x"),
    "shape": (
        retensor(lambda t: t.update({FIRST: torch.ones(8, 9)})),
        r"is \(8, 9\), the model has \(8, 8\)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_does_not_fit_changes_nothing(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    trained(target_modules=["query"]).save(tmp_path)
    damage(tmp_path)
    attached = trained(target_modules=["query"])
    before = {name: tensor.detach().clone() for name, tensor in attached.tensors().items()}
    with pytest.raises(ValueError, match=message) as caught:
        attached.load(tmp_path)
    assert "\n" not in str(caught.value)
    for name, tensor in attached.tensors().items():
        assert torch.equal(tensor, before[name])


def test_what_may_differ_does(tmp_path: Path) -> None:
    """How it was trained, and how targets were named; what PEFT writes for any LoRA is ignored."""
    trained(target_modules=["query"]).save(tmp_path)
    changes: dict[str, object] = {
        "lora_dropout": 0.1,
        "projector": "frozen",
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    for name, value in changes.items():
        edit(name, value)(tmp_path)
    attach(bert(), RoutedConfig(r".*self\.query", dropout=0.3)).load(tmp_path)


def test_settings_of_a_later_version_do_not_break_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(target_modules=["query"]).save(tmp_path)
    to_json = RoutedConfig.to_json
    monkeypatch.setattr(RoutedConfig, "to_json", lambda self: {**to_json(self), "plan": "auto"})
    attach(bert(), RoutedConfig(["query"])).load(tmp_path)


def test_other_hosts_are_other_adapters(tmp_path: Path) -> None:
    adapter = attach(bert(), RoutedConfig(["query"], host="adapter"))
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'ROUTED_ADAPTER' there"):
        trained(target_modules=["query"]).load(tmp_path)
    adapter.detach()
    for call in (adapter.tensors, lambda: adapter.save(tmp_path), lambda: adapter.load(tmp_path)):
        with pytest.raises(ValueError, match="detached"):
            call()


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    trained(target_modules=["query"]).save(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        attach(bert().to("meta"), tmp_path)


def test_any_failure_undoes_the_attaching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(target_modules=["query"]).save(tmp_path)
    model = bert()

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "read_tensors", fails)
    with pytest.raises(MemoryError):
        attach(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(name.endswith(".A") for name in model.state_dict())


@pytest.mark.parametrize(
    "arguments",
    [
        {"route": ROUTES["mul"]},
        {"target_modules": frozenset(["query"])},
        {"layers_to_transform": range(2)},
        {"alpha": np.float32(4)},
        {"r": np.int64(4)},
    ],
)
def test_whatever_is_accepted_can_be_saved(arguments: dict[str, Any], tmp_path: Path) -> None:
    attached = attach(bert(), RoutedConfig(**{"target_modules": ["query"], **arguments}))
    attached.save(tmp_path / "made" / "on the way")
    assert attach(bert(), tmp_path / "made" / "on the way").config == attached.config
    umask = os.umask(0)
    os.umask(umask)
    for file in (tmp_path / "made" / "on the way").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_alpha_that_was_left_out_is_the_rank(tmp_path: Path) -> None:
    config = RoutedConfig(["query"], r=4)
    for r in (4, 16):
        other = replace(config, r=r)
        assert other == RoutedConfig(["query"], r=r, alpha=r)
        assert hash(other) == hash(RoutedConfig(["query"], r=r, alpha=r))
        assert other.to_json()["lora_alpha"] == r
        attached = attach(bert(), other)
        assert {layer.alpha for layer in attached.layers.values()} == {r}
        attached.save(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == r
        assert attach(bert(), tmp_path).config == other
    assert replace(config, host="adapter") == RoutedConfig(["query"], "adapter", r=4)
    given = RoutedConfig(["query"], r=4, alpha=4)
    assert replace(given, r=16).alpha == 4 and replace(given, r=16) != replace(config, r=16)
    assert config != "query"


def test_tied_weights_and_strided_ones_are_saved_whole(tmp_path: Path) -> None:
    model = gpt2()
    attached = attach(model, RoutedConfig(["c_attn"], modules_to_save=["wte", "lm_head"]))
    with torch.no_grad():
        layer = next(iter(attached.layers.values()))
        layer.A.set_(layer.A.T.contiguous().T)  # type: ignore[call-overload]
    attached.save(tmp_path)
    expected = {name: t.detach().clone() for name, t in attached.tensors().items()}
    again = attach(gpt2(), tmp_path)
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_tied_weights_with_two_values_in_the_file_are_refused(tmp_path: Path) -> None:
    """PEFT trains a copy of each: one tensor cannot take both."""
    tied = ["wte", "lm_head"]
    attach(gpt2(), RoutedConfig(["c_attn"], modules_to_save=tied)).save(tmp_path)
    retensor(lambda t: t["base_model.model.lm_head.weight"].add_(1))(tmp_path)
    model = gpt2()
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"wte\.weight and .*lm_head\.weight differ"):
        attach(model, tmp_path)
    assert torch.equal(model.lm_head.weight, before)
    untied = attach(gpt2(tie_word_embeddings=False), tmp_path).tensors()
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(untied[name], tensor), name


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    trained(target_modules=["query"]).save(tmp_path)
    model = gpt2()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="adapter for BertModel, this model is a GPT2LMHeadModel"):
        attach(model, tmp_path)
    shallow = bert(layers=2)
    with pytest.raises(ValueError, match=r"unexpected: base_model\.model\.encoder\.layer\.2"):
        attach(shallow, tmp_path)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in shallow.parameters())
    assert not any("lora" in name or name.endswith(".A") for name in shallow.state_dict())


def test_an_interrupted_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = trained(target_modules=["query"])
    attached.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", interrupted)
    train_a_little(attached, torch.randn(2, 8))
    with pytest.raises(OSError, match="no space"):
        attached.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        trained(target_modules=["query"]).save(tmp_path / "file")


def test_dtype_of_the_model_is_kept(tmp_path: Path) -> None:
    trained(target_modules=["query"]).save(tmp_path)
    attached = attach(bert().to(torch.bfloat16), tmp_path)
    assert all(t.dtype == torch.bfloat16 for t in attached.tensors().values())


def test_own_routes_are_saved_by_name(tmp_path: Path) -> None:
    ROUTES.register(Route("loudest", lambda x_v: scale(x_v.amax(-2, keepdim=True))))
    trained(target_modules=["query"], route="loudest").save(tmp_path)
    assert attach(bert(), tmp_path).config.route == "loudest"


def test_attach_to_a_module_that_is_no_hugging_face_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    attached = attach(model, RoutedConfig(["0"], modules_to_save=("2",)))
    attached.save(tmp_path)
    attached.detach()
    assert attach(model, tmp_path).config.modules_to_save == ("2",)


def test_sizes_are_believed_only_with_the_tensors_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(bert(), RoutedConfig(["query"])).save(tmp_path)
    edit("r", 100_000_000)(tmp_path)
    module = sys.modules["fused_route.attach"]  # not the function of that name
    monkeypatch.setattr(module, "_attach", lambda *_: pytest.fail("layers were made"))
    with pytest.raises(ValueError, match="was saved with other settings"):
        attach(bert(), tmp_path)


def test_a_projector_that_nothing_reads_loads_and_may_be_left_out(tmp_path: Path) -> None:
    config = RoutedConfig(["query"], route="none", visual_width=5)
    older = attach(bert(), config, RoutingContext())  # as files of route "none" once all had one
    for parameter in older.trainable_parameters():
        nn.init.normal_(parameter)
    older.save(tmp_path)
    assert attach(bert(), tmp_path).tensors().keys() == older.tensors().keys()
    without = attach(bert(), config)
    without.load(tmp_path)
    kept = {name for name in older.tensors() if "visual_projector" not in name}
    assert without.tensors().keys() == kept
    assert all(torch.equal(without.tensors()[name], older.tensors()[name]) for name in kept)
    without.save(tmp_path / "without")
    assert attach(bert(), tmp_path / "without", RoutingContext()).projector is None
