"""The row reduction on a GPU, in Triton: from logits, read once, to probabilities of column ranges.

The first kernel reads each row in byte order, which is a gather within the row, keeps its running maximum and total,
and writes the sum of every 32 columns (1/32 of what it read). The second adds up those sums for each range, and rereads
only the up to 31 columns at either end. Nothing is copied into byte order: of 128,256 columns a row is read once (513
KB), 16 KB of sums are written and read, and 350 ranges reread up to 358 KB (a sector of 32 bytes for each column); a
copy in byte order would add 1,026 KB. All are sums over the inside of a range, never differences of running sums, so
that small masses keep their precision.

`tests/stage1_teacher/reduction/test_triton_kernel.py` compares it with the slow twin, on a GPU or under Triton's
interpreter; `python -m tests.bench.kernel` times it.

Shape legend: R rows, V token ids, C sorted columns, B blocks of 32 columns, T tiles of `TILE` columns, J ranges, K
most probable tokens of a row.
"""

# mypy: disable-error-code=no-untyped-def

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.covering.covering import MIN_LOGIT
from pipeline.covering.intervals import Intervals
from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.device_trie import DeviceTrie
from stage1_teacher.reduction.types import NOT_FINITE, DeviceMasses

BLOCK = 32  # columns: 128 bytes of float32, a cache line
TILE = 4096  # columns in flight for one row
RANGES = 16  # ranges per program
BLOCKS_AT_ONCE = 64


# Triton reads a kernel's source, and allows no annotations in it but its own.
@triton.jit
def _exp_at_most_0(logits, floor: tl.constexpr):
    return tl.exp(tl.maximum(logits, floor))


@triton.jit
def _stream_rows(
    logits_RV,
    row_stride,
    order_C,
    width,
    block_sums_RB,
    num_blocks,
    tile_max_RT,
    num_tiles,
    row_max_R,
    total_R,
    floor: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    """Stream one row per program. A tile's block sums are relative to the largest logit up to and including it."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    is_number = tl.full((), 1, tl.int32)  # a maximum ignores nan
    tile_blocks = tl.arange(0, tile // block)
    for t in range(num_tiles):
        blocks = t * (tile // block) + tile_blocks
        columns = blocks[:, None] * block + tl.arange(0, block)[None, :]
        inside = columns < width
        ids = tl.load(order_C + columns, mask=inside, other=0)
        logits = tl.load(logits_RV + row * row_stride + ids, mask=inside, other=-float("inf"))
        is_number = tl.minimum(is_number, tl.min(tl.min((logits == logits).to(tl.int32), axis=1), axis=0))
        before = largest
        largest = tl.maximum(largest, tl.max(logits))
        probs = tl.where(inside, _exp_at_most_0(logits - largest, floor), 0.0)
        sums = tl.sum(probs, axis=1)
        tl.store(block_sums_RB + row * num_blocks + blocks, sums, mask=blocks < num_blocks)
        tl.store(tile_max_RT + row * num_tiles + t, largest)
        total = total * tl.exp(before - largest) + tl.sum(sums, axis=0)
    tl.store(row_max_R + row, tl.where(is_number == 1, largest, float("nan")))
    tl.store(total_R + row, total)


@triton.jit
def _sum_ranges(
    logits_RV,
    row_stride,
    order_C,
    block_sums_RB,
    num_blocks,
    tile_max_RT,
    num_tiles,
    row_max_R,
    total_R,
    row_J,
    first_J,
    last_J,
    num_ranges,
    probs_J,
    floor: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    ranges: tl.constexpr,
    blocks_at_once: tl.constexpr,
):
    """Sum `ranges` ranges per program, of any rows."""
    j = tl.program_id(0) * ranges + tl.arange(0, ranges)
    real = j < num_ranges
    row = tl.load(row_J + j, mask=real, other=0).to(tl.int64)
    first = tl.load(first_J + j, mask=real, other=0)
    last = tl.load(last_J + j, mask=real, other=0)
    largest = tl.load(row_max_R + row)
    # Whole blocks are first_block .. last_block; less than a block of columns lies before and after them.
    first_block = (first + block - 1) // block
    last_block = tl.maximum(last // block, first_block)
    lane = tl.arange(0, block)
    head = first[:, None] + lane[None, :]
    in_head = head < tl.minimum(first_block * block, last)[:, None]
    tail = (last_block * block)[:, None] + lane[None, :]
    in_tail = tail < last[:, None]
    row_logits = logits_RV + row[:, None] * row_stride
    head_ids = tl.load(order_C + head, mask=in_head, other=0)
    tail_ids = tl.load(order_C + tail, mask=in_tail, other=0)
    head_logits = tl.load(row_logits + head_ids, mask=in_head, other=0.0) - largest[:, None]
    tail_logits = tl.load(row_logits + tail_ids, mask=in_tail, other=0.0) - largest[:, None]
    edges = tl.where(in_head, _exp_at_most_0(head_logits, floor), 0.0)
    edges += tl.where(in_tail, _exp_at_most_0(tail_logits, floor), 0.0)
    mass = tl.sum(edges, axis=1)
    whole = tl.zeros((ranges, blocks_at_once), dtype=tl.float32)
    for start in range(0, tl.max(last_block - first_block, axis=0), blocks_at_once):
        blocks = (first_block + start)[:, None] + tl.arange(0, blocks_at_once)[None, :]
        inside = blocks < last_block[:, None]
        sums = tl.load(block_sums_RB + row[:, None] * num_blocks + blocks, mask=inside, other=0.0)
        at = tl.load(tile_max_RT + row[:, None] * num_tiles + blocks // (tile // block), mask=inside, other=0.0)
        whole += tl.where(inside, sums * tl.exp(at - largest[:, None]), 0.0)
    mass += tl.sum(whole, axis=1)
    tl.store(probs_J + j, mass / tl.load(total_R + row), mask=real)


def range_probs(
    logits_RV: Tensor, order_C: Tensor, row_J: Tensor, first_J: Tensor, last_J: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the softmax of row `row_J` over columns `first_J .. last_J`: J float32; 0 for an empty range.

    Args:
        logits_RV: float32, by token id, with contiguous ids.
        order_C: int32, the token id of each column.
        row_J, first_J, last_J: int32, all on the same device.

    Returns:
        The sums, and whether all logits were finite but for those of minus infinity (a boolean on the device).
    """
    num_rows, width = logits_RV.shape
    num_blocks, num_tiles = triton.cdiv(width, BLOCK), triton.cdiv(width, TILE)
    block_sums_RB = logits_RV.new_empty(num_rows, num_blocks)
    tile_max_RT = logits_RV.new_empty(num_rows, num_tiles)
    row_max_R, total_R = logits_RV.new_empty(num_rows), logits_RV.new_empty(num_rows)
    probs_J = logits_RV.new_empty(len(row_J))
    sizes = {"floor": MIN_LOGIT, "tile": TILE, "block": BLOCK}
    stride = logits_RV.stride(0)
    _stream_rows[(num_rows,)](
        logits_RV,
        stride,
        order_C,
        width,
        block_sums_RB,
        num_blocks,
        tile_max_RT,
        num_tiles,
        row_max_R,
        total_R,
        **sizes,
    )
    _sum_ranges[(triton.cdiv(len(row_J), RANGES),)](
        logits_RV,
        stride,
        order_C,
        block_sums_RB,
        num_blocks,
        tile_max_RT,
        num_tiles,
        row_max_R,
        total_R,
        row_J,
        first_J,
        last_J,
        len(row_J),
        probs_J,
        ranges=RANGES,
        blocks_at_once=BLOCKS_AT_ONCE,
        **sizes,
    )
    return probs_J, torch.isfinite(row_max_R).all()


class TritonKernel:
    """The kernel for logits on a GPU; see `stage1_teacher.reduction.types.Kernel`."""

    def __init__(self, vocabulary: Vocabulary, device: torch.device) -> None:
        self._device = device
        self._order_C, self._column_V = (
            torch.from_numpy(ids.astype(np.int32)).to(device) for ids in (vocabulary.order, vocabulary.column)
        )
        self._trie = DeviceTrie.of(vocabulary.trie, device)
        self._ends = (vocabulary.num_text_tokens, vocabulary.num_text_tokens + vocabulary.num_end)
        self._finite: list[Tensor] = []

    def empty(self, intervals: Intervals, num_top: int = 0) -> DeviceMasses:
        return DeviceMasses.empty(intervals, num_top, self._device)

    def check(self) -> None:
        """Wait for the device, once for all chunks of a step."""
        finite, self._finite = self._finite, []
        if finite and not bool(torch.stack(finite).all()):
            raise ValueError(NOT_FINITE)

    def __call__(self, logits_RV: Tensor, first_row: int, intervals: Intervals, into: DeviceMasses) -> None:
        num_rows, width = logits_RV.shape
        some = intervals.some_rows(first_row, first_row + num_rows)
        start, stop = (int(into.row_intervals[row]) for row in (first_row, first_row + num_rows))
        nodes_N, row_N, column_R = (
            torch.from_numpy(values).to(self._device)
            for values in (some.nodes_N, np.arange(num_rows).repeat(np.diff(some.row_nodes)), some.columns_R)
        )
        interval_I, node_I = self._trie.intervals(nodes_N, stop - start)
        row_R = torch.arange(num_rows, device=self._device)
        end_first_R, end_last_R = (torch.full_like(row_R, end) for end in self._ends)
        top_ids_RK = top_tokens(logits_RV, into.top_ids_RK.shape[1])
        # A range of one column each, so that all probabilities of a row are of one arithmetic.
        top_column_J = self._column_V[top_ids_RK].flatten()
        top_row_J = row_R.repeat_interleave(top_ids_RK.shape[1])
        row_J = torch.cat([row_N[node_I], row_R, row_R, top_row_J])
        first_J = torch.cat([self._trie.first_J[interval_I], end_first_R, column_R.clamp(min=0), top_column_J])
        last_J = torch.cat([self._trie.last_J[interval_I], end_last_R, column_R + 1, top_column_J + 1])
        probs_J, is_finite = range_probs(logits_RV, self._order_C, row_J.int(), first_J.int(), last_J.int())
        self._finite.append(is_finite)
        # As on a CPU, no column has less mass than MIN_LOGIT gives: a product of two small factors may be 0.
        probs_J = torch.maximum(probs_J, (last_J - first_J) * (np.exp(MIN_LOGIT) / width))
        rows = slice(first_row, first_row + num_rows)
        into.masses_I[start:stop] = probs_J[: stop - start]
        into.end_R[rows] = probs_J[stop - start : stop - start + num_rows]
        after = stop - start + 2 * num_rows
        into.token_R[rows] = probs_J[stop - start + num_rows : after].where(column_R >= 0, torch.nan)
        into.top_ids_RK[rows] = top_ids_RK.int()
        into.top_logprobs_RK[rows] = probs_J[after:].log().view_as(top_ids_RK)


def top_tokens(logits_RV: Tensor, number: int) -> Tensor:
    """Return the ids of each row's largest logits in descending order, of equal ones the lowest first: R x K, int64.

    Which of several logits equal to the last one are among them is not defined, as it is on a CPU.
    """
    ids_RK = logits_RV.topk(number, dim=1).indices.sort(dim=1).values
    order_RK = logits_RV.gather(1, ids_RK).sort(dim=1, descending=True, stable=True).indices
    return ids_RK.gather(1, order_RK)
