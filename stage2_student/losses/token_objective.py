"""Objectives that compare the student's tokens with the teacher's stored ones (`dump.tokens`).

Each prepares tensors in the data path, from records in the student's tokens, and computes a sum in nats from them and
the student's last hidden states.

Shape legend: R rows (a state of the student beside a token of the teacher's), K classes of a row (padded), A
alternatives of the teacher's tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from schemas.token_alternatives import TokenAlternatives
from stage2_student.data.examples import NO_SYMBOL, Encoded
from stage2_student.data.micro_batch import Layout
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.vocabulary_map import NO_TOKEN, TokenizerPair, translated


class TokenObjective(ABC):
    """An objective on stored tokens.

    Args:
        pair: the tokenizers of teacher and student.
    Raises:
        ValueError: it cannot compare models with these tokenizers.
    """

    name: ClassVar[str]
    uses_nats: ClassVar[bool] = False  # whether it reads `ObjectiveInputs.nats_N`

    def __init__(self, pair: TokenizerPair, train: TrainConfig) -> None:
        self.pair = pair
        self.train = train

    @abstractmethod
    def tensors(self, documents: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
        """Return what it needs of a micro-batch, as part of its `extra`; names begin with the objective's.

        It runs in the data path, on the CPU. Without documents, on a rank that only waits, the tensors are empty.
        """

    @abstractmethod
    def __call__(self, inputs: ObjectiveInputs) -> Tensor:
        """Compute the sum over the micro-batch: a scalar, in nats."""


def stored_tokens(encoded: Encoded) -> TokenAlternatives:
    """Return the teacher's tokens of a record.

    Raises:
        ValueError: its dump holds none.
    """
    tokens = encoded.record.tokens
    if tokens is None:
        raise ValueError(
            f"document {encoded.record.doc_id}: the dump holds no alternatives of the teacher's tokens, which "
            "objectives on tokens need; make it with dump.tokens={top_k: 16}, or use other train.objectives"
        )
    return tokens


class Alternatives(NamedTuple):
    """Alternatives of some of the teacher's tokens: of each, the row, the id and the log-probability."""

    row_A: np.ndarray
    id_A: np.ndarray
    logprob_A: np.ndarray

    @classmethod
    def of(cls, tokens: TokenAlternatives, teacher_R: np.ndarray, top_k: int | None = None) -> "Alternatives":
        """Return the alternatives of these tokens, at most the first `top_k` of each."""
        counts_R = tokens.counts[teacher_R]
        counts_R = counts_R if top_k is None else np.minimum(counts_R, top_k)
        row_A = np.repeat(np.arange(len(teacher_R)), counts_R)
        place_A = np.arange(len(row_A)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
        at_A = tokens.offsets[teacher_R][row_A] + place_A
        return cls(row_A, tokens.ids[at_A].astype(np.int64), tokens.log_probs[at_A].astype(np.float64))

    def mapped(self, map_V: np.ndarray) -> "Alternatives":
        """Return those that map to a token of the other vocabulary, with its ids."""
        id_A = translated(self.id_A, map_V)
        kept = id_A != NO_TOKEN
        return Alternatives(self.row_A[kept], id_A[kept], self.logprob_A[kept])

    def padded(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return R x K ids, ascending, NO_SYMBOL at padding, and log-probabilities; equal ids of a row are summed."""
        width = int(self.id_A.max(initial=0)) + 1
        keys, which_A = np.unique(self.row_A * width + self.id_A, return_inverse=True)
        logprobs = np.log(np.bincount(which_A, np.exp(self.logprob_A), len(keys)))
        row, ids = keys // width, keys % width
        counts_R = np.bincount(row, minlength=num_rows)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
        shape = (num_rows, max(1, int(counts_R.max(initial=1))))
        ids_RK, logprobs_RK = np.full(shape, NO_SYMBOL, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        ids_RK[row, place], logprobs_RK[row, place] = ids, logprobs
        return ids_RK, logprobs_RK


class Rows(NamedTuple):
    """States of the student, each with a target: classes of its own vocabulary, and the rest as one.

    Attributes:
        state_R: of the document's states; `l` predicts its token `l`.
    """

    state_R: np.ndarray
    ids_RK: np.ndarray
    logprobs_RK: np.ndarray

    @classmethod
    def none(cls) -> "Rows":
        """Return no rows."""
        return cls(np.empty(0, np.int64), np.empty((0, 1), np.int64), np.empty((0, 1), np.float32))

    def joined(self, *others: "Rows") -> "Rows":
        """Return these rows and the others', padded alike."""
        return joined((self, *others))


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, padded alike."""
    width = max((rows.ids_RK.shape[1] for rows in parts), default=1)
    return Rows(
        np.concatenate([np.empty(0, np.int64), *(rows.state_R for rows in parts)]),
        padded_alike([rows.ids_RK for rows in parts], width, NO_SYMBOL),
        padded_alike([rows.logprobs_RK for rows in parts], width, 0).astype(np.float32),
    )


def padded_alike(parts: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
    """Return the parts' rows, R x width."""
    wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts]
    return np.concatenate([np.empty((0, width), np.int64), *wide]) if wide else np.empty((0, width), np.int64)


def in_batch(parts: Sequence[np.ndarray], layout: Layout) -> Tensor:
    """Return the documents' states as indices of the micro-batch's flattened states."""
    moved = [states + first for states, first in zip(parts, layout.firsts, strict=True)]
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *moved]))
