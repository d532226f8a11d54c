"""Ids of the control tokens that a model knows the begin and the end of a text by."""

from typing import NamedTuple


class SpecialIds(NamedTuple):
    """The tokens around a text.

    Attributes:
        start: id put before a document; None where a chat's template writes it.
        ends: ids that mean END, at least one.
    """

    start: int | None
    ends: tuple[int, ...]

    @property
    def document_start(self) -> int:
        """Return `start` of a model that reads plain documents, which has one."""
        assert self.start is not None
        return self.start

    @property
    def end(self) -> int:
        """Return the id that is put after a document, where one is: the first that means END."""
        return self.ends[0]
