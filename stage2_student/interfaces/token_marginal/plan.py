"""The plan of the token-marginal sums, made in the data path: rows, their cells, and the symbol each cell feeds.

A row is a state of the student that predicts a token; `pipeline.covering.covering` says which column ranges of its
softmax feed which symbol of which position. A cell is a range that no deeper node of its row divides: the cells of a
row are disjoint and cover all columns that spell bytes; a node's mass is its own cells and those of all deeper nodes
(`row_cells` finds them).

Rows come by spans: the tokens between two that spell nothing (control tokens), since no token reaches across one.
Of a span, only the rows that reach a supervised position count.

Shape legend: L tokens of a document (including the start token), S spans, R rows, I cells of all rows in turn, Q
positions of all spans, P supervised byte positions, U distinct ones among these, D maximum number of nodes of a row
(depth 0 is the root).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.trie import Paths
from pipeline.covering.vocabulary import Vocabulary
from schemas import END
from stage2_student.data.examples import NO_LABEL, Encoded, Example
from stage2_student.interfaces.token_marginal.row_cells import row_cells

NO_TOKEN = -1


class Plan(NamedTuple):
    """The rows of a micro-batch and their cells."""

    state_R: Tensor  # int64, index into the flattened B x L states, ascending
    next_R: Tensor  # int64, the canonical token that follows; NO_TOKEN if no row that counts comes after it
    offset_R: Tensor  # int64, the position where the row's path ends; its node of depth d is d positions later
    num_nodes_R: Tensor  # int64
    depth_D: Tensor  # int64, 0 1 2 ...
    num_cells_R: Tensor  # int64
    first_I: Tensor  # int32; a cell is the columns first .. last - 1
    last_I: Tensor  # int32
    node_I: Tensor  # int32, row * D + depth
    fed_I: Tensor  # int32, u * 256 + the symbol that it feeds; U * 256 if it feeds no requested position
    is_complete_I: Tensor  # bool, a single token that ends at the node's position
    realised_Q: Tensor  # int64, the document's symbol
    unique_Q: Tensor  # int64, index of the position among the U; U if it is not requested
    asked_U: Tensor  # int64, index among the Q
    unique_P: Tensor  # int64, index among the U


class _CoveredSpan(NamedTuple):
    """The rows that count in one span of one document."""

    document: int
    states: np.ndarray  # the document's states, one for each row
    offsets: np.ndarray  # the rows' offsets in the span's bytes
    spelled: bytes


class _Text(NamedTuple):
    """The bytes of all spans in turn, and the rows' places in them. Indices are int64."""

    bytes_: np.ndarray  # uint8
    num_rows_S: np.ndarray
    byte_R: np.ndarray  # offset in its span
    at_R: np.ndarray  # offset in the text
    end_R: np.ndarray  # where the row's span ends

    @classmethod
    def of(cls, spans: Sequence[_CoveredSpan]) -> "_Text":
        num_rows_S = np.array([len(span.offsets) for span in spans], dtype=np.int64)
        length_S = np.array([len(span.spelled) for span in spans], dtype=np.int64)
        end_S, byte_R = np.cumsum(length_S), _joined([span.offsets for span in spans])
        return cls(
            np.frombuffer(b"".join(span.spelled for span in spans), dtype=np.uint8),
            num_rows_S,
            byte_R,
            byte_R + (end_S - length_S).repeat(num_rows_S),
            end_S.repeat(num_rows_S),
        )


class Walk(NamedTuple):
    """The rows of a micro-batch that count, and where they lead; fields as in `Plan`."""

    state_R: np.ndarray
    next_R: np.ndarray
    offset_R: np.ndarray
    paths: Paths  # the rows' nodes in the vocabulary's trie
    realised: bytes  # by position
    asked_U: np.ndarray
    unique_P: np.ndarray

    @property
    def max_nodes(self) -> int:
        """Return D."""
        return int(self.paths.num_nodes_R.max(initial=1))

    def unique_positions(self) -> np.ndarray:
        """Return `unique_Q` of `Plan`."""
        unique_Q = np.full(len(self.realised), len(self.asked_U), dtype=np.int64)
        unique_Q[self.asked_U] = np.arange(len(self.asked_U))
        return unique_Q


def make_walk(
    vocabulary: Vocabulary,
    token_lengths: np.ndarray,
    documents: Sequence[Encoded],
    examples: Sequence[Example],
    firsts: Sequence[int],
) -> Walk:
    """Find the rows of a micro-batch, and follow its text from each through the vocabulary's trie.

    Args:
        vocabulary: the student's.
        token_lengths: bytes by token id; 0 for a token that spells nothing.
        firsts: index of each document's first state, as in `Layout`; ascending.
    """
    spans = [
        span
        for index, (document, example) in enumerate(zip(documents, examples, strict=True))
        for span in _spans(vocabulary, token_lengths, index, document, example)
    ]
    text = _Text.of(spans)
    paths = vocabulary.trie.walk(text.bytes_, text.at_R, text.end_R)
    offset_R, realised = _positions(spans, text, paths.num_nodes_R)
    asked_U, unique_P = np.unique(
        _supervised_positions(token_lengths, documents, examples, spans, offset_R), return_inverse=True
    )
    # No row that counts follows the last of a span.
    next_tokens = [np.append(documents[s.document].tokens[s.states[:-1]], NO_TOKEN) for s in spans]
    states = [firsts[span.document] + span.states for span in spans]
    return Walk(_joined(states), _joined(next_tokens), offset_R, paths, realised, asked_U, unique_P)


def make_plan(vocabulary: Vocabulary, walk: Walk) -> Plan:
    """Make the plan of a micro-batch from its walk through the vocabulary."""
    unique_Q = walk.unique_positions()
    cells = row_cells(vocabulary.trie, walk.paths, walk.offset_R, unique_Q, len(walk.asked_U))
    arrays = {
        "state_R": walk.state_R,
        "next_R": walk.next_R,
        "offset_R": walk.offset_R,
        "num_nodes_R": walk.paths.num_nodes_R,
        "depth_D": np.arange(walk.max_nodes),
        **cells._asdict(),
        "realised_Q": np.frombuffer(walk.realised, dtype=np.uint8).astype(np.int64),
        "unique_Q": unique_Q,
        "asked_U": walk.asked_U,
        "unique_P": walk.unique_P,
    }
    return Plan(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _positions(spans: Sequence[_CoveredSpan], text: _Text, num_nodes_R: np.ndarray) -> tuple[np.ndarray, bytes]:
    """Return (offset_R, realised): the rows' positions among those of all spans, and the symbol at each.

    The symbols are the document's. A span's positions begin at its first row, and end where the longest token of any
    row could end.
    """
    first_row_S = np.cumsum(text.num_rows_S) - text.num_rows_S
    start_S = text.byte_R[first_row_S]
    reach_R = text.byte_R + num_nodes_R
    length_S = (np.maximum.reduceat(reach_R, first_row_S) if spans else start_S) - start_S
    realised = b"".join(
        span.spelled[start : start + length].ljust(length, bytes([END]))
        for span, start, length in zip(spans, start_S.tolist(), length_S.tolist(), strict=True)
    )
    return text.byte_R + (np.cumsum(length_S) - length_S - start_S).repeat(text.num_rows_S), realised


def _spans(
    vocabulary: Vocabulary, token_lengths: np.ndarray, index: int, document: Encoded, example: Example
) -> Iterator[_CoveredSpan]:
    """Yield the spans of a document in which anything is supervised."""
    is_used_L = example.labels_L != NO_LABEL
    is_used_L[example.state_P] = True
    lengths = token_lengths[document.tokens]
    for before, after in pairwise([-1, *np.flatnonzero(lengths == 0).tolist(), len(document.tokens)]):
        used = np.flatnonzero(is_used_L[before + 1 : after + 1])
        if not len(used):
            continue
        columns = vocabulary.column[document.tokens[before + 1 : after]].tolist()
        spelled = b"".join([vocabulary.sorted_bytes[column] for column in columns])
        offsets = np.concatenate([[0], np.cumsum(lengths[before + 1 : after])])
        # From the first row whose tokens may reach it.
        first = int(np.searchsorted(offsets, offsets[used[0]] - vocabulary.longest))
        rows = np.arange(first, used[-1] + 1)
        yield _CoveredSpan(index, before + 1 + rows, offsets[rows], spelled)


def _supervised_positions(
    token_lengths: np.ndarray,
    documents: Sequence[Encoded],
    examples: Sequence[Example],
    spans: Sequence[_CoveredSpan],
    offset_R: np.ndarray,
) -> np.ndarray:
    """Return P: the index of each supervised byte or END among the Q positions."""
    position_L = [np.full(len(example.tokens_L), -1, dtype=np.int64) for example in examples]
    row = 0
    for span in spans:
        position_L[span.document][span.states] = offset_R[row : row + len(span.states)]
        row += len(span.states)
    positions = []
    for document, example, position in zip(documents, examples, position_L, strict=True):
        # A tokenizer's prefix is cut off the first tokens' spans, but not off the tokens.
        cut_L = np.append(token_lengths[document.tokens] - (document.ends - document.starts), 0)
        cut_P = np.where(example.symbols_P == END, 0, cut_L[example.state_P])
        positions.append(position[example.state_P] + cut_P + example.offset_P)
    return _joined(positions)
