"""The softmax of some rows summed into cells, with its gradient: one pass over the logits for bytes and tokens.

Only sums leave the chunk, in float64. For the gradient the logits are computed again (`cell_sums` is run under a
checkpoint), but their sums are not. The gradient is p * (gradient of the column's cell - mean gradient), so nothing of
the size of the logits is kept.

Shape legend: R rows of a chunk, V columns of the head by token id, C the same columns ordered by their bytes, I cells.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.covering.covering import MIN_LOGIT
from stage2_student.interfaces.token_marginal.types import Cells, Columns, Sums

# The results of a chunk, once computed: its sums, and each row's log of the sum of exponentials.
ForwardCache = list[tuple[Sums, Tensor]]


def cell_sums(logits_RV: Tensor, cells: Cells, columns: Columns, cache: ForwardCache) -> Sums:
    """Sum the softmax of each row into its cells. Differentiable in the logits, which may be of any float dtype.

    Args:
        cache: empty at first; when a checkpoint calls this again with the same logits, the cached sums are returned.
    """
    return Sums(*_CellSums.apply(logits_RV, cells, columns, cache))  # type: ignore[no-untyped-call]


class _CellSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, cells: Cells, columns: Columns, cache: ForwardCache) -> tuple[Tensor, ...]:
        if not cache:
            cache.append(_kernels(logits_RV)[0](logits_RV, cells, columns))
        sums, log_total_R = cache[0]
        # Returned tensors become part of a graph; cached ones must not.
        sums = Sums(*(sum_.detach() for sum_ in sums))
        ctx.cells, ctx.columns = cells, columns
        ctx.save_for_backward(logits_RV, log_total_R, sums.mass_I, sums.end_R)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits_RV, log_total_R, mass_I, end_R = ctx.saved_tensors
        grad_sums = Sums(*gradients)
        grad_sums = grad_sums._replace(logprob_R2=grad_sums.logprob_R2.where(ctx.cells.tokens_R2 >= 0, 0.0))
        # The derivative of all sums together with respect to a shift of every logit of the row.
        common_R = (grad_sums.end_R * end_R + grad_sums.logprob_R2.sum(-1)).index_add(
            0, row_of_cells(ctx.cells), grad_sums.mass_I * mass_I
        )
        backward_kernel = _kernels(logits_RV)[1]
        return backward_kernel(logits_RV, log_total_R, grad_sums, common_R, ctx.cells, ctx.columns), None, None, None


def _kernels(logits_RV: Tensor) -> tuple[Callable[..., tuple[Sums, Tensor]], Callable[..., Tensor]]:
    """Return the functions for the sums and for their gradient, for logits of this kind."""
    if logits_RV.device.type == "cpu" and logits_RV.dtype in (torch.float32, torch.bfloat16):
        # Imported here: compiling takes a few seconds at the first call.
        from stage2_student.interfaces.token_marginal import cells_numba

        return cells_numba.sum_cells, cells_numba.softmax_sums_backward
    return sum_cells, softmax_sums_backward


def sum_cells(logits_RV: Tensor, cells: Cells, columns: Columns) -> tuple[Sums, Tensor]:
    """Compute the sums, and each row's log of the sum of exponentials.

    It uses torch alone, on any device, in float32 unless the logits are float64.
    """
    num_rows, num_cells = len(logits_RV), len(cells.first_I)
    largest_R = logits_RV.amax(-1).double()
    probs_RC = _exponentials(logits_RV, largest_R, columns)
    total_R = probs_RC.sum(-1, dtype=torch.float64)
    order, lengths = _in_column_order(cells, columns, num_rows)
    # Sums of segments, not differences of running sums, which lose values that are small beside the row's total.
    sums = torch.segment_reduce(probs_RC.flatten(), "sum", lengths=lengths[order], unsafe=True).double()
    mass = torch.empty_like(sums).index_copy_(0, order, sums)
    log_total_R = largest_R + total_R.log()
    logits_R2 = logits_RV.gather(-1, cells.tokens_R2.clamp(min=0)).double()
    logprob_R2 = torch.where(cells.tokens_R2 >= 0, logits_R2 - log_total_R[:, None], 0.0)
    mass_I = mass[:num_cells] / total_R[row_of_cells(cells)]
    return Sums(mass_I, mass[num_cells : num_cells + num_rows] / total_R, logprob_R2), log_total_R


def softmax_sums_backward(
    logits_RV: Tensor, log_total_R: Tensor, grad_sums: Sums, common_R: Tensor, cells: Cells, columns: Columns
) -> Tensor:
    """Compute the gradient of the logits: p * (gradient of the column's cell - common), plus that of the two tokens."""
    order, lengths = _in_column_order(cells, columns, len(logits_RV))
    coefficients = torch.cat([grad_sums.mass_I - common_R[row_of_cells(cells)], grad_sums.end_R - common_R, -common_R])[
        order
    ]
    gradient_RC = _exponentials(logits_RV, log_total_R, columns)
    coefficients_RC = coefficients.to(gradient_RC.dtype).repeat_interleave(
        lengths[order], output_size=gradient_RC.numel()
    )
    gradient_RC *= coefficients_RC.view_as(gradient_RC)
    gradient_RV = gradient_RC[:, columns.column_V]
    gradient_RV.scatter_add_(-1, cells.tokens_R2.clamp(min=0), grad_sums.logprob_R2.to(gradient_RV.dtype))
    return gradient_RV.to(logits_RV.dtype)


def row_of_cells(cells: Cells) -> Tensor:
    """Return I: the row of each cell."""
    rows = torch.arange(len(cells.num_cells_R), device=cells.first_I.device)
    return rows.repeat_interleave(cells.num_cells_R, output_size=len(cells.first_I))


def _exponentials(logits_RV: Tensor, shift_R: Tensor, columns: Columns) -> Tensor:
    """Compute exponentials in the order of the columns.

    Logits are clamped at MIN_LOGIT, below which a float32 would lose its digits.
    """
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    logits_RC = logits_RV[:, columns.token_C] - shift_R[:, None].to(dtype)
    return (logits_RC if dtype == torch.float64 else logits_RC.clamp_(min=MIN_LOGIT)).exp_()


def _in_column_order(cells: Cells, columns: Columns, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return (order, lengths) of the cells, then of each row's END columns, then of each row's others.

    `order` sorts them by row and column.
    """
    width, others = len(columns.token_C), columns.num_text_tokens + columns.num_end
    rows = torch.arange(num_rows, device=cells.first_I.device)
    first = torch.cat(
        [row_of_cells(cells) * width + cells.first_I, rows * width + columns.num_text_tokens, rows * width + others]
    )
    ends = torch.full_like(rows, columns.num_end), torch.full_like(rows, width - others)
    lengths = torch.cat([(cells.last_I - cells.first_I).long(), *ends])
    # Empty ones sort before what starts at the same column: their sum is 0 wherever they are.
    return torch.argsort(first * 2 + (lengths > 0)), lengths
