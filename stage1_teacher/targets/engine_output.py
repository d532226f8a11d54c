"""Output of an engine for some windows: a class for each kind, which makes the targets from it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pipeline.config import DumpConfig
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.targets import Targets
from pipeline.covering.truncated_rows import ListedRows, listed_targets
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.sparse_targets import SpanRequest, SparseTargets, Sparsity
from stage1_teacher.reduction.types import RowsAlong


class EngineOutput(Protocol):
    """The engine's output for each of the windows' spans, in order."""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens were actually computed for it."""

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Return the spans' targets, given the spans' coverings."""

    def canonical_rows(self) -> list[Sequence[ReducedRow]]:
        """Return the reduced canonical rows of each span; none of a server, which gives no whole softmax."""

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return the rows of each span that begin where its canonical encoding has no token boundary."""


class SparseOutput(NamedTuple):
    """Sparse targets that the engine's workers have made: nothing is left to sum."""

    spans: Sequence[SparseTargets]
    num_tokens: int


class CanonicalOutput(NamedTuple):
    """The canonical rows alone, reduced."""

    rows: Sequence[list[ReducedRow]]  # of each span
    num_tokens: int

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Sum the rows to bytes."""
        return [covering.targets(rows) for covering, rows in zip(coverings, self.rows, strict=True)]

    def canonical_rows(self) -> list[Sequence[ReducedRow]]:
        """Return all rows."""
        return list(self.rows)

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return none."""
        return [[] for _ in self.rows]


class BranchedOutput(NamedTuple):
    """Canonical rows and the branch rows that leave them, reduced."""

    branchings: Sequence[Branching]
    num_tokens: int

    def targets(self, coverings: Sequence[Covering]) -> list[Targets]:
        """Weight the rows and sum them to bytes; each branching has its own covering."""
        assert len(coverings) == len(self.branchings)
        return [branching.targets() for branching in self.branchings]

    def canonical_rows(self) -> list[Sequence[ReducedRow]]:
        """Return the rows that no branch leads to."""
        return [branching.canonical_rows for branching in self.branchings]

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

    def canonical_rows(self) -> list[Sequence[ReducedRow]]:
        """Return none."""
        return [[] for _ in self.rows]

    def off_boundaries(self) -> list[list[ReducedRow]]:
        """Return none."""
        return [[] for _ in self.rows]


def canonical_requests(
    windows: Sequence[EncodedWindow], coverings: Sequence[Covering], num_top: int = 0
) -> list[list[RowsAlong]]:
    """Return the requests for the canonical rows of each window's spans.

    They are the row before a span's first token, and the row after each of its tokens.

    Args:
        num_top: most probable tokens of each row that are wanted, too.
    """
    of_spans = iter(coverings)
    return [[RowsAlong.canonical(next(of_spans), span.first, num_top) for span in window.spans] for window in windows]


def span_requests(windows: Sequence[EncodedWindow]) -> list[list[SpanRequest]]:
    """Return the requests for the sparse targets of each window's spans."""
    return [
        [SpanRequest(span.first, span.tokens, span.covered_bytes, span.kept) for span in window.spans]
        for window in windows
    ]


def sparsity_of(dump: DumpConfig) -> Sparsity:
    """Return what a dump keeps of its targets."""
    of_tokens = (0, 0.0) if dump.tokens is None else (dump.tokens.top_k, dump.tokens.min_prob)
    return Sparsity(dump.top_k, dump.min_prob, dump.covering.redistribute_dropped, dump.arithmetic_used, *of_tokens)


def listed_spans(rows: Sequence[ListedRows], windows: Sequence[EncodedWindow]) -> list[ListedRows]:
    """Return the listed rows of each span of each window, as `canonical_requests` would."""
    return [
        window_rows[span.first : span.first + len(span.tokens) + 1]
        for window_rows, window in zip(rows, windows, strict=True)
        for span in window.spans
    ]
