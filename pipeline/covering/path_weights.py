"""Path weights of a document's rows, and the choice of branches to expand: one pass over the rows by offset.

Weight flows forward only: a row's weight is all that arrives by the tokens that end where it starts. The pass is
compiled by numba, because each round of expansion repeats it over the whole document; the slow twin is
`tests.support.slow_weighing`.

Shape legend: R rows, E edges (a row's tokens that spell the document's next bytes), H continuations (a row and an
offset that some of its tokens reach), P positions. All weights are natural logs.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit


class PathRows(NamedTuple):
    """Rows of a document; row 0 is at its start."""

    offset_R: np.ndarray  # where each row starts
    is_branch_R: np.ndarray  # bool


class Edges(NamedTuple):
    """Tokens that end along the document, row by row."""

    end_E: np.ndarray  # the byte offset
    log_prob_E: np.ndarray
    child_E: np.ndarray  # the row that starts there; -1 if none does
    row_starts: np.ndarray  # R + 1: row r owns edges row_starts[r] .. row_starts[r + 1]


class ContinuationMass(NamedTuple):
    """Mass of each row that continues as the document does, by how far, row by row."""

    offset_H: np.ndarray
    log_mass_H: np.ndarray  # of the row's tokens that reach the offset or beyond
    row_starts: np.ndarray  # R + 1


class Weights(NamedTuple):
    """Result of `weigh`; natural logs."""

    log_weight_R: np.ndarray
    log_known_P: np.ndarray  # mass known just before each offset
    log_continued_P: np.ndarray  # the part of it that continues in rows that start there
    wanted_E: np.ndarray  # bool: the branch is worth a row and has none


def weigh(
    rows: PathRows, edges: Edges, continuations: ContinuationMass, threshold: float, width: int, num_positions: int
) -> Weights:
    """Weigh all rows; the first one's weight is 1.

    Args:
        threshold: a branch is worth a row above this share of the mass known where it ends; 0: always.
        width: maximum number of branch rows per offset; the heaviest are kept.
    """
    open_E = np.flatnonzero(edges.child_E < 0)
    open_E = open_E[np.argsort(edges.end_E[open_E], kind="stable")]
    opens_P = np.searchsorted(edges.end_E[open_E], np.arange(num_positions + 1))
    order_R = np.argsort(rows.offset_R, kind="stable")
    rows_P = np.searchsorted(rows.offset_R[order_R], np.arange(num_positions + 1))
    log_threshold = math.log(threshold) if threshold else -math.inf
    log_weight_R, log_known_P, log_continued_P, log_weight_E = _weigh(order_R, rows_P, edges, continuations)
    log_min_P = log_known_P + log_threshold
    wanted_E = _choose(order_R, rows_P, rows.is_branch_R, open_E, opens_P, log_weight_R, log_weight_E, log_min_P, width)
    return Weights(log_weight_R, log_known_P, log_continued_P, wanted_E)


@njit(error_model="numpy")
def _add(largest_X: Any, sum_X: Any, x: int, log_value: float) -> None:
    """Add exp(log_value) to item x of sums held as sum * exp(largest)."""
    if log_value > largest_X[x]:
        sum_X[x] = sum_X[x] * np.exp(largest_X[x] - log_value) + 1.0
        largest_X[x] = log_value
    elif log_value > -np.inf:
        sum_X[x] += np.exp(log_value - largest_X[x])


@njit(error_model="numpy")
def _weigh(order_R: Any, rows_P: Any, edges: Any, continuations: Any) -> Any:
    num_rows, num_positions = len(order_R), len(rows_P) - 1
    arriving_R, arriving_sum_R = np.full(num_rows, -np.inf), np.zeros(num_rows)
    known_P, known_sum_P = np.full(num_positions, -np.inf), np.zeros(num_positions)
    continued_P, continued_sum_P = np.full(num_positions, -np.inf), np.zeros(num_positions)
    log_weight_E = np.empty(len(edges.end_E))
    _add(arriving_R, arriving_sum_R, 0, 0.0)
    _add(known_P, known_sum_P, 0, 0.0)
    for p in range(num_positions):
        for r in order_R[rows_P[p] : rows_P[p + 1]]:
            log_weight = arriving_R[r] + np.log(arriving_sum_R[r])
            _add(continued_P, continued_sum_P, p, log_weight)
            for h in range(continuations.row_starts[r], continuations.row_starts[r + 1]):
                _add(known_P, known_sum_P, continuations.offset_H[h], log_weight + continuations.log_mass_H[h])
            for e in range(edges.row_starts[r], edges.row_starts[r + 1]):
                log_weight_E[e] = log_weight + edges.log_prob_E[e]
                if edges.child_E[e] >= 0:
                    _add(arriving_R, arriving_sum_R, edges.child_E[e], log_weight_E[e])
    return (
        arriving_R + np.log(arriving_sum_R),
        known_P + np.log(known_sum_P),
        continued_P + np.log(continued_sum_P),
        log_weight_E,
    )


@njit(error_model="numpy")
def _choose(
    order_R: Any,
    rows_P: Any,
    is_branch_R: Any,
    open_E: Any,
    opens_P: Any,
    log_weight_R: Any,
    log_weight_E: Any,
    log_min_P: Any,
    width: int,
) -> Any:
    """Choose the heaviest branches that end at each offset, counting those that already have rows there."""
    wanted_E = np.zeros(len(log_weight_E), dtype=np.bool_)
    for p in range(len(rows_P) - 1):
        opens = open_E[opens_P[p] : opens_P[p + 1]]
        for e in opens:
            if log_weight_E[e] > log_min_P[p]:
                heavier = 0
                for r in order_R[rows_P[p] : rows_P[p + 1]]:
                    heavier += is_branch_R[r] and log_weight_R[r] >= log_weight_E[e]
                for other in opens:
                    if heavier >= width:
                        break
                    is_before = other < e  # among equals
                    heavier += log_weight_E[other] > log_weight_E[e] or (
                        log_weight_E[other] == log_weight_E[e] and is_before
                    )
                wanted_E[e] = heavier < width
    return wanted_E
