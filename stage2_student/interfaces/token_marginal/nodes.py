"""Rows as nodes of the vocabulary's trie, which is on the device: what is shipped for a row, and the cells made of it.

A row's cells follow from its nodes (`plan`). Here the nodes are what the data path ships, some 80 bytes a token instead
of 7 kB, and the device lists the cells, in the order of the columns.

In that order a column begins a cell if and only if it has no more bytes in common with the column before than the
deepest node of its row that it is under has (`Tables.common_C`): so a kernel that reads a row of logits in byte order
needs the row's nodes alone to tell its cells apart.

Shape legend: R rows, N nodes (of the trie in `Tables`, else of all rows in turn), J intervals of all nodes of the trie
in order, C columns, I cells of all rows in turn, S runs of intervals; D, Q, U, P as in `plan`.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.trie import COMPLETE
from pipeline.covering.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from stage2_student.interfaces.token_marginal.plan import Plan, Walk
from stage2_student.interfaces.token_marginal.types import Cells

FAR = np.iinfo(np.int16).max  # bytes in common with the column before, of columns that begin no cell
_CHUNK = "marginal_chunk_"


class Tables(NamedTuple):
    """The trie on a device. All are int32, but for `symbol_J` and `common_C`, which are int16."""

    start_N: Tensor  # N + 1: node n owns intervals start_N[n] .. start_N[n + 1]; the root is node 0
    first_N: Tensor  # all tokens that begin with the node's prefix: columns first_N .. last_N - 1
    last_N: Tensor
    entered_N: Tensor  # the interval that leads to the node; 0 for the root
    first_J: Tensor
    last_J: Tensor
    symbol_J: Tensor
    common_C: Tensor  # bytes in common with the column before; 0 at the first of END's and of other columns, then FAR

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "Tables":
        """Make the tables of a vocabulary, on the CPU."""
        trie = vocabulary.trie
        leads = np.flatnonzero(trie.child_J != COMPLETE)
        entered_N = np.zeros(len(trie.start_N) - 1, dtype=np.int32)
        entered_N[trie.child_J[leads]] = leads
        first_N, last_N = trie.first_J[entered_N], trie.last_J[entered_N]
        first_N[0], last_N[0] = 0, vocabulary.num_text_tokens
        width, num_text, num_end = len(vocabulary.order), vocabulary.num_text_tokens, vocabulary.num_end
        common_C = np.full(width + 1, FAR, dtype=np.int16)
        # Columns in neighbouring intervals of a node have its prefix in common, and no more.
        depth_J = _depths(trie.start_N, entered_N).repeat(np.diff(trie.start_N))
        is_first_J = np.zeros(len(depth_J), dtype=bool)
        is_first_J[trie.start_N[:-1][np.diff(trie.start_N) > 0]] = True
        common_C[trie.first_J[~is_first_J]] = depth_J[~is_first_J]
        common_C[[0, num_text, num_text + num_end]] = 0
        ints = (trie.start_N, first_N, last_N, entered_N, trie.first_J, trie.last_J)
        start, first, last, entered, first_J, last_J = (torch.from_numpy(array.astype(np.int32)) for array in ints)
        symbol_J, common = torch.from_numpy(trie.symbol_J.astype(np.int16)), torch.from_numpy(common_C[:width])
        return cls(start, first, last, entered, first_J, last_J, symbol_J, common)


class NodePlan(NamedTuple):
    """A `Plan` as it is shipped: nodes instead of cells, in small integers."""

    state_R: Tensor  # int32
    next_R: Tensor  # int32
    offset_R: Tensor  # int32
    num_nodes_R: Tensor  # int16
    num_cells_R: Tensor  # int32
    node_N: Tensor  # int32
    depth_D: Tensor  # int16
    realised_Q: Tensor  # uint8
    asked_U: Tensor  # int32
    unique_P: Tensor  # int32
    row_M: Tensor  # int32, the rows with a label, M


class Rows(NamedTuple):
    """The nodes of consecutive rows, on the device. int32."""

    node_N: Tensor  # of all rows of the plan
    first_node_R: Tensor  # of each row, among these
    num_nodes_R: Tensor
    first_cell_R: Tensor  # of each row, among the cells of these rows
    num_cells_R: Tensor


class Listed(NamedTuple):
    """The cells of rows in the order of their columns; fields as in `Plan`."""

    first_I: Tensor
    last_I: Tensor
    node_I: Tensor
    fed_I: Tensor
    is_complete_I: Tensor


class Chunk(NamedTuple):
    """Consecutive rows whose logits are held at once."""

    rows: Rows
    cells: Cells


def node_plan(
    vocabulary: Vocabulary, walk: Walk, labelled_R: np.ndarray, kept_rows: int, chunk_rows: int
) -> dict[str, Tensor]:
    """Return the fields of the `NodePlan` of a micro-batch, and a tensor without elements for each chunk of its rows.

    The shapes of the latter, (0, rows, cells), are what the host has to know: a device need not be asked.

    Args:
        labelled_R: bool, whether a row's state predicts a supervised token.
        kept_rows: rows of the first chunk, if that is more than `chunk_rows`, the rows of each chunk.
    """
    num_nodes_R = walk.paths.num_nodes_R
    before_N = np.append(0, vocabulary.trie.sizes(walk.paths.node_N).cumsum())
    num_cells_R = np.diff(before_N[np.append(0, num_nodes_R.cumsum())]) - (num_nodes_R - 1)
    arrays = {
        "state_R": walk.state_R.astype(np.int32),
        "next_R": walk.next_R.astype(np.int32),
        "offset_R": walk.offset_R.astype(np.int32),
        "num_nodes_R": num_nodes_R.astype(np.int16),
        "num_cells_R": num_cells_R.astype(np.int32),
        "node_N": walk.paths.node_N.astype(np.int32),
        "depth_D": np.arange(walk.max_nodes, dtype=np.int16),
        "realised_Q": np.frombuffer(walk.realised, dtype=np.uint8).copy(),
        "asked_U": walk.asked_U.astype(np.int32),
        "unique_P": walk.unique_P.astype(np.int32),
        "row_M": np.flatnonzero(labelled_R).astype(np.int32),
    }
    shipped = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # At least one chunk, even if empty: on a rank without supervised tokens the head must still get a (zero) gradient.
    edges = [0, *range(max(kept_rows, chunk_rows), len(num_cells_R), chunk_rows), len(num_cells_R)]
    for number, (first, last) in enumerate(pairwise(edges)):
        some_R = num_cells_R[first:last]
        shipped[f"{_CHUNK}{number}"] = torch.empty(0, len(some_R), int(some_R.sum()))
    return shipped


def _depths(start_N: np.ndarray, entered_N: np.ndarray) -> np.ndarray:
    """Return N: the number of bytes of each node's prefix."""
    parent_N = np.searchsorted(start_N, entered_N, side="right") - 1
    depth_N = np.zeros(len(entered_N), dtype=np.int16)
    below = np.arange(1, len(entered_N))  # nodes that have yet to reach the root
    above = below
    while len(below):
        depth_N[below] += 1
        above = parent_N[above]
        below, above = below[above > 0], above[above > 0]
    return depth_N


def chunk_sizes(shipped: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Return the numbers of rows and of cells of each chunk, from what `node_plan` has shipped."""
    found: list[tuple[int, int]] = []
    while (name := f"{_CHUNK}{len(found)}") in shipped:
        _, num_rows, num_cells = shipped[name].shape
        found.append((num_rows, num_cells))
    return found


def rows_of(nodes: NodePlan) -> Rows:
    """Return the rows of a plan, on its device."""
    num_nodes_R = nodes.num_nodes_R.int()
    first_node_R, first_cell_R = (
        (counts_R.cumsum(0) - counts_R).int() for counts_R in (num_nodes_R, nodes.num_cells_R)
    )
    return Rows(nodes.node_N, first_node_R, num_nodes_R, first_cell_R, nodes.num_cells_R)


def unique_positions(nodes: NodePlan) -> Tensor:
    """Return `unique_Q` of `Plan`; int64."""
    asked_U = nodes.asked_U.long()
    unique_Q = asked_U.new_full((len(nodes.realised_Q),), len(asked_U))
    return unique_Q.index_copy(0, asked_U, torch.arange(len(asked_U), device=asked_U.device))


def plan_of(nodes: NodePlan, unique_Q: Tensor, listed: Listed) -> Plan:
    """Return the plan that stands for nodes, its cells in the order of their columns."""
    return Plan(
        state_R=nodes.state_R.long(),
        next_R=nodes.next_R.long(),
        offset_R=nodes.offset_R.long(),
        num_nodes_R=nodes.num_nodes_R.long(),
        depth_D=nodes.depth_D.long(),
        num_cells_R=nodes.num_cells_R.long(),
        **listed._asdict(),
        realised_Q=nodes.realised_Q.long(),
        unique_Q=unique_Q,
        asked_U=nodes.asked_U.long(),
        unique_P=nodes.unique_P.long(),
    )


def chunks_of(rows: Rows, plan: Plan, tokens_R2: Tensor, sizes: list[tuple[int, int]]) -> list[Chunk]:
    """Cut all rows into chunks of given numbers of rows and cells."""
    found = []
    row, cell = 0, 0
    for num_rows, num_cells in sizes:
        here, inside = slice(row, row + num_rows), slice(cell, cell + num_cells)
        own = Rows(
            rows.node_N,
            rows.first_node_R[here],
            rows.num_nodes_R[here],
            rows.first_cell_R[here] - cell,
            rows.num_cells_R[here],
        )
        cells = Cells(plan.num_cells_R[here], plan.first_I[inside], plan.last_I[inside], tokens_R2[here])
        found.append(Chunk(own, cells))
        row, cell = row + num_rows, cell + num_cells
    return found


def list_cells(nodes: NodePlan, rows: Rows, unique_Q: Tensor, tables: Tables, num_cells: int) -> Listed:
    """List the cells of all rows by torch's own operations, on any device.

    A row's columns in order are, from the root down, the intervals of each node before the one that the row goes on
    into; then, from the deepest up, those after it.
    """
    num_nodes, num_rows = len(nodes.node_N), len(rows.num_nodes_R)
    device = nodes.node_N.device
    row_N = torch.arange(num_rows, device=device).repeat_interleave(rows.num_nodes_R, output_size=num_nodes)
    first_N, num_N = rows.first_node_R[row_N], rows.num_nodes_R[row_N]
    depth_N = torch.arange(num_nodes, device=device) - first_N
    start_N, stop_N = tables.start_N[nodes.node_N], tables.start_N[nodes.node_N + 1]
    into_N = tables.entered_N[nodes.node_N.roll(-1)].where(depth_N + 1 < num_N, stop_N)
    before_N, after_N = 2 * first_N + depth_N, 2 * (first_N + num_N) - 1 - depth_N
    at_S = torch.cat([before_N, after_N]).long()
    size_S, start_S, of_S = (torch.empty(2 * num_nodes, dtype=torch.int64, device=device) for _ in range(3))
    size_S[at_S] = torch.cat([into_N - start_N, (stop_N - into_N - 1).clamp(min=0)]).long()
    start_S[at_S] = torch.cat([start_N, into_N + 1]).long()
    of_S[at_S] = torch.arange(num_nodes, device=device).repeat(2)
    run_I = torch.arange(2 * num_nodes, device=device).repeat_interleave(size_S, output_size=num_cells)
    interval_I = start_S[run_I] + torch.arange(num_cells, device=device) - (size_S.cumsum(0) - size_S)[run_I]
    node_I, symbol_I = of_S[run_I], tables.symbol_J[interval_I].int()
    unique_N = unique_Q[nodes.offset_R[row_N] + depth_N]
    is_complete_I, num_unique = symbol_I == COMPLETE, len(nodes.asked_U)
    is_fed_I = (unique_N[node_I] < num_unique) & ~is_complete_I
    return Listed(
        tables.first_J[interval_I],
        tables.last_J[interval_I],
        (row_N * len(nodes.depth_D) + depth_N)[node_I].int(),
        torch.where(is_fed_I, unique_N[node_I] * NUM_SYMBOLS + symbol_I, num_unique * NUM_SYMBOLS).int(),
        is_complete_I,
    )
