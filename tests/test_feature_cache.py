"""A cache of features: what is encoded, by which processes, what is read and refused."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding_script import SHARD, counted, encoder, expected, filled, paint, pixels, shards
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from fused_route.training import feature_shards
from fused_route.training.data.images import load_image
from fused_route.training.feature_cache import FeatureCache

# Python 3.12 and later, of the fork that starts a DataLoader's workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


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


def grid(batch: Tensor) -> Tensor:
    """(B, 3, H, W)."""
    return batch


def rows(batch: Tensor) -> Tensor:
    """(B, 3, H·W)."""
    return batch.flatten(2)


def cells(batch: Tensor) -> Tensor:
    """(B, H·W, 3)."""
    return batch.flatten(2).transpose(1, 2)


@pytest.mark.usefixtures("small_shards")
class TestEncode:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_only_what_is_missing(self, workers: int, images: list[Path], folder: Path) -> None:
        cache = FeatureCache(folder, "colours")
        made, calls = counted()
        state = torch.get_rng_state()
        assert cache.missing(images) == images and cache.shape is None
        cache.encode(made, images[2:5], batch_size=2, workers=workers)
        assert calls == [2, 1] and cache.missing(images) == images[:2] + images[5:]
        done = cache.encode(made, images, batch_size=4, workers=workers)
        assert calls == [2, 1, 4, 3] and done.new == 7 and done.skipped == ()
        assert cache.encode(made, images, workers=workers).new == 0 and len(calls) == 4
        assert cache.missing(images) == [] and len(cache) == 10 and cache.shape == (2, 3)
        assert torch.equal(torch.get_rng_state(), state), "a run with a full cache is the same"
        again = FeatureCache(folder, "colours", 3)
        for order in (images, images[::-1], images[:1] * 3):
            assert torch.equal(again.batch(order), expected(order))
        assert torch.equal(again[images[7]], expected(images)[7])
        held = [len(safe_open(path, "pt").get_slice("digests")[:]) for path in shards(folder)]
        assert sorted(held) == [3, 3, 4], "full, but for what was left at an end"

    def test_contents_count_not_paths(self, images: list[Path], folder: Path) -> None:
        made, calls = counted()
        cache = FeatureCache(folder, "colours")
        twin = paint(images[0].with_name("twin.png"), 4)
        assert cache.encode(made, [*images, twin, images[1]]).new == 10 and calls == [10]
        moved = images[2].rename(images[2].with_name("moved.png"))
        assert cache.missing([moved, twin]) == []
        assert torch.equal(cache.batch([moved, twin]), expected([moved, twin]))
        before = expected(images[:1])
        paint(images[0], 77)
        assert torch.equal(cache.batch(images[:1]), before), "looked at once"
        assert cache.missing([*images[:2], twin]) == images[:1]
        cache.encode(made, [*images[:2], twin])
        assert calls == [10, 1] and torch.equal(cache.batch(images[:1]), expected(images[:1]))

    def test_another_process_has_encoded(self, images: list[Path], folder: Path) -> None:
        reader = FeatureCache(folder, "colours")
        filled(folder, images)
        assert torch.equal(reader.batch(images), expected(images))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, dtype: str, images: list[Path], folder: Path) -> None:
        cache = FeatureCache(folder, "colours")
        cache.encode(encoder(), images[:5], dtype=dtype)
        cache.encode(encoder(), images)
        assert cache.dtypes == [dtype]
        kept = feature_shards.DTYPES[dtype]
        assert torch.equal(cache.batch(images), expected(images).to(kept))
        with pytest.raises(ValueError, match=f"keeps features in {dtype}: give that"):
            cache.encode(encoder(), images, dtype="float32")

    def test_shards_are_of_64_mb(
        self, images: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(feature_shards, "SHARD_BYTES", 3 * 2 * 3 * 4)
        filled(folder, images)
        assert [len(FeatureCache(folder, "colours")), len(shards(folder))] == [10, 4]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_broken_images(
        self, workers: int, images: list[Path], folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images[3].write_text("no image")
        absent = images[0].with_name("absent.png")
        cache = FeatureCache(folder, "colours")
        with pytest.raises(ValueError, match=r"^\S+03.png is not an image$"):
            cache.encode(encoder(), images, batch_size=2, workers=workers)
        assert len(cache) == len(FeatureCache(folder, "colours")) == 3, "what was encoded is kept"
        with pytest.raises(ValueError, match=r"absent.png cannot be read: No such file"):
            cache.encode(encoder(), [*images, absent])
        with pytest.raises(ValueError, match=r"absent.png cannot be read: No such file"):
            cache.missing([absent])
        capsys.readouterr()
        for new in (6, 0):
            done = cache.encode(encoder(), [*images, absent], workers=workers, broken="skip")
            assert done.new == new and done.skipped == (images[3], absent)
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("2 of 11 images skipped: ") and "absent.png cannot be" in said
        assert cache.missing(images) == [images[3]]

    def test_an_image_that_changes_meanwhile(self, images: list[Path], folder: Path) -> None:
        def preprocess(image: Image.Image) -> Tensor:
            paint(images[1], 99)
            return pixels(image)

        cache = FeatureCache(folder, "colours")
        with pytest.raises(ValueError, match=r"01.png changed while it was being encoded"):
            cache.encode(replace(encoder(), preprocess=preprocess), images)
        assert cache.missing(images[:2]) == [images[1]]

    def test_what_cannot_be_preprocessed_is_broken(self, images: list[Path], folder: Path) -> None:
        def preprocess(image: Image.Image) -> Tensor:
            raise ValueError("too\nsmall")

        with pytest.raises(ValueError, match=r"00.png cannot be preprocessed: too small$"):
            filled = FeatureCache(folder, "colours")
            filled.encode(replace(encoder(), preprocess=preprocess), images)

    @pytest.mark.parametrize(
        ("encode", "batch_size", "said"),
        [
            (grid, 2, r"makes features \(2, 3, 8, 8\); expected \(2, Nv, 3\)"),
            (rows, 2, r"makes features \(2, 3, 64\); expected \(2, Nv, 3\)"),
            (cells, 1, r"makes 36 tokens of \S+02.png, 64 of other images"),
            (cells, 4, r"02.png is preprocessed to \(3, 6, 6\), \S+00.png to \(3, 8, 8\)"),
        ],
    )
    def test_shapes_that_are_refused(
        self, encode: Callable[[Tensor], Tensor], batch_size: int, said: str, images: list[Path],
        folder: Path,
    ) -> None:  # fmt: skip
        paint(images[2], 5, side=6)
        cache = FeatureCache(folder, "colours", 3)
        with pytest.raises(ValueError, match=said) as caught:
            cache.encode(replace(encoder(), encode=encode), images, batch_size=batch_size)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("value", "dtype", "said"),
        [
            (float("nan"), "float32", r"features of \S+05.png are not finite$"),
            (1e5, "float16", r"features of \S+05.png are not finite in float16: keep float32"),
        ],
    )
    def test_not_finite(
        self, value: float, dtype: str, said: str, images: list[Path], folder: Path
    ) -> None:
        def encode(batch: Tensor) -> Tensor:
            features = encoder().encode(batch)
            features[batch[:, 0, 0, 0] == pixels(load_image(images[5]))[0, 0, 0], 1, 2] = value
            return features

        with pytest.raises(ValueError, match=said):
            FeatureCache(folder, "colours").encode(
                replace(encoder(), encode=encode), images, dtype=dtype
            )

    def test_arguments(self, images: list[Path], folder: Path) -> None:
        cache = filled(folder, images[:2])
        refused: dict[str, Callable[[], object]] = {
            "encoder has key='other', the cache 'colours'": lambda: cache.encode(
                encoder(key="other"), images
            ),
            "dtype must be one of float32, float16, bfloat16": lambda: cache.encode(
                encoder(), images, dtype="int8"
            ),
            "broken must be one of refuse, skip": lambda: cache.encode(
                encoder(), images, broken="ignore"
            ),
            "batch_size must be a whole": lambda: cache.encode(encoder(), images, batch_size=0),
            "workers must be a whole": lambda: cache.encode(encoder(), images, workers=-1),
            "paths is empty": lambda: cache.batch([]),
            r"09.png has no features in \S+colours: encode it with `fused-route encode`": lambda: (
                cache[images[9]]
            ),
            "absent.png cannot be read": lambda: cache[folder / "absent.png"],
            "cannot be read: it is no file": lambda: cache[folder],
            "key must be the key": lambda: FeatureCache(folder, "../elsewhere"),
            "width must be a whole": lambda: FeatureCache(folder, "colours", 0),
            "is a file where the feature cache": lambda: FeatureCache(images[0], "colours"),
            "key='missing'": lambda: cache.verify(encoder(key="missing")),
        }
        for said, call in refused.items():
            with pytest.raises(ValueError, match=said) as caught:
                call()
            assert "\n" not in str(caught.value)


def run(images: list[Path], folder: Path, seconds: float, **variables: str) -> Any:
    """Encoding in another process."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("encoding_script.py"), images[0].parent, folder,
         str(seconds)],
        env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class TestProcesses:
    def test_killed_and_resumed(self, images: list[Path], folder: Path) -> None:
        images += [paint(images[0].with_name(f"{i}.png"), i) for i in range(10, 40)]
        process = run(images, folder, 0.05)
        deadline = time.monotonic() + 60
        while len(shards(folder)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cache = FeatureCache(folder, "colours")
        kept = len(cache)
        assert 3 * SHARD <= kept < len(images) and kept % SHARD == 0
        assert not list(folder.glob("*/*.damaged"))
        made, calls = counted()
        cache.encode(made, images)
        assert sum(calls) == len(images) - kept
        assert torch.equal(FeatureCache(folder, "colours").batch(images), expected(images))

    def test_two_at_once(self, images: list[Path], folder: Path) -> None:
        both = [run(images, folder, 0.02, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        said = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert [out for out, _ in said] == ["5\n", "5\n"]
        assert "encoding 5 images" in said[0][1] and said[1][1] == "", "one bar"
        cache = FeatureCache(folder, "colours")
        assert cache.missing(images) == [] and len(shards(folder)) == 4
        assert torch.equal(cache.batch(images), expected(images))

    @pytest.mark.parametrize("given", [("2", "2"), ("1", None), ("one", "2"), ("0", "0")])
    def test_places_that_are_none(
        self, given: tuple[str, str | None], images: list[Path], folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        for name, value in zip(("RANK", "WORLD_SIZE"), given, strict=True):
            if value is not None:
                monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"RANK='{given[0]}' and WORLD_SIZE="):
            filled(folder, images)

    def test_workers_read(self, images: list[Path], folder: Path) -> None:
        cache = filled(folder, images)
        sent = pickle.loads(pickle.dumps(cache))
        assert torch.equal(sent.batch(images), expected(images))
        paths: Any = images
        loader: Any = DataLoader(paths, batch_size=3, num_workers=2, collate_fn=cache.batch)
        assert torch.equal(torch.cat(list(loader)), expected(images))
