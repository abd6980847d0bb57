"""Damaged checkpoints are refused and change nothing, or give exactly what is in the file."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs_models import Model
from damage import DAMAGES, FLAG, KINDS, TENSORS, Payload
from safetensors.torch import load_file
from watching import same, seen

from fused_route import Attached, RoutedConfig, attach


def attached() -> Attached:
    made = attach(Model(), RoutedConfig(["first"], r=4))
    with torch.no_grad():
        for tensor in made.tensors().values():
            tensor.normal_()
    return made


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    torch.manual_seed(1)
    attached().save(folder)
    return folder


def taken(folder: Path, made: Attached) -> bool:
    """Whether the adapter's values are those in the file, read by the format's own library."""
    written = load_file(folder / TENSORS)
    ours = made.tensors()
    return written.keys() == ours.keys() and all(
        same(ours[name].detach(), tensor.to(ours[name].dtype)) for name, tensor in written.items()
    )


def outcome(folder: Path, watched: object, call: Callable[[], Attached]) -> str:
    """ "taken", "refused", or what is wrong."""
    before = seen(watched)
    try:
        made = call()
    except ValueError as error:
        if "\n" in str(error):
            return f"more than one line: {str(error)[:80]!r}"
        return "refused" if same(seen(watched), before) else "refused, but something has changed"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]!r}"
    return "taken" if taken(folder, made) else "other values than those in the file"


def both(folder: Path, made: Attached) -> set[str]:
    """Of attach(model, folder) and attached.load(folder)."""

    def load() -> Attached:
        made.load(folder)
        return made

    model = Model()
    return {
        outcome(folder, model, lambda: attach(model, folder)),
        outcome(folder, made, load),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_harmless(kind: str, good: Path, tmp_path: Path) -> None:
    made, wrong = attached(), {}
    for name, damage in DAMAGES[kind].items():
        folder = tmp_path / "adapter"
        shutil.copytree(good, folder)
        damage(folder)
        found = both(folder, made) - {"taken", "refused"}
        if found:
            wrong[name] = found
        shutil.rmtree(folder)
    assert not (tmp_path / FLAG).exists()
    assert wrong == {}


def test_the_good_one_is_taken(good: Path) -> None:
    assert both(good, attached()) == {"taken"}


def test_the_payload_would_execute(tmp_path: Path) -> None:
    content = pickle.dumps(Payload(tmp_path / FLAG))
    assert not (tmp_path / FLAG).exists()
    pickle.loads(content)
    assert (tmp_path / FLAG).exists()
