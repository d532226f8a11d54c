"""The row reduction on a CPU, compiled by numba: from one row's logits to its masses on column ranges.

A row is read once for its largest logit, once to exponentiate it, and, unless its logits are in byte order, once to put
the result in that order, which takes longer than all else; both buffers stay in the core's cache. Each column is then
added up once (`pipeline.covering.softmax_numba`). The slow twin is `pipeline.covering.covering.reduce_probs`. Python's
lock is released: rows are distributed over threads.

Shape legend: R rows, V token ids, C sorted columns, N nodes, I intervals, as in `pipeline.covering.covering`, K most
probable tokens of a row.
"""

from typing import Any

import numpy as np
from numba import njit

from pipeline.covering.covering import MIN_LOGIT
from pipeline.covering.softmax_numba import exp32, finite_largest32, sum32

_MIN_LOGIT = np.float32(MIN_LOGIT)
_BLOCK = 64  # logits looked at together for one that is among the largest


@njit(nogil=True, error_model="numpy")
def reduce_range(
    logits_RV: Any,
    order_C: Any,
    in_byte_order: bool,
    first_row: int,
    first_interval: int,
    intervals: Any,
    num_text_tokens: int,
    num_end: int,
    masses_I: Any,
    end_R: Any,
    token_R: Any,
    top_ids_RK: Any,
    top_logprobs_RK: Any,
) -> bool:
    """Fill in what `types.Masses` holds of rows `first_row ..`, one for each row of `logits_RV`.

    Args:
        order_C: int32, the token id of each column.
        in_byte_order: the logits are by column, not by token id.
        first_interval: index of the first row's first interval.

    Returns:
        False if a row's largest logit is not finite, or a logit is nan.
    """
    width = logits_RV.shape[1]
    probs_V, probs_C = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
    trie, nodes_N, row_nodes, columns_R = intervals.trie, intervals.nodes_N, intervals.row_nodes, intervals.columns_R
    i = first_interval
    for r in range(logits_RV.shape[0]):
        row = first_row + r
        logits_V = logits_RV[r]
        largest = finite_largest32(logits_V.view(np.int32))
        if np.isnan(largest):
            return False
        exps_V = probs_C if in_byte_order else probs_V
        for v in range(width):
            exps_V[v] = exp32(logits_V[v] - largest)
        if not in_byte_order:
            for c in range(width):  # in the loop above, the indirect load would keep it from being vectorised
                probs_C[c] = probs_V[order_C[c]]
        child_first, child_last, node_total = -1, -1, 0.0
        first_of_row = i
        for n in range(row_nodes[row], row_nodes[row + 1]):
            child_total, node_total = node_total, 0.0
            node = nodes_N[n]
            start, stop = trie.start_N[node], trie.start_N[node + 1]
            for k in range(start, stop):
                first, last = trie.first_J[k], trie.last_J[k]
                is_child = first == child_first and last == child_last  # already summed
                mass = child_total if is_child else sum32(probs_C, first, last)
                masses_I[i] = mass
                node_total += mass
                i += 1
            if stop > start:  # always, except at the root of a vocabulary without text tokens
                child_first, child_last = trie.first_J[start], trie.last_J[stop - 1]
        end = sum32(probs_C, num_text_tokens, num_text_tokens + num_end)
        total = node_total + end + sum32(probs_C, num_text_tokens + num_end, width)
        for j in range(first_of_row, i):
            masses_I[j] /= total
        end_R[row] = end / total
        token_R[row] = probs_C[columns_R[row]] / total if columns_R[row] >= 0 else np.nan
        if top_ids_RK.shape[1]:
            _select_top(logits_V, order_C, in_byte_order, top_ids_RK[row], top_logprobs_RK[row])
            log_total = np.log(total)
            for k in range(top_ids_RK.shape[1]):
                top_logprobs_RK[row, k] = max(top_logprobs_RK[row, k] - largest, _MIN_LOGIT) - log_total
    return True


@njit(error_model="numpy")
def _num_at_least(logits_V: Any, least: Any) -> Any:
    """Count the logits that are at least so large; in int32, which the compiler vectorises."""
    num = np.int32(0)
    for v in range(logits_V.shape[0]):
        num += np.int32(1) if logits_V[v] >= least else np.int32(0)
    return num


@njit(nogil=True, error_model="numpy")
def _select_top(logits_V: Any, order_C: Any, in_byte_order: bool, ids_K: Any, logits_K: Any) -> None:
    """Write the largest logits in descending order, and their token ids; of equal ones, the lowest ids first."""
    width, size, num = logits_V.shape[0], ids_K.shape[0], 0
    for first in range(0, width, _BLOCK):
        last = min(first + _BLOCK, width)
        if num == size and not _num_at_least(logits_V[first:last], logits_K[size - 1]):  # as in most blocks
            continue
        for v in range(first, last):
            logit = logits_V[v]
            if num == size and logit < logits_K[size - 1]:
                continue
            token = order_C[v] if in_byte_order else v
            if num < size:
                num += 1
            elif logit == logits_K[size - 1] and token > ids_K[size - 1]:
                continue
            at = num - 1
            while at > 0 and (logits_K[at - 1] < logit or (logits_K[at - 1] == logit and ids_K[at - 1] > token)):
                logits_K[at], ids_K[at] = logits_K[at - 1], ids_K[at - 1]
                at -= 1
            logits_K[at], ids_K[at] = logit, token
