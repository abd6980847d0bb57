"""A layer under PEFT by itself: what it passes on of its base, its copies, what it leaves."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_peft import IMAGE, MODELS, TARGETS, TINY, adapter, drawn, lora, run
from torch import nn
from transformers import ModernBertConfig, ModernBertModel

from fused_route import RoutedConfig, RoutedLinear, attach, fold
from fused_route.modules import AdaptedModule

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedAdapterConfig, context_of  # noqa: E402
from fused_route.peft.layers import RoutedAdapterLayer  # noqa: E402


def test_models_read_what_a_block_says_of_itself() -> None:
    config = ModernBertConfig(**TINY, pad_token_id=0, global_attn_every_n_layers=2)
    settings: dict[str, Any] = {"r": 4, "target_modules": r".*layers\.\d+"}
    torch.manual_seed(11)
    plain = ModernBertModel(config).eval()
    model = drawn(peft.get_peft_model(copy.deepcopy(plain), RoutedAdapterConfig(**settings)))
    attached = attach(plain, RoutedConfig(host="adapter", **settings))
    for name, layer in attached.layers.items():
        view = model.base_model.model.get_submodule(name).views["default"]
        layer.load_state_dict({key: getattr(view, key) for key in layer.state_dict()})
    assert torch.equal(run(model), run(plain, attached.context))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_linear_layer_tells_its_widths_as_with_attach(name: str) -> None:
    model = peft.get_peft_model(MODELS[name](), lora(name)).base_model.model
    fused: dict[str, Any] = {"adapted": (0, 2), "of": 3} if name == "gpt2" else {}
    for at, layer in attach(
        MODELS[name](), RoutedConfig(TARGETS[name], r=4, **fused)
    ).layers.items():
        found = model.get_submodule(at)
        assert isinstance(layer, RoutedLinear)
        assert (found.in_features, found.out_features) == (layer.in_features, layer.out_features)


class Copied(nn.Linear):
    """A linear layer that makes its own copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copied":
        made = Copied(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


def adapted(base: nn.Module, kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    """A model with an adapter behind one linear layer; the layer, PEFT's or attach's."""
    model: nn.Module = nn.Sequential(base, nn.Identity())
    settings: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
    if kind is RoutedAdapterLayer:
        model = peft.get_peft_model(model, RoutedAdapterConfig(**settings)).base_model.model
    else:
        attach(model, RoutedConfig(host="adapter", **settings))
    return model, model.get_submodule("0")


@pytest.mark.parametrize("kind", [RoutedAdapterLayer, AdaptedModule])
def test_what_is_not_passed_on_of_the_base(kind: type[nn.Module]) -> None:
    """Its way of being copied, and what accelerate has done to it."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, layer = adapted(Copied(8, 8), kind)
    assert layer.out_features == 8
    assert isinstance(copy.deepcopy(model).get_submodule("0"), kind)
    with pytest.raises(AttributeError, match="'Copied' object has no attribute 'eps'"):
        layer.eps  # noqa: B018
    with pytest.raises(AttributeError, match="base"):
        kind.__new__(kind).eps  # noqa: B018

    base = hooks.add_hook_to_module(nn.Linear(8, 8), hooks.ModelHook())
    model, layer = adapted(base, kind)
    hooks.remove_hook_from_submodules(model)
    assert "forward" not in vars(layer) and not hasattr(base, "_hf_hook")


def test_what_another_tuner_keeps_is_not_passed_on() -> None:
    inner = peft.tuners.lora.Linear(nn.Linear(8, 8), "default", config=peft.LoraConfig(r=2), r=2)
    outer = RoutedAdapterLayer(inner)
    assert hasattr(inner, "lora_A") and not hasattr(outer, "lora_A") and outer.in_features == 8


@pytest.fixture
def collects_nothing() -> Iterator[None]:
    """Without the garbage collector, which frees what refers to itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collects_nothing")
@pytest.mark.parametrize("config", [lora, adapter])
def test_a_deleted_model_is_freed_at_once(config: Any) -> None:
    model = peft.get_peft_model(MODELS["bert"](), config("bert"))
    run(model)
    weights = [weakref.ref(p) for n, p in model.named_parameters() if "query" in n]
    assert len(weights) > 2
    del model
    assert not any(weight() is not None for weight in weights)


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read: nn.Module = torch.load(file, weights_only=False)
    return read


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("config", [lora, adapter])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_stands_alone(way: str, config: Any) -> None:
    model = drawn(peft.get_peft_model(MODELS["bert"](), config("bert")))
    model.add_adapter("second", config("bert", "none"))
    expected = run(model)
    copied = COPIES[way](model)
    layers = [m for m in copied.modules() if hasattr(m, "active_views")]
    views = [view for layer in layers for view in layer.views.values()]
    assert [view.owner for view in views] == [layer for layer in layers for _ in range(2)]
    assert {id(view.context) for view in views} == {id(context_of(copied))}
    drawn(model)
    assert not torch.equal(run(model), expected)
    del model
    assert torch.equal(run(copied), expected)


def test_images_folded_into_layers_that_are_gone() -> None:
    """Who folded them in keeps them; what they say about the layer is that it is gone."""
    model = drawn(peft.get_peft_model(MODELS["bert"](), lora("bert")))
    folded = fold(model, IMAGE[:1])
    model.unload()
    del model
    with pytest.raises(ReferenceError, match="the layer of adapter 'default' is gone"):
        folded.layers[0].A  # noqa: B018
    folded.unfold()


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify", "ignore:Already found a `peft_config`"
)
def test_an_adapter_in_the_place_of_one_of_its_name_has_nothing_of_it() -> None:
    model = peft.get_peft_model(MODELS["bert"](), adapter("bert", norm="before"))
    model = peft.get_peft_model(model.base_model.model, adapter("bert", "split", bias=False))
    fresh = peft.get_peft_model(MODELS["bert"](), adapter("bert", "split", bias=False))
    drawn(model).load_state_dict(fresh.state_dict())
    assert torch.equal(run(model), run(fresh))
    back = peft.get_peft_model(model.base_model.model, adapter("bert"))
    names = {n for n, _ in peft.get_peft_model(MODELS["bert"](), adapter("bert")).named_modules()}
    assert {n for n, _ in back.named_modules()} == names
