"""What a data set is made of: rows of one form, the splits they are in, the files of those."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

ROLES = ("train", "evaluate")


class Row(TypedDict):
    """A question, a sentence or a caption, of any data set.

    Attributes:
        id: distinct within a split.
        images: names of one or two files, relative to the folder of images.
        text: question or sentence; "" of captions.
        answer: what to learn; "" where there is none.
        references: what an answer is scored against: of ten people, or one; none in test splits.
        kind: what scores are told apart by; "" where the data set knows none.
    """

    id: str
    images: list[str]
    text: str
    answer: str
    references: list[str]
    kind: str


@dataclass(frozen=True)
class Needed:
    """A file or folder of a data set.

    Attributes:
        path: relative to the data set's folder, or to that of its images.
        fix: what to do where it is missing, with "{folder}" for the one that it is looked for in.
        elsewhere: where it may lie as well, "" for nowhere else.
    """

    path: str
    fix: str
    elsewhere: str = ""

    def under(self, folder: Path) -> Path:
        """Where it is, or where it should be."""
        usual, other = folder / self.path, folder / self.elsewhere
        return other if self.elsewhere and other.exists() and not usual.exists() else usual

    def fixed(self, folder: Path) -> str:
        """What to do where it is missing in a folder."""
        return self.fix.format(folder=folder)


@dataclass(frozen=True)
class Split:
    """A split of a data set.

    Attributes:
        rows: reads them, of (folder of the data set, role), in the order of the files.
        files: what `rows` reads, relative to the folder of the data set.
        folders: what its images lie in, relative to the folder of images.
        answers: "given", or "withheld" by those who score them.
    """

    rows: Callable[[Path, str], Iterator[Row]]
    files: tuple[Needed, ...]
    folders: tuple[Needed, ...]
    answers: str = "given"


@dataclass(frozen=True)
class Layout:
    """How the files of a data set lie.

    Attributes:
        task: what its rows are for.
        splits: by name.
        images: folder of images within that of the data set, where no other is given.
        home: finds the folder of a data set that is a package; None where it has to be given.
    """

    task: str
    splits: Mapping[str, Split]
    images: str = ""
    home: Callable[[], Path] | None = None
