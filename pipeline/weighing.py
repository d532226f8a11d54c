"""What every row of a document weighs, and which branches are worth a row: one pass over the rows in the order of their offsets.

Weight goes forward only: a row's is all that arrives at it, by the tokens that end where it starts. The pass is compiled by numba,
since each round of expansion makes it over the whole document; the slow twin is `tests.pipeline.slow_weighing`.

Shape legend: R rows, E edges (a row's tokens that spell the document's next bytes), H reaches (a row and an offset that some of its
tokens go on to), P positions. All weights are natural logs.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit


class Edges(NamedTuple):
    """A row's tokens that end along the document, row by row."""

    end_E: np.ndarray  # the byte offset
    log_prob_E: np.ndarray
    child_E: np.ndarray  # the row that starts there; -1: none does
    row_starts: np.ndarray  # R + 1: row r owns edges row_starts[r] .. row_starts[r + 1]


class Reaches(NamedTuple):
    """How much of a row goes on as the document does, and how far, row by row."""

    offset_H: np.ndarray
    log_mass_H: np.ndarray  # of the row's tokens that go on to the offset, or further
    row_starts: np.ndarray  # R + 1


class Weights(NamedTuple):
    log_weight_R: np.ndarray
    log_known_P: np.ndarray  # mass known just before each offset
    log_continued_P: np.ndarray  # of that, what goes on in rows that start there
    wanted_E: np.ndarray  # bool: the branch is worth a row, and has none


class Choice(NamedTuple):
    """Which branches are worth a row."""

    log_threshold_P: np.ndarray  # of the mass known where it ends, a branch holds more
    width: int  # rows that branches have at an offset, at most; the heaviest
    join_rest: bool


def weigh(offset_R: np.ndarray, is_branch_R: np.ndarray, edges: Edges, reaches: Reaches, choice: Choice, num_positions: int) -> Weights:
    """Weigh all rows; row 0 starts the document, with weight 1."""
    open_E = np.flatnonzero(edges.child_E < 0)
    open_E = open_E[np.argsort(edges.end_E[open_E], kind="stable")]
    opens_P = np.searchsorted(edges.end_E[open_E], np.arange(num_positions + 1))
    row_order = np.argsort(offset_R, kind="stable")
    rows_P = np.searchsorted(offset_R[row_order], np.arange(num_positions + 1))
    return Weights(
        *_weigh(
            row_order, rows_P, is_branch_R, open_E, opens_P, edges, reaches, choice.log_threshold_P, choice.width, choice.join_rest, num_positions
        )
    )


@njit(error_model="numpy")
def _add(largest_X: Any, sum_X: Any, x: int, log_value: float) -> None:
    """Add exp(log_value) to item x of sums that are held as sum * exp(largest)."""
    if log_value > largest_X[x]:
        sum_X[x] = sum_X[x] * np.exp(largest_X[x] - log_value) + 1.0
        largest_X[x] = log_value
    elif log_value > -np.inf:
        sum_X[x] += np.exp(log_value - largest_X[x])


@njit(error_model="numpy")
def _is_among_heaviest(log_value: float, e: int, open_O: Any, log_edge_E: Any, heavier: int, width: int) -> bool:
    """Whether less than `width` are heavier: `heavier` rows, and those of the open edges, the earlier first among equals."""
    for other in open_O:
        if log_edge_E[other] > log_value or (log_edge_E[other] == log_value and other < e):
            heavier += 1
            if heavier >= width:
                return False
    return heavier < width


@njit(error_model="numpy")
def _weigh(
    row_order: Any,
    rows_P: Any,
    is_branch_R: Any,
    open_E: Any,
    opens_P: Any,
    edges: Any,
    reaches: Any,
    log_threshold_P: Any,
    width: int,
    join_rest: bool,
    num_positions: int,
) -> Any:
    num_rows, num_edges = len(row_order), len(edges.end_E)
    arriving, arriving_sum = np.full(num_rows, -np.inf), np.zeros(num_rows)
    known, known_sum = np.full(num_positions, -np.inf), np.zeros(num_positions)
    continued, continued_sum = np.full(num_positions, -np.inf), np.zeros(num_positions)
    log_weight_R = np.full(num_rows, -np.inf)
    log_edge_E = np.full(num_edges, -np.inf)
    wanted_E = np.zeros(num_edges, dtype=np.bool_)
    _add(arriving, arriving_sum, 0, 0.0)
    _add(known, known_sum, 0, 0.0)
    for p in range(num_positions):
        known[p] += np.log(known_sum[p])
        canonical = -1
        for r in row_order[rows_P[p] : rows_P[p + 1]]:
            if is_branch_R[r]:
                log_weight_R[r] = arriving[r] + np.log(arriving_sum[r])
            else:
                canonical = r
        opens = open_E[opens_P[p] : opens_P[p + 1]]
        for e in opens:
            if width and log_edge_E[e] > log_threshold_P[p] + known[p]:
                heavier = 0
                for r in row_order[rows_P[p] : rows_P[p + 1]]:
                    heavier += is_branch_R[r] and log_weight_R[r] >= log_edge_E[e]
                wanted_E[e] = _is_among_heaviest(log_edge_E[e], e, opens, log_edge_E, heavier, width)
            if join_rest and canonical >= 0 and not wanted_E[e]:
                _add(arriving, arriving_sum, canonical, log_edge_E[e])
        if canonical >= 0:
            log_weight_R[canonical] = arriving[canonical] + np.log(arriving_sum[canonical])
        for r in row_order[rows_P[p] : rows_P[p + 1]]:
            _add(continued, continued_sum, p, log_weight_R[r])
            for h in range(reaches.row_starts[r], reaches.row_starts[r + 1]):
                _add(known, known_sum, reaches.offset_H[h], log_weight_R[r] + reaches.log_mass_H[h])
            for e in range(edges.row_starts[r], edges.row_starts[r + 1]):
                log_edge_E[e] = log_weight_R[r] + edges.log_prob_E[e]
                if edges.child_E[e] >= 0:
                    _add(arriving, arriving_sum, edges.child_E[e], log_edge_E[e])
        continued[p] += np.log(continued_sum[p])
    return log_weight_R, known, continued, wanted_E
