"""The row reduction on a CPU: one row's logits to its masses on column ranges, compiled by numba, which vLLM brings along.

A row is read twice, once for its largest logit and once to exponentiate it into a buffer that stays in the core's cache; each
column is then added up once, in float32 runs short enough to keep six digits, and the runs in float64. The slow twin is
`pipeline.covering.Covering.reduce_rows`. Nothing here holds Python's lock: rows are shared out over threads.

Shape legend: R rows, C sorted columns, N nodes, K cuts, I intervals, as in `pipeline.covering`.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from pipeline.covering import MIN_LOGIT

_RUN = 4096  # columns added up in float32 at once, in at least 16 lanes: the error is below 256 ulp at worst, in practice 1e-6
_MIN_LOGIT = np.float32(MIN_LOGIT)
_LOG2_E = np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in a float32's low bits
# 2**r on -0.5..0.5 to 1e-7 relative.
_P1, _P2, _P3 = np.float32(0.693147182), np.float32(0.240226462), np.float32(0.0555034801)
_P4, _P5, _P6 = np.float32(0.00961812911), np.float32(0.00133988), np.float32(0.000154353)


@intrinsic
def _float_of_bits(_typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _bits_of_float(_typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


# "contract" allows fused multiply-adds only: reordering would cancel `_ROUND` away.
@njit(fastmath={"contract"}, error_model="numpy")
def _exp(logit: Any) -> Any:
    """exp of a float32 of at most 0, to 4e-6 relative; written out so that the compiler makes vector instructions of it."""
    scaled = max(logit, _MIN_LOGIT) * _LOG2_E
    shifted = scaled + _ROUND
    r = scaled - (shifted - _ROUND)
    power = _P6 * r + _P5
    power = power * r + _P4
    power = power * r + _P3
    power = power * r + _P2
    power = power * r + _P1
    power = power * r + np.float32(1.0)
    return _float_of_bits(_bits_of_float(power) + (_bits_of_float(shifted) << np.int32(23)))


@njit(error_model="numpy")
def _largest(bits_C: Any) -> Any:
    """The largest of some float32, given as int32: those that are not negative are ordered as their bits are."""
    largest = bits_C[0]
    for c in range(bits_C.shape[0]):
        largest = max(largest, bits_C[c])
    if largest < 0:  # all are negative: their bits fall as they rise
        for c in range(bits_C.shape[0]):
            largest = min(largest, bits_C[c])
    return _float_of_bits(largest)


@njit(fastmath={"reassoc", "nsz", "contract"}, error_model="numpy")
def _sum(probs_C: Any, first: int, last: int) -> Any:
    total = 0.0
    for run in range(first, last, _RUN):
        part: Any = np.float32(0.0)
        for c in range(run, min(run + _RUN, last)):
            part += probs_C[c]
        total += part
    return total


@njit(nogil=True, error_model="numpy")
def reduce_range(
    logits_RC: Any,
    first_row: int,
    intervals: Any,
    num_spelling: int,
    num_end: int,
    masses_I: Any,
    end_R: Any,
    token_R: Any,
) -> bool:
    """Fill in masses, END and next token of rows `first_row ..`, one for each row of `logits_RC`; see `reduce.Masses`.

    Returns:
        False if a row's largest logit is not finite.
    """
    width = logits_RC.shape[1]
    probs_C = np.empty(width, dtype=np.float32)
    cuts_K, node_cuts, row_nodes, columns_R = (
        intervals.cuts_K,
        intervals.node_cuts,
        intervals.row_nodes,
        intervals.columns_R,
    )
    for r in range(logits_RC.shape[0]):
        row = first_row + r
        logits_C = logits_RC[r]
        largest = _largest(logits_C.view(np.int32))
        if not np.isfinite(largest):
            return False
        for c in range(width):
            probs_C[c] = _exp(logits_C[c] - largest)
        child_first, child_last, node_total = -1, -1, 0.0
        i = node_cuts[row_nodes[row]] - row_nodes[row]
        first_interval = i
        for n in range(row_nodes[row], row_nodes[row + 1]):
            child_total, node_total = node_total, 0.0
            for k in range(node_cuts[n], node_cuts[n + 1] - 1):
                first, last = cuts_K[k], cuts_K[k + 1]
                is_child = first == child_first and last == child_last  # it has been added up
                mass = child_total if is_child else _sum(probs_C, first, last)
                masses_I[i] = mass
                node_total += mass
                i += 1
            child_first, child_last = cuts_K[node_cuts[n]], cuts_K[node_cuts[n + 1] - 1]
        end = _sum(probs_C, num_spelling, num_spelling + num_end)
        total = node_total + end + _sum(probs_C, num_spelling + num_end, width)
        for j in range(first_interval, i):
            masses_I[j] /= total
        end_R[row] = end / total
        token_R[row] = probs_C[columns_R[row]] / total if columns_R[row] >= 0 else np.nan
    return True
