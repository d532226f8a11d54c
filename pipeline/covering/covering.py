"""Covering: teacher rows summed exactly into next-symbol distributions.

A row is a forward position; its path ends at byte offset `o_r` and has log-weight `log W_r`. The target at position i
is

    sum over rows with o_r <= i of  W_r * M_r(b[o_r:i] c)  / K_i

where M_r(x) is the row's mass on tokens whose bytes start with x. A row's contribution depends only on its offset: the
column ranges of the byte prefixes with which the document continues from there (`Intervals`). A row's softmax is summed
over them by `stage1_teacher.reduction.reducer`, or by the slow twin here; this module does not depend on engines. It
covers canonical rows: the path of row r is the first r tokens of the tokenizer's own encoding.
`pipeline.covering.branches` adds others.

Shape legend: R rows (tokens + 1), C sorted columns, P positions (bytes + 1), V symbols (256), N nodes of all rows in
order, a row's deepest first, K cuts of all nodes in order, I intervals of all nodes in order (a node's cuts minus one).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.covering.intervals import Intervals, complete_intervals
from pipeline.covering.sums_numba import add_up
from pipeline.covering.targets import Targets, doubt
from pipeline.covering.vocabulary import Vocabulary
from schemas import ARITHMETIC, END, NUM_SYMBOLS

# Logits further below the row's maximum are clamped to this: exp stays a normal float32, and masses below 1e-34 do not
# matter.
MIN_LOGIT = -80.0

NO_IDS, NO_LOGPROBS = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)


class ReducedRow(NamedTuple):
    """A row whose softmax has been summed into the intervals of its offset; probabilities, float64.

    Attributes:
        token: of the canonical token that follows; nan if none does.
        top_ids_K: the most probable token ids, if any were requested: int32, in descending probability.
        top_logprobs_K: their log-probabilities, float32.
    """

    offset: int
    masses_I: np.ndarray
    end: float
    token: float
    top_ids_K: np.ndarray = NO_IDS
    top_logprobs_K: np.ndarray = NO_LOGPROBS


class Steps(NamedTuple):
    """Continuations of some rows along the document, row by row.

    Edges E are the tokens that end along it, continuations H the offsets that tokens reach. Only those with probability
    above 0; logs are natural.
    """

    row_E: np.ndarray  # index among the requested rows
    end_E: np.ndarray
    token_E: np.ndarray
    log_prob_E: np.ndarray
    row_H: np.ndarray
    offset_H: np.ndarray  # beyond the row's own offset
    log_mass_H: np.ndarray  # on tokens that continue as the document does, at least up to there


class Covering:
    """The column ranges that each row of a document contributes, and to which positions. Made before the teacher runs.

    Args:
        vocabulary: the teacher's vocabulary.
        tokens: ids of the tokenizer's own encoding; together they spell `document`.
        document: the bytes, including the tokenizer's prefix.
        arithmetic: version of the arithmetic that the targets follow (`schemas.ARITHMETIC`).
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
        self._columns = np.array(
            [*columns, -1], dtype=np.int64
        )  # R: column of the token that follows each canonical row

    def intervals(self, offsets: Sequence[int] | np.ndarray) -> Intervals:
        """Return the intervals of rows that end at these byte offsets: canonical or any others, in any order."""
        if offsets is self.offsets:
            return self.canonical
        offsets_R = np.asarray(offsets, dtype=np.int64)
        at_R = np.searchsorted(self.offsets, offsets_R)
        columns_R = np.where(self.offsets[at_R] == offsets_R, self._columns[at_R], -1)
        return Intervals.along(self.vocabulary.trie, self.document, offsets_R, columns_R)

    @cached_property
    def canonical(self) -> Intervals:
        """Return the intervals of the canonical rows."""
        return Intervals.along(self.vocabulary.trie, self.document, self.offsets, self._columns)

    def reduce_rows(self, offsets: Sequence[int] | np.ndarray, probs_RC: Iterable[np.ndarray]) -> list[ReducedRow]:
        """Reduce the rows that end at `offsets`, in float64; the slow twin of `stage1_teacher.reduction.reducer`.

        Args:
            probs_RC: unnormalised probabilities (`exp_logits`) in sorted columns, float32 or float64, row by row,
                with one more column that feeds no symbol: it holds 0, or the mass of tokens without a column
                (`pipeline.covering.truncated_rows`).
        """
        return reduce_probs(self.vocabulary, self.intervals(offsets), probs_RC)

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
            log_continued_P: weight of all rows that start at each offset; -inf if none does.
        """
        return self._sum(self.intervals([row.offset for row in rows]), rows, log_weight_R, log_continued_P)

    def steps(self, rows: Sequence[ReducedRow], offsets: Sequence[int] | np.ndarray) -> Steps:
        """Find where tokens of rows that end at `offsets` end along the document, and how far each row's mass goes."""
        intervals = self.intervals(offsets)
        masses_I = np.concatenate([row.masses_I for row in rows])
        row_N = np.arange(len(rows)).repeat(np.diff(intervals.row_nodes))
        complete_N, complete_I = complete_intervals(intervals)
        sizes_N = intervals.node_sizes
        total_N = np.add.reduceat(masses_I, sizes_N.cumsum() - sizes_N)
        goes_on_N = (intervals.positions_N > intervals.offsets_R[row_N]) & (
            total_N > 0
        )  # the root does not continue yet
        ends_E = masses_I[complete_I] > 0
        complete_N, complete_I = complete_N[ends_E], complete_I[ends_E]
        return Steps(
            row_N[complete_N],
            intervals.positions_N[complete_N],
            self.vocabulary.order[intervals.column_ranges()[0][complete_I]],
            np.log(masses_I[complete_I]),
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
        num_complete_N, positions_N = intervals.node_complete, intervals.positions_N
        log_scale_P = self._log_scale(intervals, log_weight_N)
        # A token that ends at position i belongs to the mass known just before i, and feeds no symbol.
        has_complete_N = num_complete_N > 0
        ended_scale_N = np.zeros(len(positions_N))
        ended_scale_N[has_complete_N] = np.exp(
            log_weight_N[has_complete_N] - log_scale_P[positions_N[has_complete_N] - 1]
        )
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

        # Shares of the mass known just before each position: the previous position's mass on the document's symbol.
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
        """Return, for each position P, the log-weight of the heaviest row with tokens that reach beyond it.

        Weights relative to it do not underflow, however long the document.
        """
        log_scale_P = np.full(len(self.document) + 1, -np.inf)
        reaches_N = intervals.node_sizes > intervals.node_complete
        np.maximum.at(log_scale_P, intervals.positions_N[reaches_N], log_weight_N[reaches_N])
        return log_scale_P

    def _since_token_start(self, share_P: np.ndarray) -> np.ndarray:
        """Return the running maximum since the canonical token began; 0 at its start."""
        maximum_P = np.zeros_like(share_P)
        starts, lengths = self.offsets[:-1], np.diff(self.offsets)
        for depth in range(1, int(lengths.max(initial=0))):
            inside = starts[lengths > depth] + depth
            maximum_P[inside] = np.maximum(maximum_P[inside - 1], share_P[inside])
        return maximum_P


def reduce_probs(vocabulary: Vocabulary, intervals: Intervals, probs_RC: Iterable[np.ndarray]) -> list[ReducedRow]:
    """Sum rows of unnormalised probabilities over their intervals, in float64; see `Covering.reduce_rows`."""
    first_I, last_I = intervals.column_ranges()
    bounds = intervals.row_intervals.tolist()
    reduced = []
    for row, (probs_C, (first, last)) in enumerate(zip(probs_RC, pairwise(bounds), strict=True)):
        # Sums from each interval's first column to its last, and from there to the next interval's first; the latter
        # are discarded.
        edges = np.stack([first_I[first:last], last_I[first:last]], axis=1).ravel()
        sums = np.add.reduceat(probs_C, edges, dtype=np.float64)[::2] if len(edges) else np.empty(0)
        total = float(probs_C.sum(dtype=np.float64))
        ends = slice(vocabulary.num_text_tokens, vocabulary.num_text_tokens + vocabulary.num_end)
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


def exp_logits(logits_RC: np.ndarray) -> np.ndarray:
    """Compute exp(logits - max) with one zero column appended, as `Covering.reduce_rows` expects it."""
    shifted = np.maximum(logits_RC - logits_RC.max(axis=1, keepdims=True), MIN_LOGIT)
    return np.concatenate([np.exp(shifted), np.zeros((len(logits_RC), 1), dtype=shifted.dtype)], axis=1)
