"""Digests of files: remembered, and read again where a file may be another."""

import json
import os
import time
from pathlib import Path

import pytest
from encoding_script import paint

from fused_route.training import files
from fused_route.training.files import FileDigests, content_digest


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [paint(tmp_path / f"{i}.png", i) for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_contents_are_read_once(
    images: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watched(monkeypatch)
    names = [str(path) for path in images]
    digests = [content_digest(path) for path in images]
    assert FileDigests(folder).of(names) == digests and len(read) == 10
    assert FileDigests(folder).of(names[::-1]) == digests[::-1] and len(read) == 10
    kept = images[3].stat()
    time.sleep(0.02)  # more than a tick of the clock of files
    data = bytearray(images[3].read_bytes())
    data[-20] ^= 1
    images[3].write_bytes(data)
    os.utime(images[3], ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert images[3].stat().st_size == kept.st_size
    again = FileDigests(folder).of(names)
    assert len(read) == 11 and again[3] == content_digest(images[3]) != digests[3]
    assert FileDigests(folder).known()[names[3]] == again[3]


def test_young_files_are_read_again(
    images: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watched(monkeypatch)
    monkeypatch.setattr(files, "YOUNG", 10**12)
    for times in (1, 2):
        FileDigests(folder).of([str(path) for path in images])
        assert len(read) == 10 * times
    assert not list(folder.glob("files.*"))


def test_writers_at_once(images: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = watched(monkeypatch)
    names = [str(path) for path in images]
    one, other = FileDigests(folder), FileDigests(folder)
    assert one.known() == other.known() == {}
    one.of(names[:6])
    other.of(names[4:])
    assert len(list(folder.glob("files.*.json"))) == 2 and len(read) == 12
    both = FileDigests(folder)
    paint(images[0].with_name("new.png"), 40)
    both.of([*names, str(images[0].with_name("new.png"))])
    assert len(read) == 13, "both were read"
    assert len(list(folder.glob("files.*.json"))) == 1, "and made one"
    assert len(FileDigests(folder).known()) == 11


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1, "files": {"a": [1]}}'])
def test_a_damaged_file(
    text: str, images: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    read = watched(monkeypatch)
    folder.mkdir()
    (folder / "files.1.json").write_text(text)
    FileDigests(folder).of([str(images[0])])
    assert "holds no digests of files in format 1; set aside" in capsys.readouterr().err
    assert (folder / "files.1.json.damaged").read_text() == text and len(read) == 1


def test_many_files(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a thread takes at a time, and more than are saved at a time."""
    watched(monkeypatch)
    monkeypatch.setattr(files, "SAVED_EVERY", 100)
    paths = [tmp_path / str(i) for i in range(333)]
    for i, path in enumerate(paths):
        path.write_text(str(i))
    paths[7].unlink()
    found = FileDigests(folder).of([str(path) for path in paths])
    assert found[7] == f"{paths[7]} cannot be read: No such file or directory"
    del paths[7], found[7]
    assert found == [content_digest(path) for path in paths]
    [file] = folder.glob("files.*.json")
    assert len(json.loads(file.read_bytes())["files"]) == 332


def test_what_cannot_be_written_is_said(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    watched(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    FileDigests(tmp_path / "file").of([str(images[0])])
    assert "file cannot be written, so images are read again" in capsys.readouterr().err


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are read, however young they are."""
    read: list[str] = []

    def digest(path: str) -> bytes:
        read.append(path)
        return content_digest(path)

    monkeypatch.setattr(files, "content_digest", digest)
    monkeypatch.setattr(files, "YOUNG", 0)
    return read
