"""Bad inputs of configurations: by themselves, as JSON, and for a model."""

from pathlib import Path
from typing import Any

import torch
from bad_inputs import (
    Bad,
    Subject,
    bad,
    no_names,
    no_numbers,
    no_probabilities,
    no_truths,
    no_whole_numbers,
)
from bad_inputs_models import Model
from torch import nn

from fused_route import ROUTES, Attached, Route, RoutedConfig, attach, scale

UNREGISTERED = Route("unregistered", lambda x_v: scale(x_v))


def no_lists_of_names(*, optional: bool = False) -> list[Bad]:
    accepted = "sequence of names"
    rows = [bad("type", 3, accepted), bad("bool", True, accepted), bad("type", [3], accepted)]
    rows += [bad("empty", [""], accepted), bad("none", [None], accepted)]
    rows += [bad("type", b"query", accepted), bad("type", torch.ones(2), accepted)]
    return rows if optional else [*rows, bad("none", None, "name the modules", "empty")]


def for_adapters(rows: list[Bad]) -> list[Bad]:
    return [
        Bad(r.kind, r.value, r.accepted, r.given, r.named, {**r.also, "host": "adapter"})
        for r in rows
    ]


def no_indices(accepted: str = "whole number of at least 0") -> list[Bad]:
    rows = [bad("range", (-1,), accepted, "-1"), bad("text", "0", accepted)]
    rows += [bad("type", (1.5,), accepted, "1.5"), bad("bool", (True,), accepted, "True")]
    rows += [bad("none", [None], accepted, "None"), bad("type", [[0]], accepted, "[0]")]
    rows += [bad("not finite", (float("nan"),), accepted, "nan")]
    return [*rows, bad("huge", (10**30,), "whole number", "1000000")]


FOREIGN = {"alpha": 4.0, "adapted": (1,), "of": 3}
FOREIGN_TO_LORA = {"activation": "relu", "bias": False, "residual": False, "norm": "before"}
FOREIGN_TO_LORA |= {"position": "before", "share": "block"}

CONFIG: dict[str, list[Bad]] = {
    "target_modules": [*no_lists_of_names(), bad("empty", "", "name the modules", "empty"),
                       bad("empty", [], "name the modules", "empty")],
    "host": no_names("adapter"),
    "r": no_whole_numbers(),
    "inner_rank": [
        *no_whole_numbers(optional=True),
        bad("conflict", 2, "no meaning", "none", route="none"),
    ],
    "route": [
        *no_names("mul"),
        bad("name", UNREGISTERED, "register", "'unregistered'"),
        bad("type", UNREGISTERED.prepare, "mul", "function"),
    ],
    "transpose": no_names("exact"),
    "segments": no_names("joint"),
    "pool": [*no_names("first"), bad("conflict", "first", "exact", transpose="eccv24")],
    "normalize": no_names("unit"),
    "routed_by": [
        *no_names("text"),
        bad("conflict", "text", "no meaning", "none", route="none"),
        bad("conflict", "text", "no meaning", "text", visual_width=5),
    ],
    "dropout": no_probabilities(),
    "layers_to_transform": no_indices(),
    "layers_pattern": [
        *no_lists_of_names(optional=True),
        bad("conflict", "layer", "layers_to_transform", "layers_pattern"),
        bad("empty", "", "name", layers_to_transform=[0]),
        bad("empty", [], "name", "()", layers_to_transform=[0]),
    ],
    "modules_to_save": [*no_lists_of_names(optional=True), bad("text", "head", "sequence of")],
    "train": [
        *no_lists_of_names(optional=True),
        bad("text", "norms", "sequence of names"),
        bad("name", ["biases"], "host_bias", "biases"),
        bad("name", ["norms", "NORMS"], "host_bias", "NORMS"),
    ],
    "visual_width": no_whole_numbers(optional=True),
    "projector": no_names("frozen"),
    "alpha": no_numbers(optional=True),
    "adapted": [*no_indices(), bad("empty", (), "distinct"), bad("conflict", (1, 1), "distinct",
                of=3), bad("range", (3,), "from 0 to 2", of=3), bad("none", None, "whole number")],
    "of": no_whole_numbers(),
    "activation": for_adapters(no_names("gelu")),
    "bias": for_adapters(no_truths()),
    "residual": for_adapters(no_truths()),
    "norm": for_adapters(no_names("before")),
    "position": for_adapters(no_names("before")),
    "share": for_adapters(no_names("block")),
}  # fmt: skip
for name, value in FOREIGN.items():
    CONFIG[name].append(bad("conflict", value, "no meaning", "adapter", host="adapter"))
for name, value in FOREIGN_TO_LORA.items():
    CONFIG[name].append(bad("conflict", value, "no meaning", "lora"))

WRITTEN: dict[str, Any] = {"peft_type": "ROUTED_LORA", "target_modules": ["query"]}
NUMBERED: dict[Any, Any] = {**WRITTEN, 3: 4}


def written(**values: Any) -> dict[str, Any]:
    return {**WRITTEN, **values}


JSON = Subject(
    "RoutedConfig.from_json",
    lambda _: (RoutedConfig.from_json, {"written": WRITTEN}),
    {
        "written": [
            bad("none", None, "peft_type"),
            bad("type", [], "peft_type"),
            bad("type", 3, "peft_type"),
            bad("text", "{}", "peft_type"),
            *(
                bad(kind, value, accepted, given, named)
                for kind, value, accepted, given, named in (
                    ("empty", {}, "ROUTED_LORA", "None", "peft_type"),
                    ("name", written(peft_type="LORA"), "ROUTED_LORA", "'LORA'", "peft_type"),
                    ("none", written(peft_type=None), "ROUTED_LORA", "None", "peft_type"),
                    ("type", written(peft_type=["ROUTED_LORA"]), "ROUTED", "[", "peft_type"),
                    ("type", written(peft_type={}), "ROUTED_LORA", "{}", "peft_type"),
                    ("empty", {"peft_type": "ROUTED_LORA"}, "missing", "missing", "target_modules"),
                    ("name", written(use_dora=True), "does not know", "True", "use_dora"),
                    ("name", written(__reduce__="x"), "does not know", "'x'", "__reduce__"),
                    ("name", written(__class__={"a": 1}), "not know", "{'a': 1}", "__class__"),
                    ("name", written(host="lora"), "does not know", "'lora'", "host"),
                    ("name", written(alpha=3), "does not know", "3", "alpha"),
                    ("name", written(norm="before"), "does not know", "'before'", "norm"),
                    ("type", NUMBERED, "does not know", "4", "3"),
                    ("type", written(r={}), "whole number", "{}", "r"),
                    ("text", written(r="8"), "whole number", "'8'", "r"),
                    ("none", written(r=None), "whole number", "None", "r"),
                    ("not finite", written(lora_alpha=float("nan")), "finite", "nan", "alpha"),
                    ("huge", written(lora_alpha=10**400), "finite", "1000000", "alpha"),
                    ("type", written(target_modules={"a": [1]}), "names", "{", "target_modules"),
                    ("type", written(route=["mul"]), "mul", "['mul']", "route"),
                    ("type", written(adapted={"0": 1}), "whole number", "0", "adapted"),
                    ("type", written(train=[["norms"]]), "names", "[['norms']]", "train"),
                )
            ),
        ]
    },
)
DIFFERENCES = Subject(
    "RoutedConfig.differences",
    lambda _: (RoutedConfig(["query"]).differences, {"other": RoutedConfig(["value"])}),
    {
        "other": [
            bad("none", None, "RoutedConfig"),
            bad("type", WRITTEN, "RoutedConfig"),
            bad("type", 3, "RoutedConfig"),
        ]
    },
)


def attaching(**settings: Any) -> Attached:
    model = settings.pop("model", None)
    return attach(Model() if model is None else model, RoutedConfig(**settings))


def made(_: Path) -> Any:
    return attaching, {"model": Model(), "target_modules": ["first"]}


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


FOR_A_MODEL = Subject(
    "attach with a RoutedConfig",
    made,
    {
        "target_modules": [
            bad("name", ["third"], "linear layers end in: first, second", "third"),
            bad("name", ["first", "third"], "nothing is called", "third"),
            bad("name", "firs", "linear layers end in", "firs"),
            bad("name", "(", "regular expression", "'('"),
            bad("name", "*", "regular expression", "'*'"),
            bad("name", "(?P<a>x)(?P<a>y)", "regular expression", "(?P<a>x)"),
            bad("name", "a{99999999999}", "regular expression", "a{9"),
            bad("huge", "(" * 5000 + ")" * 5000, "regular expression", "(((("),
            bad("name", ["norm"], "in_features and out_features", "LayerNorm", "norm"),
            bad("name", ["attention"], "in_features", "MultiheadAttention", "attention"),
            bad("name", ["out_proj"], "adapt the attention", "out_proj", "target"),
            bad("conflict", ["attention", "out_proj"], "name one", "inside", host="adapter"),
            bad("conflict", ".*", "name one of them", "inside"),
        ],
        "adapted": [
            bad("range", (3,), "from 0 to 0", "(3,)"),
            bad("empty", (), "distinct", "()"),
            bad("conflict", (1, 1), "distinct", "(1, 1)", of=2),
        ],
        "of": [bad("range", 3, "does not divide", "of=3")],
        "r": [bad("huge", 2**40, "r", "1099511627776"), bad("huge", 2**62, "r")],
        "inner_rank": [bad("huge", 2**62, "inner_rank")],
        "visual_width": [bad("huge", 2**62, "visual_width")],
        "layers_to_transform": [
            bad("range", [5], "matches no module", "5", model=Numbered(), target_modules="h.*"),
            bad("range", [0, 5], "no target in these", "5", model=Numbered(), target_modules="h.*"),
            bad("empty", [], "matches no module", "[]"),
        ],
        "modules_to_save": [
            bad("name", ["third"], "no module is called", "third"),
            bad("conflict", ["first"], "is a target", "first"),
        ],
        "train": [
            bad("name", ["pooler"], "no module is called", "pooler"),
            bad("name", ["head"], "modules_to_save", "head"),
        ],
        "route": [
            bad("conflict", "self_gram", "decoder", "self_gram", model=nn.TransformerDecoderLayer(
                8, 2, 8), target_modules=["linear1"]),
        ],
        "routed_by": [
            bad("conflict", "encoder", "encoder", "Model"),
            bad("conflict", "text", "decoder", "text", model=nn.TransformerDecoderLayer(8, 2, 8),
                target_modules=["linear1"]),
        ],
        "share": [bad("conflict", "block", "no layer index", "first", host="adapter")],
    },
)  # fmt: skip

SUBJECTS = [
    Subject("RoutedConfig", lambda _: (RoutedConfig, {"target_modules": ["query"]}), CONFIG),
    JSON,
    DIFFERENCES,
    FOR_A_MODEL,
]

assert "unregistered" not in ROUTES
