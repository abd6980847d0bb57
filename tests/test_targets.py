"""Which modules a configuration finds; what attaching refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import IDS, bert, gpt2
from test_torch_encoders import Inside
from torch import Tensor, nn

from fused_route import Route, RoutedConfig, RoutingContext, attach, shift


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"target_modules": ["lin"]}, ["a.lin", "b.0.lin", "b.1.lin"]),  # not "a.inlin"
        ({"target_modules": "a.lin"}, ["a.lin"]),  # all of the name: not "a.lin2"
        ({"target_modules": {"lin2", "lin"}, "layers_to_transform": 1}, ["b.1.lin"]),
        (
            {"target_modules": ["lin"], "layers_to_transform": [0], "layers_pattern": ["b"]},
            ["b.0.lin"],
        ),
        (
            {"target_modules": "all-linear", "modules_to_save": ["inlin"]},
            ["a.lin", "a.lin2", "b.0.lin", "b.1.lin"],
        ),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, ["b.0.lin"]),
        ({"target_modules": "all-linear", "modules_to_save": ["a", "b.0"]}, ["b.1.lin"]),
    ],
)
def test_names_and_layers_match_as_documented(arguments: dict[str, Any], names: list[str]) -> None:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"lin": nn.Linear(4, 4)})

    a = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("lin", "inlin", "lin2")})
    b = [block(), block()]
    model = nn.ModuleDict({"a": a, "b": nn.ModuleList(b)})
    if arguments.get("layers_to_transform") == 1:
        b[1]["lin2"] = nn.Linear(4, 4)
        names = [*names, "b.1.lin2"]
    assert sorted(attach(model, RoutedConfig(**arguments)).layers) == names


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(8, 8)
        self.outer.inner = nn.Linear(8, 8)


class Taken(nn.Module):
    visual_projector = None

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(8, 8)


def attached_twice() -> None:
    model = bert()
    attach(model, RoutedConfig(["query"]))
    attach(model, RoutedConfig(["value"]))


REFUSED: dict[str, tuple[Any, str]] = {
    "no match": (lambda: attach(bert(), RoutedConfig(["q_proj"])), "linear layers end in: dense"),
    "no such layer": (
        lambda: attach(bert(), RoutedConfig(["query"], layers_to_transform=(1, 9))),
        r"layers_to_transform=\[9\]: no target",
    ),
    "no regex": (lambda: attach(bert(), RoutedConfig("(query")), "no regular expression"),
    "not linear": (
        lambda: attach(nn.Sequential(Opaque()), RoutedConfig(["0"])),
        "target 0: Opaque is no linear layer, as host='lora' needs",
    ),
    "a convolution": (
        lambda: attach(nn.Sequential(nn.Conv2d(4, 4, 1)), RoutedConfig(["0"])),
        "target 0: Conv2d is no linear layer.* host='adapter' takes norms",
    ),
    "lazy": (
        lambda: attach(nn.Sequential(nn.LazyLinear(4)), RoutedConfig(["0"])),
        r"0\.weight is not initialised yet: run a batch",
    ),
    "lazy elsewhere": (
        lambda: attach(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), RoutedConfig(["0"])),
        r"1\.weight is not initialised yet: run a batch",
    ),
    "twice": (attached_twice, "has a routed layer already"),
    "saved is target": (
        lambda: attach(bert(), RoutedConfig(["query"], modules_to_save=("encoder",))),
        "modules_to_save has encoder",
    ),
    "saved missing": (
        lambda: attach(bert(), RoutedConfig(["query"], modules_to_save=("classifier",))),
        "no module is called classifier",
    ),
    "saved tied": (
        lambda: attach(gpt2(), RoutedConfig(["c_attn"], modules_to_save=("lm_head",))),
        r"lm_head\.weight is tied to transformer\.wte\.weight, which would train too; name all",
    ),
    "saved tied to the head": (
        lambda: attach(gpt2(), RoutedConfig(["c_attn"], modules_to_save=("wte",))),
        r"wte\.weight is tied to lm_head\.weight, which would train too; name all",
    ),
    "one of several": (
        lambda: attach(bert(), RoutedConfig(["query", "vale"])), "nothing is called vale"
    ),
    "nested": (
        lambda: attach(Nested(), RoutedConfig(["outer", "inner"])), "outer.inner inside outer"
    ),
    "attention": (
        lambda: attach(Inside(), RoutedConfig(["out_proj"])), "reads its weight and never calls"
    ),
    "sequential": (
        lambda: attach(nn.Sequential(nn.Linear(8, 8)), RoutedConfig(["0"], visual_width=5)),
        "the projector would become one of its layers",
    ),
    "taken": (
        lambda: attach(Taken(), RoutedConfig(["outer"], visual_width=5)), "has an attribute"
    ),
    "torch decoder": (
        lambda: attach(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 1),
            RoutedConfig(["linear1"], route="self_gram"),
        ),
        "part of a decoder",
    ),
    "model": (lambda: attach(None, RoutedConfig(["q"])), "model must be a torch module"),  # type: ignore[arg-type]
    "config": (lambda: attach(bert(), None), "config must be a RoutedConfig"),  # type: ignore[arg-type]
    "context": (lambda: attach(bert(), RoutedConfig(["query"]), 3), "context must be"),  # type: ignore[arg-type]
    "r": (lambda: RoutedConfig(["q"], r=8.5), "r must be a whole number"),  # type: ignore[arg-type]
    "dropout": (lambda: RoutedConfig(["q"], dropout=1.0), r"dropout must be in \[0, 1\)"),
    "saved str": (lambda: RoutedConfig(["q"], modules_to_save="head"), "sequence of names"),
    "bool": (lambda: RoutedConfig(["q"], host="adapter", bias="none"), "must be True or False"),  # type: ignore[arg-type]
    "width": (lambda: RoutedConfig(["q"], visual_width=0), "visual_width must be a whole"),
    "layers": (lambda: RoutedConfig(["q"], layers_to_transform=("x",)), "whole number"),  # type: ignore[arg-type]
    "own route": (
        lambda: RoutedConfig(["q"], route=Route("unregistered", shift)), "register 'unregistered'"  # type: ignore[arg-type]
    ),
    "no targets": (lambda: RoutedConfig([]), "target_modules is empty"),
    "host": (lambda: RoutedConfig(["q"], host="prefix"), "host must be one of lora, adapter"),
    "rank": (lambda: RoutedConfig(["q"], r=0), "r must be a whole number of at least 1"),
    "route": (lambda: RoutedConfig(["q"], route="x"), "route must be one of"),
    "alpha": (lambda: RoutedConfig(["q"], host="adapter", alpha=1.0), "alpha has no meaning"),
    "residual": (lambda: RoutedConfig(["q"], residual=False), "residual has no meaning"),
    "pattern": (lambda: RoutedConfig(["q"], layers_pattern="h"), "without layers_to_transform"),
    "projector": (lambda: RoutedConfig(["q"], projector="none"), "projector must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_attach_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Opaque())
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="Opaque"):
        attach(model, RoutedConfig(["0", "1"]))
    assert list(model.state_dict()) == keys and model[0].weight.requires_grad


def test_errors_name_the_layer() -> None:
    attached = attach(bert(), RoutedConfig(["query"]))
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query has no routing"):
        attached.model(IDS)


def test_a_context_of_ones_own_is_used() -> None:
    context = RoutingContext()
    attached = attach(bert(), RoutedConfig(["query"]), context)
    assert attached.context is context
    context.set(torch.randn(2, 8))
    attached.model(IDS)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_part() -> nn.Module:
    model = bert()
    model.encoder.layer[1] = compiled(model.encoder.layer[1])
    return model


COMPILED: dict[str, tuple[Callable[[], Any], RoutedConfig]] = {
    "model": (lambda: compiled(bert()), RoutedConfig(["query"])),
    "block": (in_part, RoutedConfig(["query"])),
    "module to save": (
        in_part, RoutedConfig(["layer.0.attention.self.query"], modules_to_save=["intermediate"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COMPILED)
def test_compiled_models_are_refused(what: str, tmp_path: Path) -> None:
    make, config = COMPILED[what]
    attach(bert(), config).save(tmp_path)
    for given in (config, tmp_path):
        model = make()
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=r"_orig_mod.* attach first, then compile"):
            attach(model, given)
        assert [name for name, _ in model.named_modules()] == before


def test_compiling_comes_after_attaching(tmp_path: Path) -> None:
    model = bert()
    attached = attach(model, RoutedConfig(["query"], r=2))
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    with attached.using(torch.randn(2, 8)), torch.no_grad():
        torch.testing.assert_close(compiled(model)(IDS)[0], model(IDS)[0])
    attached.save(tmp_path)
    assert attach(bert(), tmp_path).tensors().keys() == attached.tensors().keys()
    beside = nn.ModuleDict({"text": bert(), "tower": compiled(nn.Linear(2, 2))})
    assert len(attach(beside, RoutedConfig(["query"])).layers) == 3
