"""The sums of rows and their gradient on a GPU, in Triton: each one launch, which reads every logit once.

A program reads one row in the order of its bytes, a tile at a time. The row's nodes tell each column how deep it is,
and so whether it begins a cell (`nodes`); a scan that restarts with each cell adds up its exponentials and numbers it.
All are sums over the inside of a cell, never differences of running sums, so that small masses keep their digits. A
cell is stored where it ends, relative to the largest logit up to there, and once more when the row's total is known.
The gradient needs no sums: a column finds the coefficient of its cell by the cell's number, and its gradient takes the
place of its logit.

`token_C` is read only for logits by token id, each row of which is then gathered.

`tests/stage2_student/interfaces/token_marginal/test_kernel_triton.py` compares it with its twins (`kernel_twins`), on a
GPU or under Triton's interpreter.

Shape legend: R rows, N nodes, J intervals of all nodes of the trie, V columns by token id, C columns in byte order, I
cells of all rows in turn.
"""

# mypy: disable-error-code=no-untyped-def

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.covering.covering import MIN_LOGIT
from schemas import NUM_SYMBOLS
from stage2_student.interfaces.token_marginal.node_sums import Backward, Kernels, Order
from stage2_student.interfaces.token_marginal.nodes import Chunk, Listed, NodePlan, Rows, Tables
from stage2_student.interfaces.token_marginal.types import Sums

TILE = 1024  # columns in flight for one row
CELLS = 256  # cells of a row at once
LEAST = -3.0e38  # below every logit that is finite; a maximum starts from it
_NO_FLOOR = -1.0e30  # for float64, which keeps its digits down to where `exp` is 0


# Triton reads a kernel's source, and allows no annotations in it but its own.
@triton.jit
def _continue_or_restart(count, total, next_count, next_total):
    """Join two runs of columns: cells begun in them, and the sum of the columns since the last of these began."""
    return count + next_count, tl.where(next_count > 0, next_total, total + next_total)


@triton.jit
def _exp(values, floor: tl.constexpr):
    return tl.exp(tl.where(values < floor, floor, values))  # not `maximum`, in which nan is lost


@triton.jit
def _begins_cell(columns, first_column, tile: tl.constexpr, common_C, width, nodes, num_nodes, first_N, last_N):
    """Return whether each column of a tile begins a cell, and whether the column after it does."""
    depth = tl.zeros((tile,), dtype=tl.int32)
    depth_after = tl.zeros((tile,), dtype=tl.int32)
    level = 1
    is_near = num_nodes > 1
    while is_near:  # a deeper node lies inside this one: where this one is far, so is that
        node = tl.load(nodes + level)
        first = tl.load(first_N + node)
        last = tl.load(last_N + node)
        depth += ((columns >= first) & (columns < last)).to(tl.int32)
        depth_after += ((columns + 1 >= first) & (columns + 1 < last)).to(tl.int32)
        level += 1
        is_near = (level < num_nodes) & (first <= first_column + tile) & (last > first_column)
    common = tl.load(common_C + columns, mask=columns < width, other=32767).to(tl.int32)
    common_after = tl.load(common_C + columns + 1, mask=columns + 1 < width, other=-1).to(tl.int32)
    return common <= depth, common_after <= depth_after


@triton.jit
def _sum_rows(
    logits, stride, token_C, common_C, width, num_text, num_end,
    node_N, first_node_R, num_nodes_R, first_cell_R, num_cells_R, first_N, last_N,
    tokens_R2, column_V, mass_I, largest_I, end_R, logprob_R2, log_total_R,
    in_order: tl.constexpr, work: tl.constexpr, floor: tl.constexpr, least: tl.constexpr,
    tile: tl.constexpr, cells: tl.constexpr,
):  # fmt: skip
    """Sum one row per program."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    nodes = node_N + tl.load(first_node_R + row)
    num_nodes = tl.load(num_nodes_R + row)
    first_cell = tl.load(first_cell_R + row)
    num_cells = tl.load(num_cells_R + row)
    largest = tl.full((), least, work)
    total = tl.full((), 0.0, tl.float64)
    open_sum = tl.full((), 0.0, work)  # of the cell that the last tile has not ended
    end_sum = tl.full((), 0.0, work)
    end_largest = tl.full((), least, work)
    begun = tl.full((), -1, tl.int32)  # the number of the open cell
    for first_column in range(0, width, tile):
        columns = first_column + tl.arange(0, tile)
        inside = columns < width
        begins, ends = _begins_cell(columns, first_column, tile, common_C, width, nodes, num_nodes, first_N, last_N)
        ids = columns
        if not in_order:
            ids = tl.load(token_C + columns, mask=inside, other=0)
        values = tl.load(row_logits + ids, mask=inside, other=-float("inf")).to(work)
        before = largest
        largest = tl.maximum(largest, tl.max(values, axis=0))
        probs = tl.where(inside, _exp(values - largest, floor), 0.0)
        shrunk = tl.exp(before - largest)
        total = total * shrunk.to(tl.float64) + tl.sum(probs, axis=0).to(tl.float64)
        count, sums = tl.associative_scan((begins.to(tl.int32), probs), 0, _continue_or_restart)
        sums += tl.where(count == 0, open_sum * shrunk, 0.0)
        number = begun + count
        is_stored = inside & ends & (number < num_cells) & (columns < num_text)
        tl.store(mass_I + first_cell + number, sums.to(tl.float64), mask=is_stored)
        tl.store(largest_I + first_cell + number, tl.full((tile,), 0.0, work) + largest, mask=is_stored)
        is_end = columns == num_text + num_end - 1  # where END's columns end
        has_end = (num_end > 0) & (tl.sum(is_end.to(tl.int32), axis=0) > 0)
        end_sum = tl.where(has_end, tl.sum(tl.where(is_end, sums, 0.0), axis=0), end_sum)
        end_largest = tl.where(has_end, largest, end_largest)
        last_column = tl.minimum(first_column + tile, width) - 1
        open_sum = tl.sum(tl.where(columns == last_column, sums, 0.0), axis=0)
        begun += tl.sum(begins.to(tl.int32), axis=0)
    log_total = largest.to(tl.float64) + tl.log(total)
    tl.store(log_total_R + row, log_total)
    # What one column has at least: a tile far below the largest logit would otherwise have masses of 0.
    least_mass = tl.exp(floor + largest.to(tl.float64) - log_total)
    end_mass = end_sum.to(tl.float64) * tl.exp(end_largest.to(tl.float64) - log_total)
    tl.store(end_R + row, tl.where(num_end > 0, tl.maximum(end_mass, least_mass), 0.0))
    for which in range(2):
        token = tl.load(tokens_R2 + row * 2 + which)
        place = tl.maximum(token, 0)
        if in_order:
            place = tl.load(column_V + place).to(tl.int64)
        logprob = tl.load(row_logits + place).to(tl.float64) - log_total
        tl.store(logprob_R2 + row * 2 + which, tl.where(token >= 0, logprob, 0.0))
    tl.debug_barrier()  # other threads of this program have written what is read here
    for start in range(0, num_cells, cells):
        own = start + tl.arange(0, cells)
        stored = own < num_cells
        mass = tl.load(mass_I + first_cell + own, mask=stored, other=0.0)
        at = tl.load(largest_I + first_cell + own, mask=stored, other=0.0).to(tl.float64)
        mass = tl.maximum(mass * tl.exp(at - log_total), least_mass)
        tl.store(mass_I + first_cell + own, mass, mask=stored)


@triton.jit
def _spread_rows(
    logits, stride, gradient, gradient_stride, token_C, common_C, width, num_text, num_end,
    node_N, first_node_R, num_nodes_R, first_cell_R, num_cells_R, first_N, last_N,
    tokens_R2, column_V, mass_I, end_R, log_total_R, grad_mass_I, grad_end_R, grad_logprob_R2, coefficient_I,
    in_order: tl.constexpr, work: tl.constexpr, floor: tl.constexpr, tile: tl.constexpr, cells: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row per program, which may be where its logits are."""
    row = tl.program_id(0).to(tl.int64)
    nodes = node_N + tl.load(first_node_R + row)
    num_nodes = tl.load(num_nodes_R + row)
    first_cell = tl.load(first_cell_R + row)
    num_cells = tl.load(num_cells_R + row)
    log_total = tl.load(log_total_R + row).to(work)
    token_0 = tl.load(tokens_R2 + row * 2)
    token_1 = tl.load(tokens_R2 + row * 2 + 1)
    grad_0 = tl.where(token_0 >= 0, tl.load(grad_logprob_R2 + row * 2), 0.0)
    grad_1 = tl.where(token_1 >= 0, tl.load(grad_logprob_R2 + row * 2 + 1), 0.0)
    grad_end = tl.load(grad_end_R + row)
    # The derivative of all sums together with respect to a shift of every logit of the row.
    common = grad_end * tl.load(end_R + row) + grad_0 + grad_1
    for start in range(0, num_cells, cells):
        own = first_cell + start + tl.arange(0, cells)
        stored = start + tl.arange(0, cells) < num_cells
        grad = tl.load(grad_mass_I + own, mask=stored, other=0.0)
        common += tl.sum(grad * tl.load(mass_I + own, mask=stored, other=0.0), axis=0)
    for start in range(0, num_cells, cells):
        own = first_cell + start + tl.arange(0, cells)
        stored = start + tl.arange(0, cells) < num_cells
        grad = tl.load(grad_mass_I + own, mask=stored, other=0.0)
        tl.store(coefficient_I + own, (grad - common).to(work), mask=stored)
    tl.debug_barrier()  # other threads of this program have written what is read here
    of_end = (grad_end - common).to(work)
    of_others = (-common).to(work)
    place_0 = tl.maximum(token_0, 0)
    place_1 = tl.maximum(token_1, 0)
    if in_order:
        place_0 = tl.load(column_V + place_0).to(tl.int64)
        place_1 = tl.load(column_V + place_1).to(tl.int64)
    begun = tl.full((), -1, tl.int32)
    for first_column in range(0, width, tile):
        columns = first_column + tl.arange(0, tile)
        inside = columns < width
        begins, _ = _begins_cell(columns, first_column, tile, common_C, width, nodes, num_nodes, first_N, last_N)
        number = begun + tl.cumsum(begins.to(tl.int32), axis=0)
        begun += tl.sum(begins.to(tl.int32), axis=0)
        is_text = columns < num_text
        of_cell = tl.load(coefficient_I + first_cell + number, mask=inside & is_text, other=0.0)
        coefficient = tl.where(is_text, of_cell, tl.where(columns < num_text + num_end, of_end, of_others))
        ids = columns
        if not in_order:
            ids = tl.load(token_C + columns, mask=inside, other=0)
        values = tl.load(logits + row * stride + ids, mask=inside, other=-float("inf")).to(work)
        found = _exp(values - log_total, floor) * coefficient
        found += tl.where(ids == place_0, grad_0, 0.0).to(work) + tl.where(ids == place_1, grad_1, 0.0).to(work)
        tl.store(gradient + row * gradient_stride + ids, found.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _list_cells(
    node_N, first_node_R, num_nodes_R, first_cell_R, num_cells_R, offset_R, unique_Q,
    start_N, entered_N, first_J, last_J, symbol_J, num_unique, max_nodes,
    first_I, last_I, node_I, fed_I, is_complete_I, symbols: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """List the cells of one row per program, in the order of their columns (`nodes.list_cells`)."""
    row = tl.program_id(0)
    nodes = node_N + tl.load(first_node_R + row)
    num_nodes = tl.load(num_nodes_R + row)
    offset = tl.load(offset_R + row)
    front = tl.load(first_cell_R + row)
    back = front + tl.load(num_cells_R + row)  # cells from there on are listed
    for depth in range(num_nodes):
        node = tl.load(nodes + depth)
        start = tl.load(start_N + node)
        stop = tl.load(start_N + node + 1)
        goes_on = depth + 1 < num_nodes
        into = tl.where(goes_on, tl.load(entered_N + tl.load(nodes + depth + 1, mask=goes_on, other=0)), stop)
        back -= tl.maximum(stop - into - 1, 0)
        unique = tl.load(unique_Q + offset + depth).to(tl.int32)
        for first in range(start, stop, block):
            interval = first + tl.arange(0, block)
            is_cell = (interval < stop) & (interval != into)
            at = tl.where(interval < into, front + interval - start, back + interval - into - 1)
            symbol = tl.load(symbol_J + interval, mask=is_cell, other=0).to(tl.int32)
            is_complete = symbol < 0
            is_fed = (unique < num_unique) & (symbol >= 0)
            tl.store(first_I + at, tl.load(first_J + interval, mask=is_cell, other=0), mask=is_cell)
            tl.store(last_I + at, tl.load(last_J + interval, mask=is_cell, other=0), mask=is_cell)
            tl.store(node_I + at, row * max_nodes + depth + 0 * symbol, mask=is_cell)
            fed = tl.where(is_fed, unique * symbols + symbol, num_unique * symbols)
            tl.store(fed_I + at, fed, mask=is_cell)
            tl.store(is_complete_I + at, is_complete.to(tl.uint8), mask=is_cell)
        front += into - start


@triton.jit
def _take_rows(matrix, index_R, taken, width, block: tl.constexpr):
    """Copy one row per program."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index_R + row).to(tl.int64)
    for first in range(0, width, block):
        places = first + tl.arange(0, block)
        inside = places < width
        values = tl.load(matrix + source * width + places, mask=inside)
        tl.store(taken + row * width + places, values.to(taken.dtype.element_ty), mask=inside)


def list_cells(nodes: NodePlan, rows: Rows, unique_Q: Tensor, tables: Tables, num_cells: int) -> Listed:
    """Compute `nodes.list_cells`."""
    first_I, last_I, node_I, fed_I = (nodes.node_N.new_empty(num_cells) for _ in range(4))
    is_complete_I = torch.empty(num_cells, dtype=torch.uint8, device=first_I.device)
    into = first_I, last_I, node_I, fed_I, is_complete_I
    if num_rows := len(rows.num_nodes_R):
        _list_cells[(num_rows,)](
            *rows, nodes.offset_R, unique_Q, tables.start_N, tables.entered_N, tables.first_J, tables.last_J,
            tables.symbol_J, len(nodes.asked_U), len(nodes.depth_D), *into, symbols=NUM_SYMBOLS, block=64,
        )  # fmt: skip
    return Listed(first_I, last_I, node_I, fed_I, is_complete_I.view(torch.bool))


def sums(logits: Tensor, order: Order, chunk: Chunk, tables: Tables) -> tuple[Sums, Tensor]:
    """Compute `kernel_twins.sums`; in float32 unless the logits are float64."""
    num_rows, num_cells = len(logits), len(chunk.cells.first_I)
    mass_I, end_R, logprob_R2, log_total_R = (
        torch.empty(shape, dtype=torch.float64, device=logits.device)
        for shape in (num_cells, num_rows, (num_rows, 2), num_rows)
    )
    if num_rows:
        largest_I = torch.empty(num_cells, dtype=_work(logits), device=logits.device)
        _sum_rows[(num_rows,)](
            logits, logits.stride(0), *_shared(logits, order, chunk, tables), mass_I, largest_I, end_R, logprob_R2,
            log_total_R, least=LEAST, **_constants(logits, order),
        )  # fmt: skip
    return Sums(mass_I, end_R, logprob_R2), log_total_R


def gradient(logits: Tensor, order: Order, chunk: Chunk, tables: Tables, given: Backward) -> Tensor:
    """Compute `kernel_twins.gradient`."""
    made = logits if given.in_place else torch.empty_like(logits)
    if num_rows := len(logits):
        coefficient_I = torch.empty(len(chunk.cells.first_I), dtype=_work(logits), device=logits.device)
        grads = (part.contiguous() for part in given.grad_sums)
        _spread_rows[(num_rows,)](
            logits, logits.stride(0), made, made.stride(0), *_shared(logits, order, chunk, tables), given.sums.mass_I,
            given.sums.end_R, given.log_total_R, *grads, coefficient_I, **_constants(logits, order),
        )  # fmt: skip
    return made


def take_rows(matrix: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `kernel_twins.take_rows`."""
    taken = torch.empty(len(index), matrix.shape[1], dtype=dtype, device=matrix.device)
    _take_rows[(len(index),)](matrix.contiguous(), index, taken, matrix.shape[1], block=TILE)
    return taken


def _shared(logits: Tensor, order: Order, chunk: Chunk, tables: Tables) -> tuple[Any, ...]:
    """Return the arguments that both passes have in common, without the logits."""
    assert logits.stride(1) == 1
    columns = order.columns
    counts = len(columns.token_C), columns.num_text_tokens, columns.num_end
    rows = *chunk.rows, tables.first_N, tables.last_N
    return columns.token_C, tables.common_C, *counts, *rows, chunk.cells.tokens_R2, columns.column_V


def _constants(logits: Tensor, order: Order) -> dict[str, Any]:
    is_double = logits.dtype == torch.float64
    work = tl.float64 if is_double else tl.float32
    floor = _NO_FLOOR if is_double else MIN_LOGIT
    return {"in_order": order.in_order, "work": work, "floor": floor, "tile": TILE, "cells": CELLS}


def _work(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


KERNELS = Kernels(list_cells, sums, gradient, take_rows)
