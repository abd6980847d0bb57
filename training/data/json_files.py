"""JSON files of any size, entry by entry: no more than one entry is held in memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ijson  # type: ignore[import-untyped]

from fused_route.checks import shown

T = TypeVar("T")
KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
EXCERPT = 60


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a JSON file.

    Attributes:
        file: the path.
        place: where in the file, for messages: a number in a list, a key, a line.
        values: what the object holds, by key.
    """

    file: Path
    place: str
    values: dict[str, Any]

    def get(self, key: str, kind: type[T]) -> T:
        """The value under a key; ValueError where there is none, or one of another kind."""
        value = self.values.get(key)
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        given = f"{key!r} = {shown(value)}" if key in self.values else f"no {key!r}"
        raise self.error(f"has {given}; it needs {key!r}, {KINDS[kind]}")

    def inner(self, key: str) -> Iterator["Entry"]:
        """The objects of the list under a key; ValueError where it is none of objects."""
        for number, value in enumerate(self.get(key, list)):
            yield _entry(self.file, f"{self.place}, {key} {number}", value)

    def error(self, what: str) -> ValueError:
        """An error about this entry, to raise."""
        return ValueError(f"{self.file}: entry {self.place} {what}")


def items(path: Path, key: str) -> Iterator[Entry]:
    """The entries of the list under a key of the object that a file holds.

    Raises:
        ValueError: no such file, it may not be read, is broken JSON, has no list under `key`, or
            an entry is no object. Broken JSON is found when the reading gets there.
    """
    number = -1
    with _opened(path) as file:
        values = ijson.items(file, f"{key}.item", use_float=True)
        for number, value in enumerate(_sound(path, values)):
            yield _entry(path, f"{number} of {key!r}", value)
    if number < 0:
        _check_shape(path, key, "start_array", f"an object with a list {key!r}")


def entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """(key, entry) of the object that a file holds.

    Raises:
        ValueError: as `items`, and where the file holds no object.
    """
    key = None
    with _opened(path) as file:
        for key, value in _sound(path, ijson.kvitems(file, "", use_float=True)):
            yield key, _entry(path, repr(key), value)
    if key is None:
        _check_shape(path, "", "start_map", "an object of entries by key")


def lines(path: Path) -> Iterator[Entry]:
    """The entries of a file with one JSON object a line; empty lines are passed over.

    Raises:
        ValueError: as `items`, and where a line holds no object.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path} is broken at line {number}: {error}; it must have one JSON object "
                    "a line: download it again"
                ) from None
            yield _entry(path, f"in line {number}", value)


def _entry(path: Path, place: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: entry {place} must be an object, got {shown(value)}")
    return Entry(path, place, value)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _sound(path: Path, values: Iterator[T]) -> Iterator[T]:
    """The values, and ijson's error in one line; its own has the place marked in the second."""
    number = 0
    try:
        for value in values:
            yield value
            number += 1
    except (ijson.JSONError, UnicodeDecodeError) as error:
        given = error.args[0] if error.args else ""
        # of bytes that are no UTF-8, ijson gives the message as bytes
        message = given.decode(errors="replace") if isinstance(given, bytes) else str(error)
        reason, *excerpt = (line.strip() for line in message.splitlines())
        near = f" near {excerpt[0][:EXCERPT]!r}" if excerpt and excerpt[0] else ""
        raise ValueError(
            f"{path} is broken JSON after {number} entries or more: {reason}{near}; unpack or "
            "download it again"
        ) from None


def _check_shape(path: Path, key: str, event: str, what: str) -> None:
    """ValueError unless what begins under the first level's `key` is of the kind of `event`."""
    with _opened(path) as file:
        for prefix, found, _ in ijson.parse(file):
            if prefix == key and found != "map_key":
                if found == event:
                    return
                break
    raise ValueError(f"{path} must hold {what}, and does not: put the official file there")
