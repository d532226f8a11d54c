"""What the token-marginal interface sums over, made in the data path: rows, their cells, and what each cell feeds.

A row is a state of the student that predicts a token; `pipeline.covering` says which column ranges of its softmax feed which symbol
of which position. A cell is a range that no deeper node of its row divides: the cells of a row are disjoint and hold all columns
that spell bytes, and what a node holds is its own cells and all that lies deeper.

Rows are taken by stretches: the tokens between two that spell nothing (control tokens), since no token reaches across one. Of a
stretch only those rows count that reach a supervised position.

Shape legend: L tokens of a document (start token included), R rows, N nodes, I cells of all rows in turn, Q positions of all
stretches, P supervised byte positions, U of them that differ, D most nodes of a row (depth 0 is the root).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.covering import Covering
from pipeline.intervals import Intervals
from pipeline.vocabulary import Vocabulary
from schemas import END, NUM_SYMBOLS
from stage2_student.batches import NO_LABEL, Encoded, Example

NO_TOKEN = -1


class Plan(NamedTuple):
    """The rows of a micro-batch and their cells."""

    state_R: Tensor  # int64, index into the flattened B x L states, ascending
    next_R: Tensor  # int64, the canonical token that follows; NO_TOKEN where no row that counts follows it
    offset_R: Tensor  # int64, the position where the row's path ends; its node of depth d lies d further on
    num_nodes_R: Tensor  # int64
    depth_D: Tensor  # int64, 0 1 2 ...
    num_cells_R: Tensor  # int64
    first_I: Tensor  # int32; a cell is the columns first .. last - 1
    last_I: Tensor  # int32
    node_I: Tensor  # int32, row * D + depth
    fed_I: Tensor  # int32, u * 256 + the symbol that it feeds; U * 256 where it feeds nothing that is asked for
    is_exact_I: Tensor  # bool, a single token that ends at the node's position
    realised_Q: Tensor  # int64, the document's symbol
    unique_Q: Tensor  # int64, which of the U the position is; U where it is not asked for
    asked_U: Tensor  # int64, of Q
    unique_P: Tensor  # int64, of U


class _Part(NamedTuple):
    """Consecutive rows of a stretch. Positions count from the first row's offset."""

    first_state: int
    intervals: Intervals
    symbols_I: np.ndarray  # of the intervals
    realised: bytes


def make_plan(
    vocabulary: Vocabulary,
    token_lengths: np.ndarray,
    documents: Sequence[Encoded],
    examples: Sequence[Example],
    firsts: Sequence[int],
) -> Plan:
    """The plan of a micro-batch.

    Args:
        firsts: of each document the first of its states, as in `Layout`; ascending.
        vocabulary: of the student.
        token_lengths: bytes by token id; 0 for a token that spells nothing.
    """
    parts: list[_Part] = []
    states, positions = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    base = 0
    for document, example, first in zip(documents, examples, firsts, strict=True):
        position_L = np.full(len(example.tokens_L), -1, dtype=np.int64)
        for part in _parts(vocabulary, token_lengths, document, example, base):
            state_R = part.first_state + np.arange(part.intervals.num_rows)
            position_L[state_R] = part.intervals.offsets_R
            states.append(state_R + first)
            parts.append(part)
            base += len(part.realised)
        positions.append(_supervised_positions(position_L, token_lengths, document, example))
    nothing = _Part(0, Covering(vocabulary, [], b"").intervals([]), np.empty(0, dtype=np.int64), b"")
    return _assemble(vocabulary, [nothing, *parts], np.concatenate(states), np.concatenate(positions))


def _supervised_positions(
    position_L: np.ndarray, token_lengths: np.ndarray, document: Encoded, example: Example
) -> np.ndarray:
    """P: where each supervised byte or END lies."""
    # What a tokenizer puts before a document is cut off its first tokens' spans; in the tokens it is there.
    cut_L = np.append(token_lengths[document.tokens] - (document.ends - document.starts), 0)
    cut_P = np.where(example.symbols_P == END, 0, cut_L[example.state_P])
    position_P: np.ndarray = position_L[example.state_P] + cut_P + example.offset_P
    return position_P


def _parts(
    vocabulary: Vocabulary, token_lengths: np.ndarray, document: Encoded, example: Example, base: int
) -> Iterator[_Part]:
    """The rows that are needed, of each stretch; the first part's positions start at `base`, those of others behind it."""
    is_used_L = example.labels_L != NO_LABEL
    is_used_L[example.state_P] = True
    controls = np.flatnonzero(token_lengths[document.tokens] == 0).tolist()
    for before, after in pairwise([-1, *controls, len(document.tokens)]):
        used = np.flatnonzero(is_used_L[before + 1 : after + 1])
        if not len(used):
            continue
        columns = vocabulary.column[document.tokens[before + 1 : after]].tolist()
        spelled = b"".join(vocabulary.sorted_bytes[column] for column in columns)
        covering = Covering(vocabulary, document.tokens[before + 1 : after].tolist(), spelled)
        first = int(np.searchsorted(covering.offsets, covering.offsets[used[0]] - vocabulary.longest))
        offsets = covering.offsets[first : used[-1] + 1]
        intervals = covering.intervals(offsets)
        symbols_I = covering.labels(offsets)
        # A token may reach past the last row that is needed.
        length = int(intervals.positions_N.max() - offsets[0]) + 1
        shift = base - offsets[0]
        intervals = intervals._replace(positions_N=intervals.positions_N + shift, offsets_R=intervals.offsets_R + shift)
        realised = spelled[offsets[0] : offsets[0] + length].ljust(length, bytes([END]))
        yield _Part(before + 1 + first, intervals, symbols_I, realised)
        base += length


def _assemble(vocabulary: Vocabulary, parts: Sequence[_Part], state_R: np.ndarray, position_P: np.ndarray) -> Plan:
    intervals = Intervals.join([part.intervals for part in parts])
    symbols_I = np.concatenate([part.symbols_I for part in parts])
    realised_Q = np.frombuffer(b"".join(part.realised for part in parts), dtype=np.uint8).astype(np.int64)
    asked_U, unique_P = np.unique(position_P, return_inverse=True)
    unique_Q = np.full(len(realised_Q), len(asked_U), dtype=np.int64)
    unique_Q[asked_U] = np.arange(len(asked_U))
    last_R = np.cumsum([part.intervals.num_rows for part in parts])[1:] - 1
    next_R = vocabulary.order[intervals.columns_R]
    next_R[last_R] = NO_TOKEN
    arrays = {
        "state_R": state_R,
        "next_R": next_R,
        "offset_R": intervals.offsets_R,
        "num_nodes_R": np.diff(intervals.row_nodes),
        **_cells(intervals, symbols_I, unique_Q, len(asked_U)),
        "realised_Q": realised_Q,
        "unique_Q": unique_Q,
        "asked_U": asked_U,
        "unique_P": unique_P,
    }
    return Plan(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _cells(intervals: Intervals, symbols_I: np.ndarray, unique_Q: np.ndarray, num_unique: int) -> dict[str, np.ndarray]:
    """The intervals that are not a deeper node as a whole."""
    node_cuts, row_nodes = intervals.node_cuts, intervals.row_nodes
    num_nodes = len(node_cuts) - 1
    sizes_N = np.diff(node_cuts) - 1
    is_first = np.ones(len(intervals.cuts_K), dtype=bool)
    is_first[node_cuts[1:] - 1] = False  # a node's last cut begins no interval
    starts = np.flatnonzero(is_first)
    first_I, last_I = intervals.cuts_K[starts], intervals.cuts_K[starts + 1]
    # The range of each node is one interval of the next, but for the root, the last of its row.
    deeper_first_N = np.full(num_nodes, -1, dtype=np.int64)
    deeper_first_N[1:] = intervals.cuts_K[node_cuts[:-2]]
    deeper_first_N[row_nodes[:-1]] = -1
    before_N = (node_cuts[:-1] - np.arange(num_nodes)).repeat(sizes_N)  # of intervals
    is_exact_I = np.arange(len(first_I)) - before_N < intervals.num_exact_N.repeat(sizes_N)
    is_cell_I = first_I != deeper_first_N.repeat(sizes_N)
    row_N = np.arange(intervals.num_rows).repeat(np.diff(row_nodes))
    depth_N = intervals.positions_N - intervals.offsets_R[row_N]
    most_nodes = int(np.diff(row_nodes).max(initial=1))
    unique_I = unique_Q[intervals.positions_N].repeat(sizes_N)
    is_fed_I = ~is_exact_I & (unique_I < num_unique)
    fed_I = np.where(is_fed_I, unique_I * NUM_SYMBOLS + symbols_I, num_unique * NUM_SYMBOLS)
    return {
        "depth_D": np.arange(most_nodes),
        "num_cells_R": np.bincount(row_N.repeat(sizes_N)[is_cell_I], minlength=intervals.num_rows),
        "first_I": first_I[is_cell_I].astype(np.int32),
        "last_I": last_I[is_cell_I].astype(np.int32),
        "node_I": (row_N * most_nodes + depth_N).repeat(sizes_N)[is_cell_I].astype(np.int32),
        "fed_I": fed_I[is_cell_I].astype(np.int32),
        "is_exact_I": is_exact_I[is_cell_I],
    }
