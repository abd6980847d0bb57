"""Adapter checkpoints: adapter_model.safetensors and adapter_config.json, in PEFT's layout."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's name for the adapted model inside its own wrapper
DIGEST = "fused_route_config"  # metadata of the tensors: which configuration they belong to


def digest(config: Mapping[str, Any]) -> str:
    """Identifies the settings of an adapter, whatever their order in the file."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    description: Mapping[str, Any],
) -> None:
    """Writes both files, each whole or not at all; other files in the directory stay.

    Args:
        tensors: by their names in the file.
        config: the settings; the tensors are marked with their digest.
        description: further keys of adapter_config.json.
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory={str(folder)!r} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", DIGEST: digest(config)}
    _replace(folder / TENSORS, lambda path: save_file(contiguous, path, metadata=metadata))
    text = json.dumps({**config, **description}, indent=2, sort_keys=True) + "\n"
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
    """Writes beside `path` and moves it there, so that an interruption leaves the old file."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write_to(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys of adapter_config.json.

    Raises:
        ValueError: no such directory or file, or not a JSON object.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: not an adapter checkpoint")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(written).__name__}")
    return written


def read_tensors(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, on the CPU, if they belong to this configuration.

    Raises:
        ValueError: no such file, a damaged one, or one saved with another configuration.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(directory) / TENSORS
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the checkpoint is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    if metadata.get(DIGEST, digest(config)) != digest(config):
        raise ValueError(f"{path} was saved with other settings than {CONFIG} beside it has")
    return tensors


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Names and shapes must agree.

    Raises:
        ValueError: lists what is missing, unexpected or of another shape.
    """
    problems = []
    for what, names in (
        ("missing", expected.keys() - found.keys()),
        ("unexpected", found.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{what}: {_some(sorted(names))}")
    shapes = [
        f"{name} is {tuple(found[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    if problems:
        raise ValueError(f"{path} does not fit this model; {'; '.join(problems)}")


@torch.no_grad()
def copy_tensors(found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copies values into the model's own tensors, keeping their device and dtype."""
    for name, tensor in into.items():
        tensor.copy_(found[name])


def _some(items: list[str], shown: int = 4) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
