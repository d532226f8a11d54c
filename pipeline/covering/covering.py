"""The covering: teacher rows summed into next-symbol distributions, exactly.

A row is a forward position; its path ends at byte offset `o_r` and has log-weight `log W_r`. At position i the target is

    sum over rows with o_r <= i of  W_r * M_r(b[o_r:i] c)  / K_i

where M_r(x) is the row's mass on tokens whose bytes start with x. What a row contributes depends on its offset alone: the column
ranges of the byte prefixes that the document goes on with from there (`Intervals`). Summing a row's softmax over them is the
engines' work (`stage1_teacher.reduction.reducer`, or the slow twin here); this module knows nothing of engines. Canonical rows only: the
path of row r is the first r tokens of the tokenizer's own encoding. `pipeline.covering.branches` adds others.

Shape legend: R rows (tokens + 1), C sorted columns, P positions (bytes + 1), V symbols (256), N nodes of all rows in turn, the
deepest of a row first, K cuts of all nodes in turn, I intervals of all nodes in turn (a node's cuts less one).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipeline.covering.intervals import Intervals, exact_intervals
from pipeline.covering.targets import Targets, doubt
from pipeline.covering.vocabulary import Vocabulary
from schemas import ARITHMETIC, END, NUM_SYMBOLS

MIN_LOGIT = -80.0  # logits further below the row's largest count as this: exp stays a normal float32, and masses below 1e-34 matter to nobody


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
        columns = vocabulary.column[np.asarray(tokens, dtype=np.int64)].tolist()
        lengths = np.array([len(vocabulary.sorted_bytes[c]) for c in columns], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])  # R: o_r of the canonical rows
        if int(self.offsets[-1]) != len(document):
            raise ValueError(f"tokens spell {int(self.offsets[-1])} bytes, the document has {len(document)}")
        self._next_column = dict(zip(self.offsets.tolist(), columns, strict=False))

    def intervals(self, offsets: Sequence[int] | np.ndarray) -> Intervals:
        """What rows that end at these byte offsets are summed over: canonical offsets or any others, in any order."""
        return self.canonical if offsets is self.offsets else self._intervals(offsets)

    def _intervals(self, offsets: Sequence[int] | np.ndarray) -> Intervals:
        offsets_R, trie = np.asarray(offsets, dtype=np.int64), self.vocabulary.trie
        row_nodes, heights_N, node_N = self._nodes(offsets_R)
        sizes_N, interval_I = trie.sizes(node_N), trie.intervals(node_N)
        ends_N = sizes_N.cumsum()
        return Intervals(
            cuts_K=np.insert(trie.first_J[interval_I], ends_N, trie.last_J[interval_I[ends_N - 1]]).astype(np.int64),
            node_cuts=np.append(0, ends_N + np.arange(1, len(node_N) + 1)),
            row_nodes=row_nodes,
            positions_N=offsets_R.repeat(np.diff(row_nodes)) + heights_N,
            num_exact_N=trie.num_exact_N[node_N],
            offsets_R=offsets_R,
            columns_R=np.array([self._next_column.get(offset, -1) for offset in offsets_R.tolist()], dtype=np.int64),
        )

    def _nodes(self, offsets_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(where each row's nodes begin, R + 1; of each node how many bytes it spells; its number in the trie), the deepest of a row first."""
        text = np.frombuffer(self.document, dtype=np.uint8)
        num_nodes_R, node_N = self.vocabulary.trie.walk(text, offsets_R, np.full(len(offsets_R), len(text)))
        row_nodes = np.append(0, num_nodes_R.cumsum())
        heights_N = row_nodes[1:].repeat(num_nodes_R) - 1 - np.arange(len(node_N))
        return row_nodes, heights_N, node_N[row_nodes[:-1].repeat(num_nodes_R) + heights_N]

    def labels(self, offsets: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of each of `intervals(offsets)` the symbol that it feeds, int64; 0 for an exact one."""
        return self.vocabulary.trie.labels(self._nodes(np.asarray(offsets, dtype=np.int64))[2])

    @cached_property
    def canonical(self) -> Intervals:
        """What the canonical rows are summed over."""
        return self._intervals(self.offsets)

    def reduce_rows(self, offsets: Sequence[int] | np.ndarray, probs_RC: Iterable[np.ndarray]) -> list[ReducedRow]:
        """Masses of the rows that end at `offsets`; the slow twin of `stage1_teacher.reduction.reducer`, in float64.

        Args:
            probs_RC: unnormalised probabilities in sorted columns, float32 or float64, row by row, and one more column that
                feeds no symbol: it holds 0, or what lies on tokens that are in no column (`pipeline.covering.truncated_rows`).
        """
        vocabulary, intervals = self.vocabulary, self.intervals(offsets)
        reduced = []
        for row, probs_C in enumerate(probs_RC):
            first, last = intervals.row_nodes[row], intervals.row_nodes[row + 1]
            node_cuts = intervals.node_cuts[first : last + 1]
            # One call: within a node, consecutive cuts give its intervals. From a node's last cut to the next node's first the
            # columns go down, and reduceat returns a single element; after the last node, the root, it sums what feeds no
            # symbol. Both are left out of the masses. The sums are float64 whatever the input.
            sums = np.add.reduceat(probs_C, intervals.cuts_K[node_cuts[0] : node_cuts[-1]], dtype=np.float64)
            total = float(sums[node_cuts[-2] - node_cuts[0] :].sum())
            ends = slice(vocabulary.num_spelling, vocabulary.num_spelling + vocabulary.num_end)
            column = int(intervals.columns_R[row])
            reduced.append(
                ReducedRow(
                    int(intervals.offsets_R[row]),
                    np.delete(sums, node_cuts[1:] - node_cuts[0] - 1) / total,
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
        """Where the tokens of rows that end at `offsets` end along the document, and how much of each row goes on how far."""
        intervals = self.intervals(offsets)
        masses_I = np.concatenate([row.masses_I for row in rows])
        row_N = np.arange(len(rows)).repeat(np.diff(intervals.row_nodes))
        exact_N, exact_I = exact_intervals(intervals)
        total_N = np.add.reduceat(masses_I, intervals.node_cuts[:-1] - np.arange(len(row_N)))
        goes_on_N = (intervals.positions_N > intervals.offsets_R[row_N]) & (total_N > 0)  # the root goes nowhere yet
        ends_E = masses_I[exact_I] > 0
        exact_N, exact_I = exact_N[ends_E], exact_I[ends_E]
        return Steps(
            row_N[exact_N],
            intervals.positions_N[exact_N],
            self.vocabulary.order[intervals.cuts_K[exact_I + exact_N]],
            np.log(masses_I[exact_I]),
            row_N[goes_on_N],
            intervals.positions_N[goes_on_N],
            np.log(total_N[goes_on_N]),
        )

    def _sum(
        self, intervals: Intervals, rows: Sequence[ReducedRow], log_weight_R: np.ndarray, log_continued_P: np.ndarray
    ) -> Targets:
        num_positions = len(self.document) + 1
        masses_I = np.concatenate([row.masses_I for row in rows])
        end_R = np.array([row.end for row in rows])
        log_weight_N = log_weight_R.repeat(np.diff(intervals.row_nodes))
        sizes_N = np.diff(intervals.node_cuts) - 1
        log_scale_P = self._log_scale(intervals, sizes_N, log_weight_N)

        # An exact interval at position i belongs to the mass known just before i, and feeds no symbol.
        exact_N, exact_I = exact_intervals(intervals)
        exact_position = intervals.positions_N[exact_N]
        ended = masses_I[exact_I] * np.exp(log_weight_N[exact_N] - log_scale_P[exact_position - 1])
        ended_P = np.bincount(exact_position, ended, num_positions).astype(np.float64)  # int64 where there are none

        weighted_I = masses_I * np.exp(log_weight_N - log_scale_P[intervals.positions_N]).repeat(sizes_N)
        weighted_I[exact_I] = 0.0
        flat_I = (intervals.positions_N * NUM_SYMBOLS).repeat(sizes_N)
        flat_I += self.labels([row.offset for row in rows])
        mass_PV = np.bincount(flat_I, weighted_I, num_positions * NUM_SYMBOLS).reshape(num_positions, NUM_SYMBOLS)
        np.add.at(mass_PV[:, END], intervals.offsets_R, end_R * np.exp(log_weight_R - log_scale_P[intervals.offsets_R]))
        prefix_mass_P = mass_PV.sum(axis=1)
        np.divide(mass_PV, prefix_mass_P[:, None], out=mass_PV)

        # Shares of what is known just before each position, which is what the position before has on the document's symbol.
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

    def _log_scale(self, intervals: Intervals, sizes_N: np.ndarray, log_weight_N: np.ndarray) -> np.ndarray:
        """P: the log-weight of the heaviest row that has tokens reaching past each position.

        Weights relative to it do not underflow, however long the document.
        """
        log_scale_P = np.full(len(self.document) + 1, -np.inf)
        reaches_N = sizes_N > intervals.num_exact_N
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
