"""Shards of a feature cache: features of some images in one safetensors file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fused_route.training.files import atomic_file

# Of the layout, and of what `load_image` makes of a file: a change of either makes old features
# other than new ones.
VERSION = "1"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 64 * 2**20
# And no more images: at 10 images/s, of a ViT-B on two cores, a killed run loses 2 minutes.
SHARD_IMAGES = 1024
DIGEST = 32  # bytes of a SHA-256


class Unusable(ValueError):
    """A file is no shard of the cache: damaged, or another's.

    Attributes:
        why: the text without the path.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.why = why


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of features that is mapped into memory: pages are read when rows are.

    Attributes:
        path: the file.
        features: (n, Nv, width) in one of DTYPES; never written to.
        digests: n of them, SHA-256 of the contents of each image's file.
        checksum: what `checksum_of` said when the file was written.
    """

    path: Path
    features: Tensor
    digests: list[bytes]
    checksum: str

    @classmethod
    def opened(cls, path: Path, key: str, width: int | None) -> "Shard":
        """Maps a file and reads its header and digests.

        Raises:
            Unusable: no shard of this version, under this key, of this width.
            OSError: it is gone, or cannot be read now, which says nothing about what it holds.
        """
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                if {"features", "digests"} != set(file.keys()):
                    raise Unusable(
                        path, f"holds {', '.join(file.keys())}, not features and digests"
                    )
                # Both are maps of the file, not copies: opening 1 GiB takes no memory (measured).
                features, digests = file.get_tensor("features"), file.get_tensor("digests")
        except SafetensorError as error:
            raise Unusable(path, f"is no safetensors file, or not a whole one ({error})") from None
        for name, expected in (("key", key), ("version", VERSION)):
            if told.get(name) != expected:
                raise Unusable(path, f"has {name}={told.get(name)!r}, not {expected!r}")
        n, shape = digests.shape[0] if digests.dim() else 0, tuple(features.shape)
        if digests.dtype != torch.uint8 or digests.shape != (n, DIGEST) or n == 0:
            raise Unusable(path, f"has digests {digests.dtype} {tuple(digests.shape)}")
        if len(shape) != 3 or shape[0] != n or 0 in shape or width not in (None, shape[2]):
            wanted = f"({n}, Nv, {width or 'width'})"
            raise Unusable(path, f"has features {shape}, not {wanted}")
        if features.dtype not in DTYPES.values():
            raise Unusable(path, f"has features {features.dtype}, none of {', '.join(DTYPES)}")
        if told.get("digests") != checksum_of(digests):
            raise Unusable(path, "has digests that are not those it was written with")
        raw = digests.numpy().tobytes()
        rows = [raw[i : i + DIGEST] for i in range(0, len(raw), DIGEST)]
        return cls(path, features, rows, told.get("features", ""))

    def is_sound(self) -> bool:
        """Whether its features are those it was written with; reads all of them."""
        return checksum_of(self.features) == self.checksum


class Writer:
    """Gathers features of images and writes them as shards into a folder, each once it is full.

    Args:
        folder, key: where to, and the encoder's key.
        dtype: a name of DTYPES.
        shape: (Nv, width) that features must have; None: what the first ones have.
    """

    def __init__(
        self, folder: Path, key: str, dtype: str, shape: Sequence[int | None] = (None, None)
    ) -> None:
        self.folder, self.key, self.dtype = folder, key, dtype
        self.tokens, self.width = shape
        self._rows: list[tuple[bytes, Tensor]] = []  # pairs: an interruption parts none

    def add(self, files: Sequence[tuple[Path, bytes]], features: Tensor) -> list[Path]:
        """Takes features (B, Nv, width) of files (path, digest); returns shards it has written.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        self._check(files, features)
        kept = features.detach().to("cpu", DTYPES[self.dtype])
        finite = kept.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            i = int(finite.int().argmin())
            fit = f" in {self.dtype}: keep float32" if bool(features[i].isfinite().all()) else ""
            raise ValueError(f"features of {files[i][0]} are not finite{fit}")
        self._rows += zip((digest for _, digest in files), kept.unbind(), strict=True)
        size = kept[0].numel() * kept.element_size()
        full, written = min(max(SHARD_BYTES // size, 1), SHARD_IMAGES), []
        while len(self._rows) >= full:
            written.append(self._write(full))
        return written

    def _check(self, files: Sequence[tuple[Path, bytes]], features: Tensor) -> None:
        batch, shape = len(files), tuple(features.shape)
        if len(shape) != 3 or shape[0] != batch or 0 in shape or self.width not in (None, shape[2]):
            wanted = f"({batch}, Nv, {self.width or 'width'})"
            raise ValueError(f"the encoder makes features {shape}; expected {wanted}")
        if self.tokens not in (None, shape[1]):
            raise ValueError(
                f"the encoder makes {shape[1]} tokens of {files[0][0]}, {self.tokens} of other "
                "images: a cache takes as many of each, so let the processor crop or resize to "
                "one size"
            )
        self.tokens, self.width = shape[1:]

    def flush(self) -> list[Path]:
        """Writes what there is, full or not."""
        return [self._write(len(self._rows))] if self._rows else []

    def _write(self, n: int) -> Path:
        digests, features = zip(*self._rows[:n], strict=True)
        raw = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
        tensors = {"features": torch.stack(features), "digests": raw.view(n, DIGEST)}
        told = {"key": self.key, "version": VERSION}
        told |= {name: checksum_of(tensor) for name, tensor in tensors.items()}
        path = self.folder / f"{uuid4().hex}.safetensors"
        with atomic_file(path) as file:
            file.write(safetensors.torch.save(tensors, metadata=told))
        del self._rows[:n]
        return path


def checksum_of(tensor: Tensor) -> str:
    """SHA-256, in hexadecimal, of a tensor's bytes."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
