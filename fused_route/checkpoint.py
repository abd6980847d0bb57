"""Adapter checkpoints: adapter_model.safetensors and adapter_config.json, in PEFT's layout."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import shown

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's name for the adapted model inside its own wrapper
DIGEST = "fused_route_config"  # metadata of the tensors: which settings they belong to


def folder_of(directory: Any) -> Path:
    """The path that was given; a ValueError where it cannot be that of a folder."""
    text = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(
            f"directory must be the folder of an adapter checkpoint, got {shown(directory)}"
        )
    try:
        exists = Path(text).is_dir() or not Path(text).exists()
    except OSError as error:
        raise ValueError(
            f"directory={shown(text)} cannot hold an adapter checkpoint: {error.strerror}"
        ) from None
    if not exists:
        raise ValueError(f"directory={text!r} is a file, not the folder of an adapter checkpoint")
    return Path(text)


def digest(identity: Mapping[str, Any]) -> str:
    """Of the settings that say which function the tensors belong to, in any order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of nothing if it does not exist."""
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Writes both files beside the old ones and moves them there; other files stay.

    Args:
        tensors: by their names in the file.
        config: the keys of adapter_config.json.
        identity: those of them that the tensors are marked with; see `digest`.

    Raises:
        ValueError: `directory` is a file, or no folder can be made there.
    """
    from safetensors.torch import save_file

    folder = folder_of(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"directory={shown(str(folder))} cannot be made: {error.strerror}"
        ) from None
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with _beside(folder / TENSORS) as new_tensors, _beside(folder / CONFIG) as new_config:
        metadata = {"format": "pt", DIGEST: digest(identity)}
        save_file(_unshared(tensors), new_tensors, metadata=metadata)
        new_config.write_text(text, encoding="utf-8")
        for new in (new_tensors, new_config):
            new.chmod(0o666 & ~_umask())  # both writers make private files
        os.replace(new_tensors, folder / TENSORS)
        os.replace(new_config, folder / CONFIG)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, with the permissions of a new one."""
    with _beside(path) as new:
        new.write_text(text, encoding="utf-8")
        new.chmod(0o666 & ~_umask())
        os.replace(new, path)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU, tied weights copied: the format stores no sharing."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        storage = own[name].untyped_storage().data_ptr()
        if storage in seen:
            own[name] = own[name].clone()
        seen.add(storage)
    return own


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of `path`, gone at the end if it has not been moved."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    """Permissions that new files do not get; it can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys of adapter_config.json.

    Raises:
        ValueError: no such directory or file, or not a JSON object.
    """
    path = folder_of(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: not an adapter checkpoint")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(written, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(written).__name__}")
    return written


def read_tensors(
    directory: str | os.PathLike[str], identity: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors, on the CPU, if they were saved with these settings.

    Raises:
        ValueError: no such file, a damaged one, or one saved with other settings.
    """
    from safetensors import SafetensorError, safe_open

    path = folder_of(directory) / TENSORS
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the checkpoint is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    if metadata.get(DIGEST, digest(identity)) != digest(identity):
        raise ValueError(f"{path} was saved with other settings than {CONFIG} beside it has")
    return tensors


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Names, shapes and kinds of numbers must agree, and there must be memory to copy into.

    Raises:
        ValueError: lists what is missing, unexpected, of another shape or kind, or of two values
            where the model has one tensor.
    """
    problems = [
        f"{what}: {_some(sorted(names))}"
        for what, names in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
        )
        if names
    ]
    other = [
        f"{name} is {_kind(found[name])}, the model has {_kind(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if _kind(found[name]) != _kind(expected[name])
    ]
    if other:
        problems.append(_some(other))
    if not problems:
        problems += _untied(found, expected)
    if any(tensor.is_meta for tensor in expected.values()):
        problems.append("the model is on the meta device, which holds no values")
    if problems:
        raise ValueError(f"{path} does not fit this model; {'; '.join(problems)}")


def _untied(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of one tensor of the model that differ in the file: PEFT trains copies of modules."""
    first: dict[int, str] = {}
    for name, tensor in expected.items():
        other = first.setdefault(id(tensor), name)
        if other == name:
            continue
        values = (found[of].to(tensor.dtype) for of in (name, other))  # as they are copied
        if not torch.equal(*values):
            yield f"{other} and {name} differ, which are tied in the model: untie them first"


def _kind(tensor: Tensor) -> tuple[int, ...] | str:
    shape = tuple(tensor.shape)
    return shape if tensor.is_floating_point() else f"{tensor.dtype} {shape}"


@torch.no_grad()
def copy_tensors(found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copies values into the model's own tensors, keeping their device and dtype."""
    for name, tensor in into.items():
        tensor.copy_(found[name])


def _some(items: list[str], shown: int = 4) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
