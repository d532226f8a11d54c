"""Truncated rows: only their most probable tokens are known, as from a teacher behind an HTTP server.

For each row the server lists its `top_k` most probable tokens and the token that actually follows, with their absolute
log-probabilities. Of the rest of the softmax, the row's unlisted mass `m_r`, only the sum is known. It is never
redistributed among the listed tokens: it feeds no symbol, and is accounted for.

`dropped`: the row starts at offset `o_r`, where `W_r m_r` permanently leaves the known mass. So `dropped` grows at
`o_r` by `W_r m_r` relative to the mass known just before, and the balance at every offset is exact.

`doubt`: let `U_i` bound the unlisted mass that could have fed position i, beside the `K_i` that did. The target over
both is a mixture of the stored one, with share `K_i / (K_i + U_i)` or more, and something unknown: the total variation
between stored and full target is at most `U_i / (K_i + U_i)`. A row adds to `U_i` its `W_r` times the smaller of two
bounds:

- `m_r`, all of its unlisted mass;
- the row's k-th largest probability, which no unlisted token exceeds, times the number of unlisted tokens that agree
  with the document: those whose bytes continue beyond i, and those that ended since the canonical token began
  (branches that were not followed).

At its own offset every token of a row counts, so the bound is `m_r`. Deep inside a token few tokens still agree, and
the second bound is smaller. Unlisted tokens that ended before the canonical token began no longer count: hardly any
mass of a branch that is not followed continues as the document does (`pipeline.covering.targets.BRANCH_SURVIVAL`).

Shape legend: R rows, E listed entries of all rows in order, C sorted columns and one more, P positions, D depths below
a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipeline.covering.covering import MIN_LOGIT, Covering
from pipeline.covering.targets import Targets
from pipeline.covering.vocabulary import Vocabulary

_MAX_EXPONENT = 700.0  # its exp still fits a float64


@dataclass(frozen=True)
class ListedRows:
    """Tokens that a server lists for the rows of one prompt.

    Each row holds its `top_k` most probable tokens, and its next canonical token whether or not it is one of them.
    """

    counts_R: np.ndarray  # int64, entries of each row
    token_ids_E: np.ndarray  # int64
    logprobs_E: np.ndarray  # float64, nats; exp of a row's sums to 1 or less
    top_k: int

    def __getitem__(self, rows: slice) -> "ListedRows":
        """Return some consecutive rows of the prompt."""
        ends = np.concatenate([[0], np.cumsum(self.counts_R)])
        first, last, _ = rows.indices(len(self.counts_R))
        entries = slice(int(ends[first]), int(ends[last]))
        return ListedRows(self.counts_R[rows], self.token_ids_E[entries], self.logprobs_E[entries], self.top_k)

    def logprobs_of(self, tokens: Sequence[int]) -> np.ndarray:
        """Return, for each row (R), the log-probability in nats of a token that it lists."""
        row_E = np.repeat(np.arange(len(self.counts_R)), self.counts_R)
        return self.logprobs_E[self.token_ids_E == np.asarray(tokens, dtype=np.int64)[row_E]]


class _Row(NamedTuple):
    """One row in sorted columns."""

    columns: np.ndarray  # ascending; listed ids outside the vocabulary are left out: they spell nothing
    probs: np.ndarray  # float64
    unlisted: float  # m_r
    floor: float  # no unlisted token is more probable


def listed_targets(covering: Covering, listed: ListedRows) -> Targets:
    """Compute the covering's targets from listed tokens; `dropped` and `doubt` account for the unlisted mass."""
    assert len(listed.counts_R) == len(covering.offsets)
    rows = _sorted_rows(covering.vocabulary, listed)
    width = len(covering.vocabulary.order)
    targets = covering.targets(covering.reduce_rows(covering.offsets, _dense(rows, width)))
    log_weight_R = np.concatenate([[0.0], np.cumsum(targets.token_logprobs)])
    return replace(
        targets,
        dropped_P=_dropped(covering, targets, rows, log_weight_R),
        doubt_P=_doubt(covering, targets, rows, log_weight_R),
    )


def _sorted_rows(vocabulary: Vocabulary, listed: ListedRows) -> list[_Row]:
    rows, width = [], len(vocabulary.column)
    ends = np.cumsum(listed.counts_R)
    for start, end in zip(ends - listed.counts_R, ends, strict=True):
        ids = listed.token_ids_E[start:end]
        # The full path clamps logits too: a next token of probability 0 would leave nothing to divide by.
        probs = np.exp(np.maximum(listed.logprobs_E[start:end], MIN_LOGIT))
        rank = min(listed.top_k, len(probs))
        floor = float(np.partition(probs, len(probs) - rank)[len(probs) - rank])
        unlisted = max(0.0, 1.0 - float(probs.sum()))
        inside = ids < width
        columns, probs = vocabulary.column[ids[inside]], probs[inside]
        order = np.argsort(columns)
        rows.append(_Row(columns[order], probs[order], unlisted, floor))
    return rows


def _dense(rows: Sequence[_Row], width: int) -> Iterator[np.ndarray]:
    """Yield each row as C probabilities; the last holds mass without a column. The array is reused for the next row."""
    probs_C = np.zeros(width + 1)
    for row in rows:
        probs_C[row.columns] = row.probs
        probs_C[-1] = max(0.0, 1.0 - float(row.probs.sum()))
        yield probs_C
        probs_C[row.columns] = 0.0


def _dropped(covering: Covering, targets: Targets, rows: Sequence[_Row], log_weight_R: np.ndarray) -> np.ndarray:
    realised = np.frombuffer(covering.document, dtype=np.uint8)
    log_known_P = np.zeros(len(realised) + 1)
    log_known_P[1:] = targets.log_prefix_mass_P[:-1] + np.log(targets.probs_PV[np.arange(len(realised)), realised])
    dropped_P = targets.dropped_P.copy()
    unlisted_R = np.array([row.unlisted for row in rows])
    dropped_P[covering.offsets] += unlisted_R * np.exp(log_weight_R - log_known_P[covering.offsets])
    return np.clip(dropped_P, 0.0, 1.0)


def _doubt(covering: Covering, targets: Targets, rows: Sequence[_Row], log_weight_R: np.ndarray) -> np.ndarray:
    num_positions = len(covering.document) + 1
    # Begin and end of the canonical token that holds each position.
    token_P = np.searchsorted(covering.offsets, np.arange(num_positions), side="right")
    begin_P, end_P = covering.offsets[token_P - 1], np.append(covering.offsets, num_positions)[token_P]
    ratio_P = np.zeros(num_positions)  # U_i / K_i
    for index, row in enumerate(rows):
        mass_D = _reaching_mass(covering, index, row, begin_P, end_P)
        reached = slice(int(covering.offsets[index]), int(covering.offsets[index]) + len(mass_D))
        log_ratio_D = log_weight_R[index] - targets.log_prefix_mass_P[reached]
        ratio_P[reached] += mass_D * np.exp(np.minimum(log_ratio_D, _MAX_EXPONENT))
    return 1.0 - (1.0 - targets.doubt_P) / (1.0 + ratio_P)


def _reaching_mass(covering: Covering, index: int, row: _Row, begin_P: np.ndarray, end_P: np.ndarray) -> np.ndarray:
    """Bound a row's unlisted mass at each depth D: mass that may have fed the positions from its offset on.

    It includes mass that may have branched off on the way.
    """
    offset, intervals = int(covering.offsets[index]), covering.canonical
    trie = intervals.trie
    nodes_D = intervals.nodes_N[slice(*intervals.row_nodes[index : index + 2])][::-1]  # the root first
    start_D, end_D = trie.start_N[nodes_D], trie.start_N[nodes_D + 1]
    first_D, last_D = trie.first_J[start_D], trie.last_J[end_D - 1]
    longer_at_D = start_D + trie.num_complete_N[nodes_D]  # the first interval of tokens that continue, if any
    goes_on_D = longer_at_D < end_D
    longest_D = np.where(goes_on_D, trie.first_J[np.minimum(longer_at_D, end_D - 1)], last_D)
    cuts_3D = np.stack([first_D, longest_D, last_D])
    # Numbers of unlisted tokens that spell a node's bytes exactly, and of those that continue.
    complete_D, longer_D = np.diff(cuts_3D - np.searchsorted(row.columns, cuts_3D), axis=0)
    # A token that ended inside a canonical token counts up to the latter's end, even beyond this row's depth.
    more = int(end_P[offset + len(nodes_D) - 1]) - (offset + len(nodes_D))
    complete_D, longer_D = np.pad(complete_D, (0, more)), np.pad(longer_D, (0, more))
    ended_D = np.cumsum(complete_D)
    ended_D -= ended_D[begin_P[offset : offset + len(ended_D)] - offset]
    mass_D = np.minimum(row.unlisted, row.floor * (longer_D + ended_D))
    mass_D[0] = row.unlisted
    return mass_D
