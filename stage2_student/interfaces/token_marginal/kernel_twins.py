"""The twins of the Triton kernels in plain torch, for any device and dtype: float64 logits give float64 sums."""

import torch
from torch import Tensor

from stage2_student.interfaces.token_marginal.cells import row_of_cells, softmax_sums_backward, sum_cells
from stage2_student.interfaces.token_marginal.node_sums import Backward, Kernels, Order
from stage2_student.interfaces.token_marginal.nodes import Chunk, Tables, list_cells
from stage2_student.interfaces.token_marginal.types import Columns, Sums


def sums(logits: Tensor, order: Order, chunk: Chunk, tables: Tables) -> tuple[Sums, Tensor]:
    """Compute `Kernels.sums`."""
    columns, tokens_R2 = _as_ordered(order, chunk.cells.tokens_R2)
    return sum_cells(logits, chunk.cells._replace(tokens_R2=tokens_R2), columns)


def gradient(logits: Tensor, order: Order, chunk: Chunk, tables: Tables, given: Backward) -> Tensor:
    """Compute `Kernels.gradient`."""
    columns, tokens_R2 = _as_ordered(order, chunk.cells.tokens_R2)
    grad, found = given.grad_sums, given.sums
    grad = grad._replace(logprob_R2=grad.logprob_R2.where(tokens_R2 >= 0, 0.0))
    # The derivative of all sums together with respect to a shift of every logit of the row.
    common_R = (grad.end_R * found.end_R + grad.logprob_R2.sum(-1)).index_add(
        0, row_of_cells(chunk.cells), grad.mass_I * found.mass_I
    )
    cells = chunk.cells._replace(tokens_R2=tokens_R2)
    made = softmax_sums_backward(logits, given.log_total_R, grad, common_R, cells, columns)
    return logits.copy_(made) if given.in_place else made


def _as_ordered(order: Order, tokens_R2: Tensor) -> tuple[Columns, Tensor]:
    """Return the columns of logits by index, and tokens by their index among these."""
    columns = order.columns
    if not order.in_order:
        return columns, tokens_R2
    same = torch.arange(len(columns.token_C), dtype=torch.int32, device=tokens_R2.device)
    placed_R2 = columns.column_V[tokens_R2.clamp(min=0)].long().where(tokens_R2 >= 0, tokens_R2)
    return Columns(same, same, columns.num_text_tokens, columns.num_end), placed_R2


def take_rows(matrix: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `Kernels.take_rows`."""
    return matrix.index_select(0, index).to(dtype)


KERNELS = Kernels(list_cells, sums, gradient, take_rows)
