"""Recipes of small models on small data sets in their official layouts, for the tests."""

from pathlib import Path
from typing import Any

import official_layouts
import pytest
import yaml
from model_folders import save_models

from fused_route.training import cli
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.recipe_file import read_recipe

LORA: dict[str, Any] = {"route": "mul", "r": 4}
TARGETS: dict[str, dict[str, dict[str, Any]]] = {
    "roberta": {
        "lora": {**LORA, "target_modules": ["query", "value"]},
        "adapter": {"host": "adapter", "r": 4, "target_modules": ["output.dense"]},
    },
    "gpt2": {
        "lora": {**LORA, "target_modules": ["c_attn"], "adapted": [0, 2], "of": 3},
        "adapter": {"host": "adapter", "r": 4, "target_modules": ["c_proj"], "share": "block"},
    },
    "bart": {
        "lora": {**LORA, "target_modules": ["q_proj", "v_proj"]},
        "adapter": {"host": "adapter", "r": 4, "target_modules": ["out_proj", "fc2"]},
    },
    "t5": {
        "lora": {**LORA, "target_modules": ["q", "v"]},
        "adapter": {"host": "adapter", "r": 4, "target_modules": ["o", "wo"]},
    },
}
KINDS = {
    "roberta": "classifier",
    "gpt2": "decoder",
    "bart": "encoder-decoder",
    "t5": "encoder-decoder",
}
PLACES = {"roberta": "before", "gpt2": "before", "bart": "after", "t5": "after"}
LAYOUTS = ("vqav2", "coco", "gqa", "nlvr2")


def save_all(folder: Path) -> Path:
    """A folder with models/ and data/."""
    save_models(folder / "models")
    for layout in LAYOUTS:
        getattr(official_layouts, layout)(folder / "data" / layout)
    return folder


def tasks(folder: Path, language: str) -> dict[str, Any]:
    """The tasks of a setting: VQAv2, captions, or all four."""
    karpathy = {split: f"karpathy-{split[:5]}" for split in ("train", "test")}
    karpathy["validation"] = "karpathy-val"
    data = {layout: str(folder / "data" / layout) for layout in LAYOUTS}
    vqa: dict[str, Any] = {"layout": "vqav2", "root": data["vqav2"], **karpathy, "max_length": 40}
    caption: dict[str, Any] = {
        "layout": "coco",
        "root": data["coco"],
        **karpathy,
        "max_new_tokens": 6,
    }
    if language == "roberta":
        return {"vqa": vqa}
    if language == "gpt2":
        return {"caption": {**caption, "num_beams": 2}}
    gqa: dict[str, Any] = {
        "layout": "gqa",
        "root": data["gqa"],
        "train": "train+val",
        "validation": "testdev",
    }
    nlvr2: dict[str, Any] = {
        "layout": "nlvr2",
        "root": data["nlvr2"],
        "validation": "dev",
        "test": "test1",
    }
    found = {"vqa": vqa, "gqa": gqa, "nlvr2": nlvr2, "caption": caption}
    return {
        name: {**task, "prompt": f"{name}: ", "max_new_tokens": 6, "limit": 12}
        for name, task in found.items()
    }


def written(folder: Path, language: str, host: str = "lora", name: str = "recipe") -> Path:
    """A recipe's file: two epochs of a setting; models, data and runs in `folder`."""
    pair = KINDS[language] == "encoder-decoder"
    adapter = dict(TARGETS[language][host])
    if language == "roberta":
        adapter["modules_to_save"] = ["classifier"]
    if pair:
        adapter["modules_to_save"] = ["image_projection"]
    recipe = {
        "model": {
            "language": str(folder / "models" / language),
            "vision": str(folder / "models" / ("clip" if pair else "vit")),
            "kind": KINDS[language],
            "visual_tokens": PLACES[language],
            "projection": "linear" if pair else "none",
            "features": "tokens" if pair else "pooled",
        },
        "adapter": adapter,
        "tasks": tasks(folder, language),
        "training": {
            "output_dir": str(folder / "runs" / f"{language}-{host}-{name}"),
            "learning_rate": 3e-3,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": [],
        },
        "cache": str(folder / "cache"),
    }
    path = folder / f"{language}-{host}-{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def recipe(folder: Path, language: str, host: str = "lora", *overrides: str) -> Recipe:
    """The recipe of `written`, with overrides."""
    return read_recipe(written(folder, language, host), overrides)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends with status 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fused-route: error")]
    assert len(lines) == 1
    return lines[0]
