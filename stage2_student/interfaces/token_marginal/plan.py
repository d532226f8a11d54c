"""What the token-marginal interface sums over, made in the data path: rows, their cells, and what each cell feeds.

A row is a state of the student that predicts a token; `pipeline.covering.covering` says which column ranges of its
softmax feed which symbol of which position. A cell is a range that no deeper node of its row divides: the cells of a
row are disjoint and hold all columns that spell bytes, and what a node holds is its own cells and all that lies deeper
(`row_cells` finds them).

Rows are taken by stretches: the tokens between two that spell nothing (control tokens), since no token reaches across
one. Of a stretch only those rows count that reach a supervised position.

Shape legend: L tokens of a document (start token included), S stretches, R rows, I cells of all rows in turn, Q
positions of all stretches, P supervised byte positions, U of them that differ, D most nodes of a row (depth 0 is the
root).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.covering.vocabulary import Vocabulary
from schemas import END
from stage2_student.data.examples import NO_LABEL, Encoded, Example
from stage2_student.interfaces.token_marginal.row_cells import row_cells

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


class _Stretch(NamedTuple):
    """The rows that count of one stretch of one document."""

    document: int
    states: np.ndarray  # of the document, one for each row
    offsets: np.ndarray  # of the rows, in the stretch's bytes
    spelled: bytes


class _Text(NamedTuple):
    """The bytes of all stretches in turn, and where rows stand in them. Indices are int64."""

    bytes_: np.ndarray  # uint8
    num_rows_S: np.ndarray
    byte_R: np.ndarray  # of its stretch
    at_R: np.ndarray  # of the text
    end_R: np.ndarray  # where the row's stretch ends

    @classmethod
    def of(cls, stretches: Sequence[_Stretch]) -> "_Text":
        num_rows_S = np.array([len(stretch.offsets) for stretch in stretches], dtype=np.int64)
        length_S = np.array([len(stretch.spelled) for stretch in stretches], dtype=np.int64)
        end_S, byte_R = np.cumsum(length_S), _joined([stretch.offsets for stretch in stretches])
        return cls(
            np.frombuffer(b"".join(stretch.spelled for stretch in stretches), dtype=np.uint8),
            num_rows_S,
            byte_R,
            byte_R + (end_S - length_S).repeat(num_rows_S),
            end_S.repeat(num_rows_S),
        )


def make_plan(
    vocabulary: Vocabulary,
    token_lengths: np.ndarray,
    documents: Sequence[Encoded],
    examples: Sequence[Example],
    firsts: Sequence[int],
) -> Plan:
    """The plan of a micro-batch.

    Args:
        vocabulary: of the student.
        token_lengths: bytes by token id; 0 for a token that spells nothing.
        firsts: of each document the first of its states, as in `Layout`; ascending.
    """
    stretches = [
        stretch
        for index, (document, example) in enumerate(zip(documents, examples, strict=True))
        for stretch in _stretches(vocabulary, token_lengths, index, document, example)
    ]
    text = _Text.of(stretches)
    paths = vocabulary.trie.walk(text.bytes_, text.at_R, text.end_R)
    offset_R, realised = _positions(stretches, text, paths.num_nodes_R)
    asked_U, unique_P = np.unique(
        _supervised_positions(token_lengths, documents, examples, stretches, offset_R), return_inverse=True
    )
    unique_Q = np.full(len(realised), len(asked_U), dtype=np.int64)
    unique_Q[asked_U] = np.arange(len(asked_U))
    cells = row_cells(vocabulary.trie, paths, offset_R, unique_Q, len(asked_U))
    # No row that counts follows a stretch's last.
    next_tokens = [np.append(documents[s.document].tokens[s.states[:-1]], NO_TOKEN) for s in stretches]
    arrays = {
        "state_R": _joined([firsts[stretch.document] + stretch.states for stretch in stretches]),
        "next_R": _joined(next_tokens),
        "offset_R": offset_R,
        "num_nodes_R": paths.num_nodes_R,
        "depth_D": np.arange(int(paths.num_nodes_R.max(initial=1))),
        **cells._asdict(),
        "realised_Q": np.frombuffer(realised, dtype=np.uint8).astype(np.int64),
        "unique_Q": unique_Q,
        "asked_U": asked_U,
        "unique_P": unique_P,
    }
    return Plan(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _positions(stretches: Sequence[_Stretch], text: _Text, num_nodes_R: np.ndarray) -> tuple[np.ndarray, bytes]:
    """(offset_R, realised): where the rows stand among the positions of all stretches, and the document's symbol at
    each of these.

    A stretch's positions begin at its first row, and end where the last token does that any row could have.
    """
    first_row_S = np.cumsum(text.num_rows_S) - text.num_rows_S
    start_S = text.byte_R[first_row_S]
    reach_R = text.byte_R + num_nodes_R
    length_S = (np.maximum.reduceat(reach_R, first_row_S) if stretches else start_S) - start_S
    realised = b"".join(
        stretch.spelled[start : start + length].ljust(length, bytes([END]))
        for stretch, start, length in zip(stretches, start_S.tolist(), length_S.tolist(), strict=True)
    )
    return text.byte_R + (np.cumsum(length_S) - length_S - start_S).repeat(text.num_rows_S), realised


def _stretches(
    vocabulary: Vocabulary, token_lengths: np.ndarray, index: int, document: Encoded, example: Example
) -> Iterator[_Stretch]:
    """The stretches of a document in which anything is supervised."""
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
        # Rows before it that may have tokens which reach to it.
        first = int(np.searchsorted(offsets, offsets[used[0]] - vocabulary.longest))
        rows = np.arange(first, used[-1] + 1)
        yield _Stretch(index, before + 1 + rows, offsets[rows], spelled)


def _supervised_positions(
    token_lengths: np.ndarray,
    documents: Sequence[Encoded],
    examples: Sequence[Example],
    stretches: Sequence[_Stretch],
    offset_R: np.ndarray,
) -> np.ndarray:
    """P: where each supervised byte or END lies among the Q positions."""
    position_L = [np.full(len(example.tokens_L), -1, dtype=np.int64) for example in examples]
    row = 0
    for stretch in stretches:
        position_L[stretch.document][stretch.states] = offset_R[row : row + len(stretch.states)]
        row += len(stretch.states)
    found = []
    for document, example, position in zip(documents, examples, position_L, strict=True):
        # What a tokenizer puts before a document is cut off its first tokens' spans; in the tokens it is there.
        cut_L = np.append(token_lengths[document.tokens] - (document.ends - document.starts), 0)
        cut_P = np.where(example.symbols_P == END, 0, cut_L[example.state_P])
        found.append(position[example.state_P] + cut_P + example.offset_P)
    return _joined(found)
