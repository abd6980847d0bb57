"""Bad inputs of what is done to models: attach, fold, merge, published values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_inputs import Later, Subject, bad, no_names, no_tensors, no_truths, no_whole_numbers
from bad_inputs_layers import CONTEXTS, IMAGE, D, R, entering, projecting, setting
from torch import Tensor, nn

from fused_route import Attached, RoutedConfig, RoutingInput, attach, fold, merge, unfold
from fused_route.published import load_published


class Model(nn.Module):
    """Two linear layers, a norm, an attention, and a place for nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.norm, self.attention = nn.LayerNorm(D), nn.MultiheadAttention(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.relu(self.first(x))))


def attached(**settings: Any) -> Attached:
    made = attach(Model().eval(), RoutedConfig(["first"], **{"r": R, **settings}))
    made.context.set(IMAGE)
    return made


def folder_with(name: str, content: bytes | None) -> Callable[[Path], Path]:
    """A folder's path; in it a file, or a folder where a file should be."""

    def make(folder: Path) -> Path:
        if content is None:
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).write_bytes(content)
        return folder

    return make


FOLDERS = [
    bad("none", None, "directory"),
    bad("type", 3, "directory"),
    bad("type", b"folder", "directory"),
    bad("type", ["folder"], "directory"),
    bad("type", {"r": 8}, "directory"),
]
SOURCES = [
    bad("name", "no/such/folder", "adapter checkpoint"),
    bad("empty", "", "folder of an adapter checkpoint", "''"),
    bad("huge", "x" * 5000, "adapter checkpoint", "xxxx"),
    bad("name", "a\0b", "folder of an adapter checkpoint", "a"),
    bad("name", Later(lambda f: folder_with("file", b"")(f) / "file", "a file"), "is a file",
        "file"),
    bad("name", Later(folder_with("adapter_config.json", None), "folder for file"), "adapter",
        "adapter_config.json"),
    bad("type", Later(folder_with("adapter_config.json", b"[]"), "a list"), "JSON object", "list"),
    bad("empty", Later(folder_with("adapter_config.json", b""), "no JSON"), "adapter_config.json",
        "damaged"),
    bad("name", Later(folder_with("adapter_config.json", b'{"peft_type": "LORA"}'), "LoRA"),
        "ROUTED_LORA", "LORA"),
]  # fmt: skip
for row in SOURCES:
    object.__setattr__(row, "named", "")


def published() -> dict[str, Tensor]:
    return {"first.lora_A": torch.ones(R, D), "first.lora_B": torch.ones(D, R)}


def adapters() -> Attached:
    return attached(host="adapter")


MODELS = [
    bad("none", None, "torch module"),
    bad("text", "bert", "torch module"),
    bad("type", Model, "torch module", "type"),
    bad("type", {}, "torch module"),
]
FOLD = Subject(
    "fold",
    lambda _: (fold, {"model": attached().model, "x_r": IMAGE}),
    {
        "model": [
            *MODELS,
            bad("type", Model(), "layer that an image routes"),
            bad("conflict", attached(route="gram_relu").model, "affine", "gram_relu", "first"),
            bad("conflict", attached(route="none").model, "layer that an image routes"),
            bad("conflict", adapters().model, "into='bottleneck'", "adapter", "first", into="host",
                x_r=IMAGE[:1]),
        ],
        "x_r": [
            *no_tensors("x_r"),
            bad("dtype", IMAGE.long(), "floating-point"),
            bad("shape", IMAGE[0, 0], "(B, Nv, d)"),
            bad("shape", IMAGE[..., :5], "width 8", "5"),
            bad("conflict", RoutingInput(IMAGE, None, torch.tensor([0, 1])), "folded in", "packed",
                "sample_index"),
            bad("conflict", IMAGE, "takes one image", "2", into="host"),
        ],
        "into": no_names("bottleneck"),
        "beams": no_whole_numbers(),
    },
)  # fmt: skip
MERGE = Subject(
    "merge",
    lambda _: (merge, {"model": attached(route="none").model}),
    {
        "model": [
            *MODELS,
            bad("type", Model(), "routed layer"),
            bad("conflict", attached().model, "fold(model, x_r)", "mul", "first"),
            bad("conflict", attached(route="none", host="adapter").model, "linear layers",
                "adapter", "first"),
        ]
    },
)  # fmt: skip
UNFOLD = Subject("unfold", lambda _: (unfold, {"model": attached().model}), {"model": [*MODELS]})
PUBLISHED = Subject(
    "load_published",
    lambda _: (load_published, {"into": attached(), "tensors": published()}),
    {
        "into": [
            bad("none", None, "attach"),
            bad("type", 3, "attach"),
            bad("text", "model", "attach"),
            bad("type", Model(), "attach"),
            bad("empty", {}, "attach"),
            bad("type", {"first": nn.Linear(D, D)}, "published code", "Linear", "first"),
        ],
        "tensors": [
            bad("none", None, "tensors by name"),
            bad("type", [torch.ones(1)], "tensors by name"),
            bad("type", {1: torch.ones(1)}, "tensors by name"),
            bad("empty", {}, "missing", "lora_A"),
            bad("name", {"first.lora_A": torch.ones(R, D)}, "missing", "lora_B"),
            bad("name", {**published(), "third.lora_A": torch.ones(1)}, "unexpected", "third"),
            bad("shape", {**published(), "first.lora_A": torch.ones(D, R)}, "(4, 8)", "(8, 4)"),
            bad("dtype", {**published(), "first.lora_A": torch.ones(R, D).long()}, "(4, 8)", "int"),
            bad("type", {**published(), "first.lora_A": [1.0]}, "must be a tensor", "[1.0]"),
            bad("none", {**published(), "first.lora_A": None}, "must be a tensor", "None"),
            bad("device", {**published(), "first.lora_A": torch.ones(R, D, device="meta")},
                "holds no values", "meta", "lora_A"),
        ],
        "names": [
            bad("type", ["first"], "by layer"),
            bad("text", "first", "by layer"),
            bad("name", {"third": "first"}, "layers are first", "third"),
            bad("empty", {"first": ""}, "must be a path", "''"),
            bad("none", {"first": None}, "must be a path", "None"),
            bad("type", {"first": 3}, "must be a path", "3"),
        ],
    },
)  # fmt: skip


def other_model() -> Attached:
    return attached(route="gram")


def saved(make: Callable[[], Attached]) -> Later:
    def save(folder: Path) -> Path:
        make().save(folder)
        return folder

    return Later(save, f"of {make.__name__}")


ATTACHING = Subject(
    "attach",
    lambda _: (
        attach,
        {"model": Model(), "config": RoutedConfig(["first"]), "context": projecting()},
    ),
    {
        "model": [
            *MODELS,
            bad("conflict", attached().model, "detach it first", "first"),
            bad("empty", nn.Sequential(), "matches no module", "first", "target_modules"),
        ],
        "config": [*FOLDERS, *SOURCES, bad("type", RoutedConfig, "RoutedConfig", "type")],
        "context": CONTEXTS,
        "impl": no_names("reference"),
        "recompute": no_truths(),
        "plan": no_names("p3"),
        "project": no_names("together"),
    },
)
DIRECTORIES = [
    Subject(
        "Attached.save",
        lambda folder: (attached().save, {"directory": folder / "new"}),
        {
            "directory": [
                *FOLDERS,
                bad("empty", "", "directory"),
                bad("name", "a\0b", "directory", "a"),
                bad("huge", "x" * 5000, "directory", "xxxx"),
                bad("name", Later(lambda f: folder_with("file", b"")(f) / "file", "a file"),
                    "is a file", "file"),
                bad("name", Later(lambda f: folder_with("file", b"")(f) / "file" / "below",
                    "below a file"), "cannot be made", "Not a directory"),
            ]
        },
    ),
    Subject(
        "Attached.load",
        lambda folder: (
            attached().load,
            {"directory": saved(attached).make(folder / "good")},
        ),
        {
            "directory": [
                *FOLDERS,
                *SOURCES,
                bad("conflict", saved(other_model), "'mul' here", "'gram' there", ""),
                bad("conflict", saved(adapters), "ROUTED_LORA", "ROUTED_ADAPTER", ""),
            ]
        },
    ),
]  # fmt: skip


def using() -> Callable[..., Any]:
    return entering(attach(Model().eval(), RoutedConfig(["first"], r=R), projecting()).using)


SUBJECTS = [
    FOLD,
    MERGE,
    UNFOLD,
    PUBLISHED,
    ATTACHING,
    *DIRECTORIES,
    setting("Attached.using", using),
]
