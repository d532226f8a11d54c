"""The numba twins of `cells.sum_cells` and `cells.softmax_sums_backward`, for float32 and bfloat16 logits on a CPU.

A row stays in its core's cache: its logits are gathered in the order of their bytes, exponentiated in place and summed
cell by cell; for the gradient each cell is scaled, and the row is scattered back. bfloat16 is read and written as its
bits.

Shape legend: R rows of a chunk, V columns of the head by token id, C the same columns ordered by their bytes, I cells.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from pipeline.covering.softmax_numba import bits_of_float, exp32, float_of_bits, largest32, sum32
from stage2_student.interfaces.token_marginal.types import Cells, Columns, Sums


def _to_float(value: Any) -> Any:
    """Return a logit as a float32; int16 holds the bits of a bfloat16."""


@overload(_to_float)
def _to_float_compiled(value: Any) -> Any:  # numba requires the names and annotations of the function it implements
    def of_bits(value: Any) -> Any:
        return float_of_bits(np.int32(value) << np.int32(16))

    def of_float(value: Any) -> Any:
        return value

    return of_bits if value == types.int16 else of_float


def _store(row: Any, column: int, value: Any) -> None:
    """Set row[column] to value, rounded to nearest even if the row holds the bits of bfloat16s."""


@overload(_store)
def _store_compiled(row: Any, column: int, value: Any) -> Any:
    def store_bits(row: Any, column: int, value: Any) -> None:
        bits = bits_of_float(value)
        row[column] = np.int16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

    def store_float(row: Any, column: int, value: Any) -> None:
        row[column] = value

    return store_bits if row.dtype == types.int16 else store_float


@njit(nogil=True, error_model="numpy")
def _sum_rows(
    logits_RV: Any, rows: Any, token_C: Any, num_text_tokens: int, num_end: int, cells: Any, tokens_R2: Any, into: Any
) -> None:
    width = token_C.shape[0]
    start_R, first_I, last_I = cells
    mass_I, end_R, logprob_R2, log_total_R = into
    probs_C = np.empty(width, dtype=np.float32)
    for r in range(rows[0], rows[1]):
        logits_V = logits_RV[r]
        for c in range(width):
            probs_C[c] = _to_float(logits_V[token_C[c]])
        largest = largest32(probs_C.view(np.int32))
        for c in range(width):
            probs_C[c] = exp32(probs_C[c] - largest)
        end = sum32(probs_C, num_text_tokens, num_text_tokens + num_end)
        total = end + sum32(probs_C, num_text_tokens + num_end, width)
        for i in range(start_R[r], start_R[r + 1]):
            mass_I[i] = sum32(probs_C, first_I[i], last_I[i])
            total += mass_I[i]
        for i in range(start_R[r], start_R[r + 1]):
            mass_I[i] /= total
        end_R[r] = end / total
        log_total_R[r] = largest + np.log(total)
        for j in range(2):
            token = tokens_R2[r, j]
            logprob_R2[r, j] = _to_float(logits_V[token]) - log_total_R[r] if token >= 0 else 0.0


@njit(nogil=True, error_model="numpy")
def _scale(probs_C: Any, first: int, last: int, factor: Any) -> None:
    for c in range(first, last):
        probs_C[c] *= factor


@njit(nogil=True, error_model="numpy")
def _spread_rows(
    logits_RV: Any, rows: Any, token_C: Any, column_V: Any, num_text_tokens: int, num_end: int, cells: Any,
    tokens_R2: Any, grad_sums: Any, log_total_R: Any, common_R: Any, gradient_RV: Any,
) -> None:  # fmt: skip
    width = token_C.shape[0]
    start_R, first_I, last_I = cells
    mass_I, end_R, logprob_R2 = grad_sums
    probs_C = np.empty(width, dtype=np.float32)
    for r in range(rows[0], rows[1]):
        logits_V, gradient_V, common = logits_RV[r], gradient_RV[r], common_R[r]
        log_total = np.float32(log_total_R[r])
        for c in range(width):  # separate from the next loop, so that the compiler can vectorise that one
            probs_C[c] = _to_float(logits_V[token_C[c]])
        for c in range(width):
            probs_C[c] = exp32(probs_C[c] - log_total)
        for i in range(start_R[r], start_R[r + 1]):
            _scale(probs_C, first_I[i], last_I[i], np.float32(mass_I[i] - common))
        _scale(probs_C, num_text_tokens, num_text_tokens + num_end, np.float32(end_R[r] - common))
        _scale(probs_C, num_text_tokens + num_end, width, np.float32(-common))
        for j in range(2):
            if tokens_R2[r, j] >= 0:
                probs_C[column_V[tokens_R2[r, j]]] += np.float32(logprob_R2[r, j])
        for v in range(width):
            _store(gradient_V, v, probs_C[column_V[v]])


def sum_cells(logits_RV: Tensor, cells: Cells, columns: Columns) -> tuple[Sums, Tensor]:
    """Compute `cells.sum_cells`; sums agree to 1e-6 relative."""
    num_rows = len(logits_RV)
    mass_I, end_R, log_total_R = np.empty(len(cells.first_I)), np.empty(num_rows), np.empty(num_rows)
    logprob_R2 = np.empty((num_rows, 2))
    logits = _bits(logits_RV)
    into = (mass_I, end_R, logprob_R2, log_total_R)
    _share_out(
        num_rows,
        lambda rows: _sum_rows(
            logits,
            rows,
            columns.token_C.numpy().view(np.uint32),
            columns.num_text_tokens,
            columns.num_end,
            *_arrays(cells),
            into,
        ),
    )
    return Sums(*map(torch.from_numpy, (mass_I, end_R, logprob_R2))), torch.from_numpy(log_total_R)


def softmax_sums_backward(
    logits_RV: Tensor, log_total_R: Tensor, grad_sums: Sums, common_R: Tensor, cells: Cells, columns: Columns
) -> Tensor:
    """Compute `cells.softmax_sums_backward`."""
    gradient_RV = torch.empty_like(logits_RV)
    logits, gradient = _bits(logits_RV), _bits(gradient_RV)
    gradients = tuple(part.contiguous().numpy() for part in grad_sums)
    _share_out(
        len(logits_RV),
        lambda rows: _spread_rows(
            logits, rows, columns.token_C.numpy().view(np.uint32), columns.column_V.numpy().view(np.uint32),
            columns.num_text_tokens, columns.num_end, *_arrays(cells), gradients, log_total_R.numpy(), common_R.numpy(),
            gradient,
        ),
    )  # fmt: skip
    return gradient_RV


def _bits(logits_RV: Tensor) -> np.ndarray:
    logits_RV = logits_RV.detach()
    return (logits_RV.view(torch.int16) if logits_RV.dtype == torch.bfloat16 else logits_RV).numpy()


def _arrays(cells: Cells) -> tuple[Any, np.ndarray]:
    start_R = np.concatenate([[0], cells.num_cells_R.numpy().cumsum()])
    return (start_R, cells.first_I.numpy(), cells.last_I.numpy()), cells.tokens_R2.numpy()


@cache
def _threads(process_id: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "marginal")


def _share_out(num_rows: int, work: Callable[[tuple[int, int]], None]) -> None:
    """Run `work` on ranges of rows, one for each of torch's threads."""
    bounds = np.linspace(0, num_rows, torch.get_num_threads() + 1).astype(int).tolist()
    for _ in _threads(os.getpid()).map(work, pairwise(bounds)):
        pass
