"""The demo's data in one file: what is in it comes back, and nothing damaged does."""

import json
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from small_demo import IMAGES, first, first_images_only
from transformers import AutoTokenizer, BertConfig, BertModel

from fused_route.training.data import easy_vqa
from fused_route.training.demo import bundle, compare
from fused_route.training.demo.models import VqaClassifier, load_encoder
from fused_route.training.demo.task import encoder_directory

LAYERS, WIDTH = 2, 6
NAMES: tuple[easy_vqa.Split, ...] = ("train", "test")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of three tiny layers with the real tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    sizes = BertConfig(
        vocab_size=30522, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(sizes).save_pretrained(folder)
    for name in bundle.TOKENIZER:
        shutil.copy(encoder_directory() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {name: numbers.standard_normal((IMAGES, WIDTH), np.float32) for name in NAMES}


def packed(
    out: Path, encoder: Path, features: dict[str, np.ndarray], layers: int = LAYERS, **most: int
) -> int:
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory())
    with first_images_only():
        train, test = (
            compare.split_of(easy_vqa.load(name), tokenizer, torch.from_numpy(features[name]))
            for name in NAMES
        )
        images = easy_vqa.image_paths("test")
    return bundle.pack(bundle.Data(encoder, layers, "tower", train, test, images), out, **most)


@pytest.fixture(scope="module")
def file(
    tmp_path_factory: pytest.TempPathFactory, encoder: Path, features: dict[str, np.ndarray]
) -> Path:
    out = tmp_path_factory.mktemp("packed") / "demo.tar"
    assert packed(out, encoder, features) == out.stat().st_size
    return out


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_round_trip(
    suffix: str, encoder: Path, features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / f"demo{suffix}"
    packed(out, encoder, features)
    assert (out.read_bytes()[:2] == b"\x1f\x8b") == (suffix == ".tar.gz")
    data = bundle.load(out, LAYERS, tmp_path / "unpacked")
    assert (data.layers, data.vision) == (LAYERS, "tower")
    for name, split in zip(NAMES, (data.train, data.test), strict=True):
        assert split.questions == first(easy_vqa.load(name))
        assert torch.equal(split.features, torch.from_numpy(features[name]).half().float())
    assert [path.read_bytes() for path in data.test_images] == [
        path.read_bytes() for path in easy_vqa.image_paths("test")[:IMAGES]
    ]
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob("**/.*"))


def test_splits_are_those_of_the_packages(file: Path, tmp_path: Path) -> None:
    """All but the features, which `load_splits` takes from a tower."""
    data = bundle.load(file, LAYERS, tmp_path)
    _, tokenizer = load_encoder(encoder_directory(), 1)
    with pytest.MonkeyPatch.context() as patch, first_images_only():
        patch.setattr(compare, "encode_images", lambda *_: data.train.features.numpy())
        theirs = compare.load_splits(None, tokenizer, tmp_path)  # type: ignore[arg-type]
    for ours, split in zip((data.train, data.test), theirs, strict=True):
        for name in ("input_ids", "attention_mask", "images", "labels"):
            assert torch.equal(getattr(ours, name), getattr(split, name)), name


def test_the_encoder_is_the_first_layers_in_float32(
    file: Path, encoder: Path, tmp_path: Path
) -> None:
    data = bundle.load(file, LAYERS, tmp_path)
    ours, _ = load_encoder(data.encoder, LAYERS)
    theirs, _ = load_encoder(encoder, LAYERS)
    assert ours.config.num_hidden_layers == LAYERS
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name].half().to(tensor.dtype)), name
    model = VqaClassifier(ours, 13).eval()
    batch = data.test.batch(torch.arange(4))
    assert model(**batch)["logits"].dtype == torch.float32


def test_the_real_encoder_fits_and_says_nearly_the_same(
    features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "demo.tar"
    assert packed(out, encoder_directory(), features, layers=compare.Settings.layers) < 36 * 2**20
    data = bundle.load(out, into=tmp_path)
    tokens = {"input_ids": data.test.input_ids[:8], "attention_mask": data.test.attention_mask[:8]}
    with torch.no_grad():
        ours, theirs = (
            load_encoder(folder, compare.Settings.layers)[0](**tokens).last_hidden_state
            for folder in (data.encoder, encoder_directory())
        )
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 2e-3


def test_same_contents_same_bytes(
    file: Path, encoder: Path, features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    packed(tmp_path / "again.tar", encoder, features)
    assert (tmp_path / "again.tar").read_bytes() == file.read_bytes()


def test_too_large_is_not_written(
    file: Path, encoder: Path, features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out, size = tmp_path / "demo.tar", file.stat().st_size
    out.write_text("earlier")
    with pytest.raises(ValueError, match=rf"has {size:,} bytes; out='.*' may have {size - 1:,}"):
        packed(out, encoder, features, most=size - 1)
    assert out.read_text() == "earlier" and list(tmp_path.iterdir()) == [out]
    assert packed(out, encoder, features, most=size) == size
    assert bundle.MOST_BYTES == 55 * 2**20


@pytest.mark.parametrize("name", ["demo.zip", "demo", "demo.gz"])
def test_another_suffix(
    name: str, encoder: Path, features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"out must end in \.tar or \.tar\.gz, got"):
        packed(tmp_path / name, encoder, features)


def test_what_cannot_be_packed(
    encoder: Path, features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "demo.tar"
    with pytest.raises(ValueError, match="layers must be 1 to 3, got 4"):
        packed(out, encoder, features, layers=4)
    with pytest.raises(ValueError, match="is no model directory"):
        packed(out, tmp_path, features)
    large = features | {"test": np.full((IMAGES, WIDTH), 1e5, np.float32)}
    with pytest.raises(ValueError, match="test features: numbers that are not finite in float16"):
        packed(out, encoder, large)
    assert not out.exists()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b"", lambda content: b"x" * 999])
def test_a_damaged_file(
    damage: Callable[[bytes], bytes],
    suffix: str,
    encoder: Path,
    features: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    out = tmp_path / f"demo{suffix}"
    packed(out, encoder, features)
    out.write_bytes(damage(out.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged|no bundle"):
        bundle.load(out, LAYERS, tmp_path / "unpacked")
    assert not list((tmp_path / "unpacked").glob("*"))


def test_a_damaged_folder_is_refused_and_unpacked_again(file: Path, tmp_path: Path) -> None:
    folder = bundle.load(file, LAYERS, tmp_path).encoder.parent
    assert bundle.load(folder, LAYERS).vision == "tower"
    written = (folder / "questions.json").stat().st_mtime_ns
    bundle.load(file, LAYERS, tmp_path)
    assert (folder / "questions.json").stat().st_mtime_ns == written  # unpacked once
    (folder / "questions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"questions\.json is missing or damaged"):
        bundle.load(folder, LAYERS)
    assert len(bundle.load(file, LAYERS, tmp_path).train) > IMAGES
    (folder / "images/0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png is missing or damaged"):
        bundle.load(folder, LAYERS)


@pytest.mark.parametrize("change", [{"format": 2}, {"layers": None}, {"files": 3}])
def test_another_manifest(change: dict[str, object], file: Path, tmp_path: Path) -> None:
    folder = bundle.load(file, LAYERS, tmp_path).encoder.parent
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=r"this version reads 1|missing or damaged"):
        bundle.load(folder, LAYERS)


def test_no_bundle(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.tar' does not exist"):
        bundle.load(tmp_path / "nowhere.tar")
    with pytest.raises(ValueError, match="holds no bundle"):
        bundle.load(tmp_path)
    with pytest.raises(ValueError, match="holds 2 layers of the text model, not 3"):
        bundle.load(file, into=tmp_path / "unpacked")


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "link"])
def test_nothing_is_written_beside_the_folder(name: str, tmp_path: Path) -> None:
    out = tmp_path / "evil.tar"
    with tarfile.open(out, "w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type = tarfile.SYMTYPE if name == "link" else tarfile.REGTYPE
        entry.linkname = "/etc/passwd" if name == "link" else ""
        tar.addfile(entry, BytesIO())
    with pytest.raises(ValueError, match="is no bundle: it holds"):
        bundle.load(out, into=tmp_path / "unpacked")
    assert not list(tmp_path.glob("**/escaped"))


def test_command(
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encoded(tower: object, paths: list[Path], cache: Path) -> np.ndarray:
        return np.ones((len(paths), 1280), np.float32)

    monkeypatch.setattr(compare, "encode_images", encoded)
    monkeypatch.setattr(bundle, "encoder_directory", lambda: encoder)
    out = tmp_path / "demo.tar.gz"
    with first_images_only():
        assert bundle.main(["--out", str(out), "--cache", str(tmp_path)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1] == f"next: fused-route demo --bundle {out}"
        assert bundle.load(out, into=tmp_path / "unpacked").vision.startswith("tf_efficientnet")
        assert bundle.main(["--out", str(tmp_path / "demo.zip")]) == 2
    assert capsys.readouterr().err.startswith("bundle: error: out must end in")
