"""The demo's data in one file, for a machine that lacks the packages which ship it.

    python -m fused_route.training.demo.bundle --out demo.tar.gz

holds the layers of the text encoder that the demo keeps, its tokenizer, the questions, the features
of all images, and the test images, which the report shows. Weights and features are float16, so a
run from a bundle is close to one from the packages, and not the same to the last digit.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from fused_route.training.data import easy_vqa
from fused_route.training.data.easy_vqa import Questions
from fused_route.training.demo.compare import Settings, Split, load_splits, split_of
from fused_route.training.demo.features import CACHE_DIR
from fused_route.training.demo.models import load_encoder
from fused_route.training.demo.task import encoder_directory
from fused_route.training.demo.vision import load_efficientnet_lite0
from fused_route.training.files import atomic_file

MOST_BYTES = 55 * 2**20
FORMAT = 1
FILE = CACHE_DIR.parent / "demo.tar.gz"
UNPACKED = CACHE_DIR.parent / "bundles"
MANIFEST = "manifest.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Data:
    """All that the demo reads.

    Attributes:
        encoder: directory of the text encoder, as `load_encoder` takes it.
        layers: how many layers it has.
        vision: name of the tower that made the features.
        train, test: questions with tokens and features.
        test_images: files by image id.
    """

    encoder: Path
    layers: int
    vision: str
    train: Split
    test: Split
    test_images: list[Path]


def pack(data: Data, out: Path, most: int = MOST_BYTES) -> int:
    """Writes a bundle, whole or not at all; returns its size in bytes.

    Args:
        out: a .tar, or a .tar.gz.
        most: bytes that the file may have.

    Raises:
        ValueError: another suffix, no model, numbers beyond float16, or more than `most` bytes.
    """
    check_name(out)
    splits = {"train": data.train, "test": data.test}
    features = {name: halved(f"{name} features", x.features) for name, x in splits.items()}
    questions = {name: asdict(x.questions) for name, x in splits.items()}
    images = enumerate(data.test_images)
    members = {
        **encoder_members(data.encoder, data.layers),
        "questions.json": as_json(questions),
        "features.safetensors": safetensors.torch.save(features),
        **{f"images/{i}{image.suffix}": image.read_bytes() for i, image in images},
    }
    digests = {name: sha256(content).hexdigest() for name, content in members.items()}
    about = {"format": FORMAT, "layers": data.layers, "vision": data.vision, "files": digests}
    with atomic_file(out) as file:
        write_tar(file, {MANIFEST: as_json(about), **members}, zipped=out.suffix == ".gz")
        size = file.tell()
        if size > most:
            raise ValueError(f"the bundle has {size:,} bytes; out={str(out)!r} may have {most:,}")
    return size


def check_name(out: Path) -> None:
    """ValueError for a file that is no .tar and no .tar.gz by its name."""
    if not out.name.endswith((".tar", ".tar.gz")):
        raise ValueError(f"out must end in .tar or .tar.gz, got {str(out)!r}")


def encoder_members(directory: Path, layers: int) -> dict[str, bytes]:
    """The files of an encoder cut to its first layers, with float16 weights that load as float32.

    Raises:
        ValueError: no model directory, or it has fewer layers.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
        weights = safetensors.torch.load_file(directory / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"encoder={str(directory)!r} is no model directory: {error}") from None
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ValueError(f"layers must be 1 to {config['num_hidden_layers']}, got {layers}")
    kept = {name: halved(name, x) for name, x in weights.items() if layer_of(name) < layers}
    config |= {"num_hidden_layers": layers, "dtype": "float32"}
    files = [directory / name for name in TOKENIZER if (directory / name).is_file()]
    return {
        "encoder/config.json": as_json(config),
        "encoder/model.safetensors": safetensors.torch.save(kept, {"format": "pt"}),
        **{f"encoder/{file.name}": file.read_bytes() for file in files},
    }


def layer_of(name: str) -> int:
    """The number of the layer that a tensor of an encoder belongs to; −1 where it is in none."""
    found = re.search(r"\blayer\.(\d+)\.", name)
    return int(found[1]) if found else -1


def halved(name: str, tensor: Tensor) -> Tensor:
    """Floating-point numbers as float16, others as they are.

    Raises:
        ValueError: a number that float16 does not hold.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous()
    half = tensor.half().contiguous()
    if not half.isfinite().all():
        raise ValueError(f"{name}: numbers that are not finite in float16")
    return half


def as_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def write_tar(file: BinaryIO, members: Mapping[str, bytes], *, zipped: bool) -> None:
    """A tar of these files: the same bytes at any time and for any user."""
    if zipped:
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as inner:
            write_tar(inner, members, zipped=False)  # type: ignore[arg-type]
        return
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))


def load(path: Path, layers: int = Settings.layers, into: Path = UNPACKED) -> Data:
    """What is in a bundle: a file, or the folder that one was unpacked into.

    Args:
        layers: how many layers of the text encoder are needed.
        into: folder in which files are unpacked, each once.

    Raises:
        ValueError: it does not exist, is damaged, or has fewer layers.
    """
    from transformers import AutoTokenizer

    folder = path if path.is_dir() else unpacked(path, into)
    about = verified(folder)
    if about["layers"] < layers:
        raise ValueError(f"{path} holds {about['layers']} layers of the text model, not {layers}")
    questions = json.loads((folder / "questions.json").read_bytes())
    features = safetensors.torch.load_file(folder / "features.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    train, test = (
        split_of(Questions(**questions[name]), tokenizer, features[name].float())
        for name in ("train", "test")
    )
    images = sorted((folder / "images").iterdir(), key=lambda image: int(image.stem))
    return Data(folder / "encoder", about["layers"], about["vision"], train, test, images)


def from_packages(layers: int = Settings.layers, cache: Path = CACHE_DIR) -> Data:
    """The same from the installed packages; images are encoded where no cache has them.

    Raises:
        ValueError: a package is missing.
    """
    _, tokenizer = load_encoder(encoder_directory(), layers)
    tower = load_efficientnet_lite0()
    train, test = load_splits(tower, tokenizer, cache)
    images = easy_vqa.image_paths("test")
    return Data(encoder_directory(), layers, tower.name, train, test, images)


def read(bundle: Path | None, layers: int = Settings.layers, cache: Path = CACHE_DIR) -> Data:
    """What a bundle holds, or without one the packages: see `load` and `from_packages`."""
    return from_packages(layers, cache) if bundle is None else load(bundle, layers)


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of an unpacked bundle, all of whose files are as they were packed.

    Raises:
        ValueError: no bundle, of another format, or a file that is missing or damaged.
    """
    try:
        about = json.loads((folder / MANIFEST).read_bytes())
        version, files = about["format"], dict(about["files"])
        int(about["layers"]), str(about["vision"])
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{folder} holds no bundle: {MANIFEST} is missing or damaged") from None
    if version != FORMAT:
        raise ValueError(f"{folder} is a bundle of format {version}; this version reads {FORMAT}")
    for name, digest in files.items():
        file = folder / name
        if not file.is_file() or sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{file} is missing or damaged")
    return dict(about)


def unpacked(path: Path, into: Path) -> Path:
    """The folder of a bundle's files, which is named after its contents and made once.

    Raises:
        ValueError: the file does not exist, or is no sound bundle.
    """
    with readable(path):
        target = into / sha256(path.read_bytes()).hexdigest()[:16]
    if target.is_dir():
        try:
            verified(target)
            return target
        except ValueError:
            shutil.rmtree(target)
    into.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=into, prefix=".") as partial:
        folder = Path(partial, "bundle")
        with readable(path):
            extract(path, folder)
        verified(folder)
        os.replace(folder, target)
    return target


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong when a damaged file is read, as a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"bundle={str(path)!r} does not exist") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"bundle={str(path)!r} is damaged or no bundle: {error}") from None


def extract(path: Path, folder: Path) -> None:
    """Writes the files of a tar below a folder; ValueError for anything but files below it."""
    with tarfile.open(path) as tar:
        for entry in tar:
            name = PurePosixPath(entry.name)
            content = tar.extractfile(entry) if entry.isfile() else None
            if content is None or name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{path} is no bundle: it holds {entry.name!r}")
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as written:
                shutil.copyfileobj(content, written)


def main(arguments: Sequence[str] | None = None) -> int:
    """Packs the bundle; what stands in the way is one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m fused_route.training.demo.bundle")
    parser.add_argument("--out", type=Path, default=FILE, help=f"a .tar or .tar.gz: {FILE}")
    parser.add_argument("--cache", type=Path, default=CACHE_DIR, help="folder of image features")
    given = parser.parse_args(arguments)
    try:
        check_name(given.out)  # before minutes of encoding, not after
        size = pack(from_packages(cache=given.cache), given.out)
    except (ValueError, OSError) as error:
        print(f"bundle: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{given.out}: {size / 2**20:.1f} MiB")
    print(f"next: fused-route demo --bundle {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
