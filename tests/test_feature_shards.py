"""Files of a feature cache: set aside where they are damaged, verified, mapped into memory."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoding_script import SHARD, counted, encoder, expected, filled, paint, shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fused_route.training import feature_shards
from fused_route.training.feature_cache import FeatureCache


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    return [paint(tmp_path / "images" / f"{i:02}.png", i) for i in range(10)]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_IMAGES", SHARD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def replaced(path: Path, *, told: dict[str, str] | None = None, **tensors: Tensor) -> None:
    """A shard with other metadata or tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | (told or {})
        own = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    path.unlink()
    save_file(own | tensors, path, metadata)


def flipped(path: Path) -> None:
    """One bit of the features."""
    with safe_open(path, "pt") as file:
        features = file.get_tensor("features").clone()
    features.view(torch.int32)[-1, -1, -1] ^= 1
    replaced(path, features=features)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is no safetensors file"),
    "text": (lambda path: path.write_text("no features"), "is no safetensors file"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 1), "or not a whole one"),
    "another key's": (lambda path: replaced(path, told={"key": "other"}), "has key='other'"),
    "another version's": (lambda path: replaced(path, told={"version": "0"}), "has version='0'"),
    "another file": (lambda path: save_file({"a": torch.ones(1)}, path), "holds a, not"),
    "digests": (
        lambda path: replaced(path, digests=torch.zeros(4, 32, dtype=torch.uint8)),
        "digests that are not those it was written with",
    ),
    "digests' shape": (
        lambda path: replaced(path, digests=torch.zeros(4, dtype=torch.uint8)), "has digests",
    ),
    "width": (
        lambda path: replaced(path, features=torch.zeros(4, 2, 5)),
        "features (4, 2, 5), not (4, Nv, 3)",
    ),
    "dtype": (
        lambda path: replaced(path, features=torch.zeros(4, 2, 3, dtype=torch.int64)),
        "features torch.int64",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("small_shards")
class TestFiles:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_shards_are_set_aside(
        self, damage: str, images: list[Path], folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        filled(folder, images)
        how, said = DAMAGE[damage]
        path = next(path for path in shards(folder) if path.stat().st_size == largest(folder))
        how(path)
        contents = path.read_bytes()
        capsys.readouterr()
        cache = FeatureCache(folder, "colours", 3)
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{path} ") and said in line and line.endswith(".damaged")
        aside = path.with_name(f"{path.name}.damaged")
        assert aside.read_bytes() == contents and not path.exists()
        made, calls = counted()
        assert len(cache.missing(images)) == SHARD
        cache.encode(made, images)
        assert calls == [SHARD] and torch.equal(cache.batch(images), expected(images))
        assert FeatureCache(folder, "colours", 3).missing(images) == []

    def test_shards_that_disagree(self, images: list[Path], folder: Path) -> None:
        filled(folder, images[:8])
        replaced(max(shards(folder)), features=torch.zeros(4, 7, 3))
        with pytest.raises(ValueError, match=r"has features \(\d, \d\) of an image"):
            FeatureCache(folder, "colours")

    def test_verify(self, images: list[Path], folder: Path) -> None:
        cache = filled(folder, images)
        found = cache.verify(encoder(), images=5)
        assert found.is_sound and (found.images, found.shards, found.compared) == (10, 3, 5)
        assert found.furthest == 0.0 and found.damaged == ()
        flipped(shards(folder)[1])
        cache = FeatureCache(folder, "colours")
        assert len(cache) == 10, "to open reads no features"
        found = cache.verify()
        assert not found.is_sound and found.compared == 0 and found.shards == 2
        assert str(found).endswith("1 damaged shards set aside: encode again")
        assert [path.name for path in found.damaged] == [
            path.stem for path in folder.glob("*/*.damaged")
        ]
        assert len(cache.missing(images)) == 10 - found.images > 0
        cache.encode(encoder(), images)
        assert cache.verify().is_sound and torch.equal(cache.batch(images), expected(images))

    @pytest.mark.parametrize(
        ("dtype", "error", "sound"),
        [
            ("float32", 1e-4, True), ("float32", 1e-2, False), ("float16", 1e-4, True),
            ("bfloat16", 1e-2, True), ("bfloat16", 0.1, False), ("float32", float("nan"), False),
        ],
    )  # fmt: skip
    def test_verify_by_encoding_again(
        self, dtype: str, error: float, sound: bool, images: list[Path], folder: Path
    ) -> None:
        cache = FeatureCache(folder, "colours")
        cache.encode(encoder(), images, dtype=dtype)
        own = encoder()
        other = replace(own, encode=lambda batch: own.encode(batch) * (1 + error))
        paint(images[0], 50)
        images[1].unlink()
        found = cache.verify(other, images=20)
        assert found.is_sound == sound and found.compared == 8, "not of files that have changed"
        assert ("8 encoded again agree" in str(found)) == sound and "\n" not in str(found)
        assert cache.verify(other, images[3:5]).compared == 2

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's numbers")
    def test_features_are_mapped(
        self, images: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To open a shard of 80 MB takes no memory, to read an image of it no more than a few."""
        monkeypatch.setattr(feature_shards, "SHARD_BYTES", 2**30)
        monkeypatch.setattr(feature_shards, "SHARD_IMAGES", len(images))

        def encode(batch: Tensor) -> Tensor:
            return batch[:, :1, 0, 0].unsqueeze(2).expand(-1, 2**8, 2**13)

        FeatureCache(folder, "big").encode(replace(encoder(key="big"), encode=encode), images)
        one = 2**23  # bytes
        assert largest(folder) > len(images) * one
        before = resident()
        cache = FeatureCache(folder, "big")
        assert resident() - before < one / 2
        assert cache[images[2]].shape == (2**8, 2**13)
        assert resident() - before < 4 * one, "its pages, and copies"


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in shards(folder))


def resident() -> int:
    """Bytes of memory this process has, mapped files among them."""
    status = Path("/proc/self/status").read_text()
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(kilobytes) * 1024
