"""Row of a corpus, and its place in the corpus's files, from which it can be read again without those before it."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class RowPlace(NamedTuple):
    """Place where a row begins.

    Attributes:
        file: index of the file in the source.
        row: of the file, counted from 0.
        byte: of the file's content (decompressed), where the row's line begins; -1 where rows can only be counted.
        number: of the row in the corpus, counted from 0.
    """

    file: int
    row: int
    byte: int
    number: int


FIRST = RowPlace(0, 0, 0, 0)


@dataclass(frozen=True)
class Row:
    """A row of a corpus: named columns, the bytes of a text file, or a fault."""

    where: str
    columns: dict[str, Any] | None = None
    text: bytes | None = None
    fault: str | None = None


@dataclass
class Goal:
    """The row to be read next: the first one, or another that its owner moves it to, further on in the same file.

    Attributes:
        read_through: whether a reader had to read what lies before: the file is compressed, or its rows can only be
            counted.
    """

    place: RowPlace = FIRST
    read_through: bool = False

    @property
    def row(self) -> int:
        return self.place.row
