"""Adapters of a model that FSDP2 has sharded: saved whole, loaded into the shards."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_script import tuned_model
from test_distributed import TESTS, launched
from vlm_models import images, texts


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tuned_model(seed=2)[1].save(folder / "other")
    script = TESTS / "sharded_script.py"
    launched("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             script, folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(("name", "seed"), [("saved", 1), ("loaded", 2)])
def test_what_is_saved_is_whole(name: str, seed: int, out: Path) -> None:
    found = load_file(out / name / "adapter_model.safetensors")
    expected = tuned_model(seed)[1].attached.tensors()
    assert found.keys() == expected.keys() and found
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.detach()), key


@pytest.mark.parametrize(("place", "seed"), [(0, 1), (1, 2)])
def test_the_shards_compute_with_what_was_loaded(place: int, seed: int, out: Path) -> None:
    model, _ = tuned_model(seed)
    expected = model(input_ids=texts(2), pixel_values=images(2)).logits
    found = torch.load(out / "scores.pt")[place]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
