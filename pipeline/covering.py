"""The covering: teacher rows summed into next-symbol distributions, exactly.

A row is a forward position; its path ends at byte offset `o_r` and has log-weight `log W_r`. At position i the target is

    sum over rows with o_r <= i of  W_r * M_r(b[o_r:i] c)  / K_i

where M_r(x) is the row's mass on tokens whose bytes start with x. This module knows nothing of engines: it takes each row's
unnormalised probabilities in sorted columns (`pipeline.vocabulary`). Canonical rows only: the path of row r is the first r tokens
of the tokenizer's own encoding.

Shape legend: R rows (tokens + 1), C sorted columns, P positions (bytes + 1), V symbols (256), I intervals of all visited nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.vocabulary import Node, Vocabulary
from schemas import END, NUM_SYMBOLS

MIN_LOGIT = -80.0  # logits further below the row's largest count as this: exp stays a normal float32, and masses below 1e-34 matter to nobody


@dataclass(frozen=True)
class Targets:
    """The covering's distributions at all positions of a document; float64.

    `dropped`, `token_end` and `doubt` are shares of the mass known just before a position, 0 at position 0.
    `log_prefix_mass` is the natural log of K_i.
    """

    probs_PV: np.ndarray
    log_prefix_mass_P: np.ndarray
    dropped_P: np.ndarray
    token_end_P: np.ndarray
    doubt_P: np.ndarray
    token_logprobs: np.ndarray  # R - 1, of the canonical tokens

    def drop_prefix(self, num_bytes: int) -> "Targets":
        """The targets after the first `num_bytes` positions: what a tokenizer puts before a document is known, not predicted."""
        return Targets(
            self.probs_PV[num_bytes:],
            self.log_prefix_mass_P[num_bytes:],
            self.dropped_P[num_bytes:],
            self.token_end_P[num_bytes:],
            self.doubt_P[num_bytes:],
            self.token_logprobs,
        )


class ReducedRow(NamedTuple):
    """A row after its softmax is summed into intervals; probabilities, float64."""

    masses_I: np.ndarray
    end: float
    token: float  # of the canonical token that follows; nan on the last row


class Covering:
    """Which column ranges each canonical row of a document contributes, and where to. Made before the teacher runs.

    Args:
        vocabulary: of the teacher.
        tokens: ids of the tokenizer's own encoding; together they spell `document`.
        document: the bytes, the tokenizer's prefix included.
    """

    def __init__(self, vocabulary: Vocabulary, tokens: Sequence[int], document: bytes) -> None:
        self.vocabulary = vocabulary
        self.document = document
        self.columns = vocabulary.column[np.asarray(tokens, dtype=np.int64)]
        self.lengths = np.array([len(vocabulary.sorted_bytes[c]) for c in self.columns], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # R: o_r
        if int(self.offsets[-1]) != len(document):
            raise ValueError(f"tokens spell {int(self.offsets[-1])} bytes, the document has {len(document)}")
        self._nodes: list[list[Node]] = [self._walk(int(offset)) for offset in self.offsets]

    @property
    def num_rows(self) -> int:
        return len(self.offsets)

    def nodes(self, row: int) -> list[Node]:
        """A row's nodes along the document: the deepest first, the root last."""
        return self._nodes[row]

    def _walk(self, offset: int) -> list[Node]:
        """Nodes along the document from `offset`, as deep as any token reaches; the deepest first, the root last."""
        vocabulary = self.vocabulary
        node, nodes = vocabulary.root, [vocabulary.root]
        for depth, byte in enumerate(self.document[offset:]):
            found = vocabulary.child(node, byte, depth)
            if found is None:
                break
            nodes.append(found)
            node = found
        return nodes[::-1]

    def reduce_row(self, row: int, probs_C: np.ndarray) -> ReducedRow:
        """A row's masses on the intervals of its nodes.

        Args:
            probs_C: unnormalised probabilities in sorted columns, float32 or float64, and one more column that feeds no
                symbol: it holds 0, or what lies on tokens that are in no column (`pipeline.listed`).
        """
        nodes, vocabulary = self._nodes[row], self.vocabulary
        cuts = np.concatenate([node.cuts for node in nodes])
        # One call: within a node, consecutive cuts give its intervals. From a node's last cut to the next node's first the
        # columns go down, and reduceat returns a single element; after the last node, the root, it sums what feeds no
        # symbol. Both are left out of the masses. The sums are float64 whatever the input.
        sums = np.add.reduceat(probs_C, cuts, dtype=np.float64)
        root_size = len(nodes[-1].cuts)
        total = float(sums[-root_size:].sum())
        end = float(
            probs_C[vocabulary.num_spelling : vocabulary.num_spelling + vocabulary.num_end].sum(dtype=np.float64)
        )
        keep = np.ones(len(cuts), dtype=bool)
        keep[np.cumsum([len(node.cuts) for node in nodes]) - 1] = False
        token = float(probs_C[self.columns[row]]) / total if row < len(self.columns) else float("nan")
        return ReducedRow(sums[keep] / total, end / total, token)

    def targets(self, rows: Iterable[ReducedRow]) -> Targets:
        """Sum the reduced rows, given in order, into the targets."""
        reduced = list(rows)
        masses_I = np.concatenate([row.masses_I for row in reduced])
        end_R = np.array([row.end for row in reduced])
        token_logprobs = np.log(np.array([row.token for row in reduced[:-1]]))
        log_weight_R = np.concatenate([[0.0], np.cumsum(token_logprobs)])
        return self._sum(masses_I, end_R, token_logprobs, log_weight_R)

    def _sum(
        self, masses_I: np.ndarray, end_R: np.ndarray, token_logprobs: np.ndarray, log_weight_R: np.ndarray
    ) -> Targets:
        row_I, position_I, symbol_I = self._interval_index()
        num_positions = len(self.document) + 1
        # Weights relative to the heaviest row that reaches a position, so that nothing underflows in a long document.
        first_row_P = self._first_row()
        log_scale_P = log_weight_R[first_row_P]
        exact = symbol_I < 0
        # An exact interval at position i belongs to the mass known just before i.
        scale_I = log_scale_P[np.where(exact, position_I - 1, position_I)]
        weighted_I = masses_I * np.exp(log_weight_R[row_I] - scale_I)
        flat_I = position_I * NUM_SYMBOLS + symbol_I
        mass_PV = np.bincount(flat_I[~exact], weighted_I[~exact], num_positions * NUM_SYMBOLS)
        mass_PV = mass_PV.reshape(num_positions, NUM_SYMBOLS)
        mass_PV[self.offsets, END] += end_R * np.exp(log_weight_R - log_scale_P[self.offsets])
        prefix_mass_P = mass_PV.sum(axis=1)

        ended_P = np.bincount(position_I[exact], weighted_I[exact], num_positions)
        canonical_P = np.zeros(num_positions)
        canonical_P[self.offsets[1:]] = np.exp(log_weight_R[1:] - log_scale_P[self.offsets[1:] - 1])
        known_P = np.ones(num_positions)
        known_P[1:] = mass_PV[np.arange(num_positions - 1), np.frombuffer(self.document, dtype=np.uint8)]
        dropped_P = np.clip((ended_P - canonical_P) / known_P, 0.0, 1.0)
        token_end_P, doubt_P = self._since_token_start(dropped_P)
        return Targets(
            mass_PV / prefix_mass_P[:, None],
            np.log(prefix_mass_P) + log_scale_P,
            dropped_P,
            token_end_P,
            doubt_P,
            token_logprobs,
        )

    def _interval_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, position, symbol or -1 for the exact interval) of each interval, in `reduce_row`'s order."""
        sizes, rows, positions, symbols = [], [], [], []
        exact = np.array([-1], dtype=np.int64)
        for row, nodes in enumerate(self._nodes):
            offset = int(self.offsets[row])
            for height, node in enumerate(nodes):
                sizes.append(len(node.cuts) - 1)
                rows.append(row)
                positions.append(offset + len(nodes) - 1 - height)
                if node.has_exact:
                    symbols.append(exact)
                symbols.append(node.symbols)
        return np.repeat(rows, sizes), np.repeat(positions, sizes), np.concatenate(symbols).astype(np.int64)

    def _first_row(self) -> np.ndarray:
        """P: the earliest row that has tokens reaching past each position; it is the heaviest."""
        first = np.full(len(self.document) + 1, self.num_rows, dtype=np.int64)
        for row in range(self.num_rows - 1, -1, -1):
            nodes = self._nodes[row]
            reach = len(nodes) - (len(nodes[0].symbols) == 0)
            first[int(self.offsets[row]) : int(self.offsets[row]) + reach] = row
        return first

    def _since_token_start(self, dropped_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Running maximum of the dropped share, and the share dropped in all, since the canonical token began; 0 there.

        The second is `doubt`: a branch that could have met the canonical boundary again continues almost as the canonical
        rows do, and is no error past it.
        """
        token_end_P, doubt_P = np.zeros_like(dropped_P), np.zeros_like(dropped_P)
        for start, end in pairwise(self.offsets.tolist()):
            if end - start > 1:
                inside = dropped_P[start + 1 : end]
                token_end_P[start + 1 : end] = np.maximum.accumulate(inside)
                doubt_P[start + 1 : end] = 1.0 - np.cumprod(1.0 - inside)
        return token_end_P, doubt_P


def unnormalised(logits_RC: np.ndarray) -> np.ndarray:
    """exp(logits - max) with one zero column appended, as `Covering.reduce_row` wants it; the slow twin of the engines' path."""
    shifted = np.maximum(logits_RC - logits_RC.max(axis=1, keepdims=True), MIN_LOGIT)
    return np.concatenate([np.exp(shifted), np.zeros((len(logits_RC), 1), dtype=shifted.dtype)], axis=1)
