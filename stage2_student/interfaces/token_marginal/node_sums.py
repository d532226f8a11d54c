"""The sums of rows that are shipped as nodes: one pass over the logits, and one that turns them into their gradient.

The head is applied with its rows in the order of their bytes, where it can be: then a pass reads a row of logits from
front to back, and putting the rows in order costs nothing, because it takes the place of the copy in the products'
dtype. The logits of the first rows of a micro-batch, as many as are to be kept, stay until the backward pass, which
writes the gradient over them; those of the others are computed again there.

Shape legend: R rows, r rows of a chunk, D hidden width, V columns of the head by token id, C the same columns ordered
by their bytes, I cells.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from stage2_student.interfaces.base import Head, OrderableHead
from stage2_student.interfaces.token_marginal.nodes import Chunk, Listed, NodePlan, Rows, Tables
from stage2_student.interfaces.token_marginal.types import Columns, Sums

ForwardCache = list[tuple[Sums, Tensor]]  # as in `cells`


class Order(NamedTuple):
    """The head's columns, and whether logits are in their order (r x C) or by token id (r x V)."""

    columns: Columns
    in_order: bool


class Kernels(NamedTuple):
    """Functions that compute: `kernel_triton.KERNELS`, or their twins `kernel_twins.KERNELS`, which are plain torch."""

    list_cells: Callable[[NodePlan, Rows, Tensor, Tables, int], Listed]
    # The sums of a chunk's rows, and each row's log of the sum of exponentials.
    sums: Callable[[Tensor, Order, Chunk, Tables], tuple[Sums, Tensor]]
    # The gradient of the logits, given these, the logs, the sums and their gradients; in place of the logits if asked.
    gradient: Callable[[Tensor, Order, Chunk, Tables, "Backward"], Tensor]
    take_rows: Callable[[Tensor, Tensor, torch.dtype], Tensor]  # rows of a matrix by their index, in a dtype


class Backward(NamedTuple):
    """Parts of the gradient of the logits."""

    log_total_R: Tensor
    sums: Sums
    grad_sums: Sums
    in_place: bool


class Memory(NamedTuple):
    """The number of rows whose logits are held from forward to backward, and of those held at once beyond."""

    kept_rows: int
    chunk_rows: int


class Setting(NamedTuple):
    """Means of computing the sums."""

    kernels: Kernels
    memory: Memory
    tables: Tables
    columns: Columns


def node_sums(hidden_RD: Tensor, chunks: Sequence[Chunk], head: Head, setting: Setting) -> Sums:
    """Compute the sums of all rows, which `chunks` cut; differentiable in states and head."""
    apply, in_order = _ordered(head, setting)
    order = Order(setting.columns, in_order)

    def sums_of(hidden_rD: Tensor, chunk: Chunk, is_kept: bool, cache: ForwardCache) -> tuple[Tensor, ...]:
        logits, call = apply(hidden_rD), _Call(order, chunk, setting, is_kept)
        found: tuple[Tensor, ...] = _NodeSums.apply(logits, call, cache)  # type: ignore[no-untyped-call]
        return found

    parts, first = [], 0
    for chunk in chunks:
        hidden_rD = hidden_RD[first : first + len(chunk.rows.num_nodes_R)]
        first += len(hidden_rD)
        if first <= setting.memory.kept_rows:
            parts.append(sums_of(hidden_rD, chunk, True, []))
        else:
            parts.append(checkpoint(sums_of, hidden_rD, chunk, False, ForwardCache(), use_reentrant=False))
    return Sums(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _ordered(head: Head, setting: Setting) -> tuple[Head, bool]:
    """Return a head whose columns are in the order of their bytes, and whether there is one; else the head as it is."""
    if not isinstance(head, OrderableHead) or head.plain is None:
        return head, False
    weight, bias, scaled = head.plain.weight, head.plain.bias, head.scaled
    columns = setting.columns
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    order: tuple[Any, ...] = (columns.token_C, columns.column_V, dtype, setting.kernels.take_rows)
    weight_CD: Tensor = _TakeRows.apply(weight, *order)  # type: ignore[no-untyped-call]
    bias_C = None if bias is None else bias[columns.token_C]
    return lambda hidden_rD: scaled(linear(hidden_rD.to(dtype), weight_CD, bias_C)), True


class _TakeRows(torch.autograd.Function):
    """Rows of a matrix in another order and dtype: what a cast reads and writes, and no more."""

    @staticmethod
    def forward(
        ctx: Any, weight_VD: Tensor, token_C: Tensor, column_V: Tensor, dtype: torch.dtype, take: Callable[..., Tensor]
    ) -> Tensor:
        ctx.column_V, ctx.dtype, ctx.take = column_V, weight_VD.dtype, take
        return take(weight_VD, token_C, dtype)

    @staticmethod
    def backward(ctx: Any, gradient_CD: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return ctx.take(gradient_CD, ctx.column_V, ctx.dtype), None, None, None, None


class _Call(NamedTuple):
    """Inputs of a chunk's sums, beside its logits."""

    order: Order
    chunk: Chunk
    setting: Setting
    is_kept: bool  # whether its logits stay until the backward pass


class _NodeSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call, cache: ForwardCache) -> tuple[Tensor, ...]:
        if not cache:
            cache.append(call.setting.kernels.sums(logits, call.order, call.chunk, call.setting.tables))
        sums, log_total_R = cache[0]
        # Returned tensors become part of a graph; cached ones must not.
        sums = Sums(*(sum_.detach() for sum_ in sums))
        ctx.call = call
        ctx.is_overwritten = False
        ctx.save_for_backward(logits, log_total_R, *sums)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        order, chunk, setting, is_kept = ctx.call
        if ctx.is_overwritten:
            raise RuntimeError(
                "the logits of this micro-batch were overwritten by their gradient, and a second gradient is asked "
                "for: with train.marginal_kept_gib=0 they are computed again each time"
            )
        logits, log_total_R, *sums = ctx.saved_tensors
        # A head that is not plain may itself need what it has returned.
        in_place = order.in_order
        ctx.is_overwritten = in_place and is_kept
        given = Backward(log_total_R, Sums(*sums), Sums(*gradients), in_place)
        gradient = setting.kernels.gradient(logits.detach(), order, chunk, setting.tables, given)
        return gradient, None, None
