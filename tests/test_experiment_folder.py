"""What a run remembers of how it began, so that no command goes on with something else."""

import shutil
from pathlib import Path

import pytest
import torch
from experiments import run, save_all, written
from safetensors.torch import load_file, save_file

from fused_route.training.encoders import encoder_of
from fused_route.training.experiment.folder import open_run
from fused_route.training.experiment.pretrained import load_tower

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("remembered"))


def without_pooler(folder: Path, name: str = "vit-no-pooler") -> Path:
    """The tower of the tests' recipes, as many on the hub are: without weights for pooling."""
    tower = shutil.copytree(folder / "models" / "vit", folder / "models" / name)
    weights = load_file(tower / "model.safetensors")
    kept = {key: t for key, t in weights.items() if "pooler" not in key}
    assert len(kept) < len(weights)
    save_file(kept, tower / "model.safetensors", {"format": "pt"})
    return tower


class TestTowerWithoutPooling:
    def test_every_process_has_the_same_layer(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Whatever was drawn before; and what is drawn after is what it would have been."""
        tower = str(without_pooler(folder))
        keys = set()
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            made, processor = load_tower(tower)
            assert torch.equal(torch.get_rng_state(), before)
            keys.add(encoder_of(made, processor, "pooled").key)
        assert len(keys) == 1
        assert "a random layer, drawn from seed 0 whatever the run's" in capsys.readouterr().err

    def test_a_run_is_asked_with_the_layer_it_was_trained_with(self, folder: Path) -> None:
        tower = str(without_pooler(folder, "vit-asked"))
        file = written(folder, "roberta", "lora", "pooler")
        cache = folder / "cache-pooler"
        assert run("train", file, "--vision", tower, "--cache", cache) == 0
        torch.manual_seed(5)
        built = open_run(folder / "runs" / "roberta-lora-pooler")
        assert built.cache is not None and len(built.cache) > 0
        assert len(list((cache / "features").iterdir())) == 1
