"""The model card of a checkpoint: a section of README.md that says what it is and how it loads."""

import os
from collections.abc import Mapping
from typing import Any

from . import __version__, checkpoint

CARD = "README.md"
START, END = "<!-- fused_route: written on every save -->", "<!-- end of fused_route -->"
FORMULAS = {
    "none": "x_t",
    "add": "x_t + x_v",
    "mul": "x_t ∘ x_v",
    "gram": "x_t x_vᵀ x_v",
    "expand": "(Σ x_t) x_v",
    "gram_relu": "relu(x_t) relu(x_v)ᵀ x_v",
    "ones": "x_t x_vᵀ 1",
    "ones_relu": "relu(x_t) relu(x_v)ᵀ 1",
}
TITLES = {
    "ROUTED_LORA": ("Routed LoRA", "y = base(x_h) + (lora_alpha / r) z Bᵀ"),
    "ROUTED_ADAPTER": ("Routed adapter", "y = {residual}act(z) Bᵀ + b_B"),
}
ROUTED = (
    "The text's hidden states x_h are projected down, mixed there with {source} x_r, which is "
    "projected equally, and projected up ([arXiv 2403.09377](https://arxiv.org/abs/2403.09377)):"
)
SOURCES = {  # by `routed_by`
    "image": "the image",
    "text": "the mean of the layer's own text",
    "encoder": "the mean of the encoder's states",
}
PLAIN = "The text's hidden states x_h are projected down and up; no image is mixed in:"
SHOWN = (
    "r", "lora_alpha", "target_modules", "adapted", "of", "route", "transpose", "segments",
    "normalize", "pool", "routed_by", "inner_rank", "visual_width", "activation", "norm",
    "residual", "position", "modules_to_save", "train",
)  # fmt: skip


def write_card(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Writes or renews this project's section of README.md; everything else there stays.

    Args:
        directory: of the checkpoint.
        config: the keys of adapter_config.json.

    Raises:
        ValueError: `directory` is a file.
    """
    path = checkpoint.folder_of(directory) / CARD
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeDecodeError):
        return  # a user's own, and no text: left alone
    mine = section(config)
    if before is None:
        text = f"---\ntags:\n- fused_route\n- lora\n---\n\n{mine}\n"
    elif START in before and END in before.partition(START)[2]:
        head, _, rest = before.partition(START)
        text = head + mine + rest.partition(END)[2]
    else:
        text = f"{before.rstrip()}\n\n{mine}\n"
    checkpoint.write_text(path, text)


def section(config: Mapping[str, Any]) -> str:
    """Markdown about a checkpoint with these settings."""
    title, formula = TITLES[config["peft_type"]]
    route = str(config.get("route"))
    mixed = FORMULAS.get(route)
    is_plain = route == "none"
    split = config.get("inner_rank") is not None
    down = "x_t = x_h Aᵀ Uᵀ, x_v = x_r A_vᵀ U_vᵀ" if split else "x_t = x_h Aᵀ, x_v = x_r Aᵀ"
    down = "x_t = x_h Aᵀ" if is_plain else down
    formula = formula.format(residual="x_h + " if config.get("residual", True) else "")
    settings = [
        f"| {name} | `{config[name]}` |" for name in SHOWN if config.get(name) not in (None, [], ())
    ]
    return "\n".join(
        [
            START,
            f"# {title}, route `{route}`",
            "",
            PLAIN if is_plain else ROUTED.format(source=_source(config)),
            "",
            f"    {down}, z = {mixed or f'φ(x_t, x_v) of route {route!r}'}",
            f"    {formula}",
            "",
            "| setting | |",
            "| --- | --- |",
            *settings,
            "",
            f"Written by fused_route {__version__}. It loads where that is installed:",
            "",
            "```python",
            "import fused_route.peft  # before loading: PEFT does not know this method by itself",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "this directory")',
            "```",
            "",
            f'or `fused_route.attach(base_model, "this directory")`. {_merging(config)}',
            END,
        ]
    )


def _source(config: Mapping[str, Any]) -> str:
    """What x_r is made of."""
    return SOURCES[config.get("routed_by") or "image"]


def _merging(config: Mapping[str, Any]) -> str:
    """Whether the update becomes part of the weights, and how."""
    if config.get("route") != "none":
        return (
            f"The update depends on {_source(config)}: it cannot be merged into the weights, and "
            "runtimes that expect plain LoRA (vLLM, llama.cpp) cannot run it."
        )
    if config["peft_type"] != "ROUTED_LORA":
        return "It depends on no image, but an adapter cannot be merged into the weights."
    return (
        "The update depends on no image: "
        '`fused_route.attach(base_model, "this directory").merge()` makes it part of the weights. '
        "Runtimes that expect plain LoRA (vLLM, llama.cpp) run that model; these files they cannot "
        "read."
    )
