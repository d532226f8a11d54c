"""Branch rows: paths off the canonical one that are worth a forward pass of the teacher, and the weight of every row.

A token that ends where the canonical encoding has no boundary, or that reaches a boundary by another path, starts a
branch. It is expanded into a separate row if its weight, relative to the mass known just before its end, exceeds
`branch_threshold`, and it is among the `beam_width` heaviest branches that end there. All documents of a batch are
expanded in rounds, one engine call each, until no branch qualifies.

A branch that has met the canonical boundaries again and shared `rejoin_after_tokens` canonical tokens is not expanded
further: its weight joins the canonical row that ends there. From then on the two differ only in the segmentation of
distant earlier text. Without threshold, width and merging, the covering holds every tokenization, and the targets are
exact.

Weights are natural logs throughout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.config import CoveringConfig
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.path_weights import ContinuationMass, Edges, PathRows, Weights, weigh
from pipeline.covering.targets import Targets


class Branch(NamedTuple):
    """A row not computed yet: the path of row `row`, then `token`, which ends at byte `end`."""

    row: int
    token: int
    end: int
    edge: int  # its number among the edges of all rows


class Path(NamedTuple):
    """A path of tokens: the first `num_canonical` of the canonical path, then `tokens`."""

    num_canonical: int
    tokens: tuple[int, ...]


class _Rows(NamedTuple):
    """Rows R with edges E (tokens that end along the document) and continuations H (mass that goes on how far), flat.

    `shared` is the number of canonical tokens that a path has shared since it met the canonical boundaries; -1 off
    them.
    """

    offset_R: np.ndarray
    shared_R: np.ndarray
    is_branch_R: np.ndarray
    row_E: np.ndarray
    end_E: np.ndarray
    token_E: np.ndarray
    log_prob_E: np.ndarray
    shared_E: np.ndarray
    child_E: np.ndarray  # the row that the edge leads to; -1 if there is none yet
    row_H: np.ndarray
    offset_H: np.ndarray
    log_mass_H: np.ndarray

    def joined(self, other: "_Rows") -> "_Rows":
        return _Rows(*map(np.concatenate, zip(self, other, strict=True)))


class Branching:
    """The canonical and branch rows of one document, added as they are computed.

    Args:
        covering: the document's covering, which gives the column ranges of any offset.
        tokens: ids of the canonical encoding.
    """

    def __init__(self, covering: Covering, tokens: Sequence[int], config: CoveringConfig) -> None:
        self.covering, self._config = covering, config
        num_positions = len(covering.document) + 1
        self._boundary_P = np.full(num_positions, -1)  # the canonical row that starts there
        self._boundary_P[covering.offsets] = np.arange(len(covering.offsets))
        self._next_token_P = np.full(num_positions, -1)  # of the canonical encoding
        self._next_token_P[covering.offsets[:-1]] = tokens
        self._reduced: list[ReducedRow] = []
        self._paths: list[Path] = []
        self._rows: _Rows | None = None
        self._weights: Weights | None = None

    @property
    def num_branch_rows(self) -> int:
        return len(self._reduced) - len(self.covering.offsets)

    @property
    def canonical_rows(self) -> list[ReducedRow]:
        return self._reduced[: len(self.covering.offsets)]

    def add_canonical(self, rows: Sequence[ReducedRow]) -> None:
        """Add the canonical rows, in order. They must be added first."""
        paths = [Path(num_canonical, ()) for num_canonical in range(len(rows))]
        self._add(rows, self.covering.offsets, paths, np.zeros(len(rows), dtype=np.int64), are_branches=False)

    def add(self, branches: Sequence[Branch], rows: Sequence[ReducedRow]) -> None:
        """Add the rows of branches that `branches_to_expand` returned."""
        assert self._rows is not None, "the canonical rows come first"
        edges = [branch.edge for branch in branches]
        self._rows.child_E[edges] = len(self._reduced) + np.arange(len(rows))
        offsets = np.array([branch.end for branch in branches])
        paths = [self.path(branch) for branch in branches]
        self._add(rows, offsets, paths, self._rows.shared_E[edges], are_branches=True)

    def path(self, branch: Branch) -> Path:
        """Return the path of a branch's row."""
        num_canonical, tokens = self._paths[branch.row]
        return Path(num_canonical, (*tokens, branch.token))

    def _add(
        self,
        rows: Sequence[ReducedRow],
        offset_R: np.ndarray,
        paths: Sequence[Path],
        shared_R: np.ndarray,
        are_branches: bool,
    ) -> None:
        steps = self.covering.steps(rows, offset_R)
        offset_E = offset_R[steps.row_E]
        is_canonical_step_E = self._next_token_P[offset_E] == steps.token_E
        shared_E = np.where(is_canonical_step_E & (shared_R[steps.row_E] >= 0), shared_R[steps.row_E] + 1, 0)
        shared_E[self._boundary_P[steps.end_E] < 0] = -1
        joins_E = np.zeros(len(offset_E), dtype=bool) if are_branches else is_canonical_step_E
        if self._config.rejoin_after_tokens is not None:
            joins_E = joins_E | (shared_E >= self._config.rejoin_after_tokens)
        first = len(self._reduced)
        new = _Rows(
            offset_R,
            shared_R,
            np.full(len(rows), are_branches),
            first + steps.row_E,
            steps.end_E,
            steps.token_E,
            steps.log_prob_E,
            shared_E,
            np.where(joins_E, self._boundary_P[steps.end_E], -1),
            first + steps.row_H,
            steps.offset_H,
            steps.log_mass_H,
        )
        self._rows = new if self._rows is None else self._rows.joined(new)
        self._reduced += rows
        self._paths += paths
        self._weights = None

    def branches_to_expand(self) -> list[Branch]:
        """List the branches to expand, given the rows so far; a round of expansion may add more; empty at the end."""
        rows = self._rows
        assert rows is not None, "the canonical rows come first"
        edges = np.flatnonzero(self._weigh().wanted_E)
        columns = (rows.row_E[edges], rows.token_E[edges], rows.end_E[edges], edges)
        return [Branch(*branch) for branch in zip(*(column.tolist() for column in columns), strict=True)]

    def _weigh(self) -> Weights:
        if self._weights is None:
            rows, config = self._rows, self._config
            assert rows is not None, "the canonical rows come first"
            at = np.arange(len(rows.offset_R) + 1)
            self._weights = weigh(
                PathRows(rows.offset_R, rows.is_branch_R),
                Edges(rows.end_E, rows.log_prob_E, rows.child_E, np.searchsorted(rows.row_E, at)),
                ContinuationMass(rows.offset_H, rows.log_mass_H, np.searchsorted(rows.row_H, at)),
                config.branch_threshold,
                config.beam_width,
                len(self.covering.document) + 1,
            )
        return self._weights

    def off_boundaries(self) -> list[ReducedRow]:
        """Return the branch rows that start where the canonical encoding has no boundary."""
        rows = self._reduced[len(self.covering.offsets) :]
        return [row for row in rows if self._boundary_P[row.offset] < 0]

    def targets(self) -> Targets:
        """Compute the covering's targets over all rows added."""
        weights = self._weigh()
        return self.covering.weighted_targets(self._reduced, weights.log_weight_R, weights.log_continued_P)
