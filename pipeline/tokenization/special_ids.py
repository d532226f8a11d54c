"""Ids of the control tokens that mark the start and the end of a text for a model."""

from typing import NamedTuple


class SpecialIds(NamedTuple):
    """Control tokens around a text.

    Attributes:
        start: id put before a document; None for chats, where the template writes it.
        ends: ids that mean END, at least one.
    """

    start: int | None
    ends: tuple[int, ...]

    @property
    def document_start(self) -> int:
        """Return `start` of a model that reads plain documents; it is never None there."""
        assert self.start is not None
        return self.start

    @property
    def end(self) -> int:
        """Return the id put after a document, if one is put there: the first that means END."""
        return self.ends[0]
