"""Output of an engine for some windows: a class for each kind, which makes the targets from it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.targets import Targets
from pipeline.covering.truncated_rows import ListedRows, listed_targets
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.reducer import Reducer
from stage1_teacher.reduction.types import Rows


class EngineOutput(Protocol):
    """The engine's output for each of the windows' spans, in order."""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens were actually computed for it."""

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Return the spans' targets, given the spans' coverings."""

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return the rows of each span that begin where its canonical encoding has no token boundary."""


class CanonicalOutput(NamedTuple):
    """Hidden states of the canonical rows alone."""

    hidden: Sequence[Tensor]  # for each span, R x D
    num_tokens: int
    reducer: Reducer

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Reduce the rows and sum them to bytes."""
        reduced = reduce_canonical(self.reducer, coverings, self.hidden)
        return [covering.targets(rows) for covering, rows in zip(coverings, reduced, strict=True)]

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return none."""
        return [[] for _ in self.hidden]


class BranchedOutput(NamedTuple):
    """Canonical rows and the branch rows that leave them, reduced."""

    branchings: Sequence[Branching]
    num_tokens: int

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Weight the rows and sum them to bytes; each branching has its own covering."""
        assert len(coverings) == len(self.branchings)
        return [branching.targets() for branching in self.branchings]

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return the branch rows that begin inside tokens of the canonical encoding."""
        return [branching.off_boundaries() for branching in self.branchings]


class TopKOutput(NamedTuple):
    """The most probable tokens of the canonical rows, as a server lists them."""

    rows: Sequence[ListedRows]
    num_tokens: int

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Sum the listed tokens to bytes."""
        return [listed_targets(covering, rows) for covering, rows in zip(coverings, self.rows, strict=True)]

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return none."""
        return [[] for _ in self.rows]


def reduce_canonical(
    reducer: Reducer, coverings: Sequence[Covering], hidden: Sequence[Tensor]
) -> list[list[ReducedRow]]:
    """Reduce the hidden states (R x D) of each covering's canonical rows."""
    return reducer.reduce(
        [Rows(covering, covering.offsets, states_RD) for covering, states_RD in zip(coverings, hidden, strict=True)]
    )


Sliceable = TypeVar("Sliceable", Tensor, ListedRows)


def span_rows(rows: Sequence[Sliceable], windows: Sequence[EncodedWindow]) -> list[Sliceable]:
    """Return the rows of each span of each window: the row before its first token, and the row after each token."""
    return [
        window_rows[span.first : span.first + len(span.tokens) + 1]
        for window_rows, window in zip(rows, windows, strict=True)
        for span in window.spans
    ]
