"""The covering: teacher rows summed into next-symbol distributions, exactly.

A row is a forward position; its path ends at byte offset `o_r` and has log-weight `log W_r`. At position i the target
is

    sum over rows with o_r <= i of  W_r * M_r(b[o_r:i] c)  / K_i

where M_r(x) is the row's mass on tokens whose bytes start with x. What a row contributes depends on its offset alone:
the column ranges of the byte prefixes that the document goes on with from there (`Intervals`). Summing a row's softmax
over them is the engines' work (`stage1_teacher.reduction.reducer`, or the slow twin here); this module knows nothing of
engines. Canonical rows only: the path of row r is the first r tokens of the tokenizer's own encoding.
`pipeline.covering.branches` adds others.

Shape legend: R rows (tokens + 1), C sorted columns, P positions (bytes + 1), V symbols (256), N nodes of all rows in
turn, the deepest of a row first, K cuts of all nodes in turn, I intervals of all nodes in turn (a node's cuts less
one).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.covering.intervals import Intervals, exact_intervals
from pipeline.covering.sums_numba import add_up
from pipeline.covering.targets import Targets, doubt
from pipeline.covering.vocabulary import Vocabulary
from schemas import ARITHMETIC, END, NUM_SYMBOLS

# logits further below the row's largest count as this: exp stays a normal float32, and masses below 1e-34 matter to
# nobody
MIN_LOGIT = -80.0


class ReducedRow(NamedTuple):
    """A row after its softmax is summed into the intervals of its offset; probabilities, float64."""

    offset: int
    masses_I: np.ndarray
    end: float
    token: float  # of the canonical token that follows; nan where none does


class Steps(NamedTuple):
    """What some rows have along the document, row by row: edges E, one for each token that ends there, and reaches H.

    Only what has any probability; logs are natural.
    """

    row_E: np.ndarray  # its place among the rows asked for
    end_E: np.ndarray
    token_E: np.ndarray
    log_prob_E: np.ndarray
    row_H: np.ndarray
    offset_H: np.ndarray  # past the row's own
    log_mass_H: np.ndarray  # on tokens that go on as the document does at least to there


class Covering:
    """Which column ranges a row of a document contributes, and where to. Made before the teacher runs.

    Args:
        vocabulary: of the teacher.
        tokens: ids of the tokenizer's own encoding; together they spell `document`.
        document: the bytes, the tokenizer's prefix included.
        arithmetic: which version of it the targets follow (`schemas.ARITHMETIC`).
    """

    def __init__(
        self, vocabulary: Vocabulary, tokens: Sequence[int], document: bytes, arithmetic: int = ARITHMETIC
    ) -> None:
        self.vocabulary, self._arithmetic = vocabulary, arithmetic
        self.document = document
        columns = vocabulary.column[np.asarray(tokens, dtype=np.int64)]
        self.offsets = np.concatenate([[0], np.cumsum(vocabulary.lengths[columns])])  # R: o_r of the canonical rows
        if int(self.offsets[-1]) != len(document):
            raise ValueError(f"tokens spell {int(self.offsets[-1])} bytes, the document has {len(document)}")
        self._columns = np.array([*columns, -1], dtype=np.int64)  # R: of the token that follows each canonical row

    def intervals(self, offsets: Sequence[int] | np.ndarray) -> Intervals:
        """Return what rows that end at these byte offsets are summed over: canonical offsets or any others, in any
        order.
        """
        if offsets is self.offsets:
            return self.canonical
        offsets_R = np.asarray(offsets, dtype=np.int64)
        at_R = np.searchsorted(self.offsets, offsets_R)
        columns_R = np.where(self.offsets[at_R] == offsets_R, self._columns[at_R], -1)
        return Intervals.along(self.vocabulary.trie, self.document, offsets_R, columns_R)

    @cached_property
    def canonical(self) -> Intervals:
        """What the canonical rows are summed over."""
        return Intervals.along(self.vocabulary.trie, self.document, self.offsets, self._columns)

    def reduce_rows(self, offsets: Sequence[int] | np.ndarray, probs_RC: Iterable[np.ndarray]) -> list[ReducedRow]:
        """Masses of the rows that end at `offsets`; the slow twin of `stage1_teacher.reduction.reducer`, in float64.

        Args:
            probs_RC: unnormalised probabilities in sorted columns, float32 or float64, row by row, and one more column
                that feeds no symbol: it holds 0, or what lies on tokens that are in no column
                (`pipeline.covering.truncated_rows`).
        """
        vocabulary, intervals = self.vocabulary, self.intervals(offsets)
        first_I, last_I = intervals.column_ranges()
        bounds = intervals.row_intervals.tolist()
        reduced = []
        for row, (probs_C, (first, last)) in enumerate(zip(probs_RC, pairwise(bounds), strict=True)):
            # From each interval's first column to its last, and on to the next interval's first: the sums in between
            # are left out.
            edges = np.stack([first_I[first:last], last_I[first:last]], axis=1).ravel()
            sums = np.add.reduceat(probs_C, edges, dtype=np.float64)[::2] if len(edges) else np.empty(0)
            total = float(probs_C.sum(dtype=np.float64))
            ends = slice(vocabulary.num_spelling, vocabulary.num_spelling + vocabulary.num_end)
            column = int(intervals.columns_R[row])
            reduced.append(
                ReducedRow(
                    int(intervals.offsets_R[row]),
                    sums / total,
                    float(probs_C[ends].sum(dtype=np.float64)) / total,
                    float(probs_C[column]) / total if column >= 0 else float("nan"),
                )
            )
        return reduced

    def targets(self, rows: Iterable[ReducedRow]) -> Targets:
        """Sum the canonical rows, reduced and in order, into the targets."""
        reduced = list(rows)
        token_logprobs = np.log(np.array([row.token for row in reduced[:-1]]))
        log_weight_R = np.concatenate([[0.0], np.cumsum(token_logprobs)])
        log_continued_P = np.full(len(self.document) + 1, -np.inf)
        log_continued_P[self.offsets] = log_weight_R
        return self._sum(self.canonical, reduced, log_weight_R, log_continued_P)

    def weighted_targets(
        self, rows: Sequence[ReducedRow], log_weight_R: np.ndarray, log_continued_P: np.ndarray
    ) -> Targets:
        """Sum any rows, the canonical ones first and in order, into the targets.

        Args:
            log_weight_R: the rows' weights.
            log_continued_P: weight of all rows that start at each offset; -inf where none does.
        """
        return self._sum(self.intervals([row.offset for row in rows]), rows, log_weight_R, log_continued_P)

    def steps(self, rows: Sequence[ReducedRow], offsets: Sequence[int] | np.ndarray) -> Steps:
        """Where the tokens of rows that end at `offsets` end along the document, and how much of each row goes on how
        far.
        """
        intervals = self.intervals(offsets)
        masses_I = np.concatenate([row.masses_I for row in rows])
        row_N = np.arange(len(rows)).repeat(np.diff(intervals.row_nodes))
        exact_N, exact_I = exact_intervals(intervals)
        sizes_N = intervals.node_sizes
        total_N = np.add.reduceat(masses_I, sizes_N.cumsum() - sizes_N)
        goes_on_N = (intervals.positions_N > intervals.offsets_R[row_N]) & (total_N > 0)  # the root goes nowhere yet
        ends_E = masses_I[exact_I] > 0
        exact_N, exact_I = exact_N[ends_E], exact_I[ends_E]
        return Steps(
            row_N[exact_N],
            intervals.positions_N[exact_N],
            self.vocabulary.order[intervals.column_ranges()[0][exact_I]],
            np.log(masses_I[exact_I]),
            row_N[goes_on_N],
            intervals.positions_N[goes_on_N],
            np.log(total_N[goes_on_N]),
        )

    def _sum(
        self, intervals: Intervals, rows: Sequence[ReducedRow], log_weight_R: np.ndarray, log_continued_P: np.ndarray
    ) -> Targets:
        num_positions = len(self.document) + 1
        end_R = np.array([row.end for row in rows])
        log_weight_N = log_weight_R.repeat(np.diff(intervals.row_nodes))
        num_exact_N, positions_N = intervals.node_exact, intervals.positions_N
        log_scale_P = self._log_scale(intervals, log_weight_N)
        # A token that ends at position i belongs to the mass known just before i, and feeds no symbol.
        has_exact_N = num_exact_N > 0
        ended_scale_N = np.zeros(len(positions_N))
        ended_scale_N[has_exact_N] = np.exp(log_weight_N[has_exact_N] - log_scale_P[positions_N[has_exact_N] - 1])
        mass_PV, ended_P = np.zeros((num_positions, NUM_SYMBOLS)), np.zeros(num_positions)
        add_up(
            intervals.trie,
            intervals.nodes_N,
            positions_N,
            np.concatenate([row.masses_I for row in rows]),
            np.exp(log_weight_N - log_scale_P[positions_N]),
            ended_scale_N,
            mass_PV,
            ended_P,
        )
        np.add.at(mass_PV[:, END], intervals.offsets_R, end_R * np.exp(log_weight_R - log_scale_P[intervals.offsets_R]))
        prefix_mass_P = mass_PV.sum(axis=1)
        np.divide(mass_PV, prefix_mass_P[:, None], out=mass_PV)

        # Shares of what is known just before each position, which is what the position before has on the document's
        # symbol.
        realised_P = mass_PV[np.arange(num_positions - 1), np.frombuffer(self.document, dtype=np.uint8)]
        known_P = realised_P * prefix_mass_P[:-1]
        continued_P = np.exp(log_continued_P[1:] - log_scale_P[:-1])
        dropped_P = np.concatenate([[0.0], np.clip((ended_P[1:] - continued_P) / known_P, 0.0, 1.0)])
        share_P = np.concatenate([[0.0], np.clip(ended_P[1:] / known_P, 0.0, 1.0)])
        return Targets(
            mass_PV,
            np.log(prefix_mass_P) + log_scale_P,
            dropped_P,
            self._since_token_start(share_P),
            doubt(dropped_P, realised_P, self._arithmetic),
            np.log(np.array([row.token for row in rows[: len(self.offsets) - 1]])),
        )

    def _log_scale(self, intervals: Intervals, log_weight_N: np.ndarray) -> np.ndarray:
        """P: the log-weight of the heaviest row that has tokens reaching past each position.

        Weights relative to it do not underflow, however long the document.
        """
        log_scale_P = np.full(len(self.document) + 1, -np.inf)
        reaches_N = intervals.node_sizes > intervals.node_exact
        np.maximum.at(log_scale_P, intervals.positions_N[reaches_N], log_weight_N[reaches_N])
        return log_scale_P

    def _since_token_start(self, share_P: np.ndarray) -> np.ndarray:
        """Running maximum since the canonical token began; 0 there."""
        maximum_P = np.zeros_like(share_P)
        starts, lengths = self.offsets[:-1], np.diff(self.offsets)
        for depth in range(1, int(lengths.max(initial=0))):
            inside = starts[lengths > depth] + depth
            maximum_P[inside] = np.maximum(maximum_P[inside - 1], share_P[inside])
        return maximum_P


def unnormalised(logits_RC: np.ndarray) -> np.ndarray:
    """exp(logits - max) with one zero column appended, as `Covering.reduce_rows` wants it."""
    shifted = np.maximum(logits_RC - logits_RC.max(axis=1, keepdims=True), MIN_LOGIT)
    return np.concatenate([np.exp(shifted), np.zeros((len(logits_RC), 1), dtype=shifted.dtype)], axis=1)
