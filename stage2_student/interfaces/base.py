"""The protocol between the student and its byte interface.

Shape legend: B documents, L tokens (the start token included), D hidden width, N supervised tokens, P supervised byte
positions, V symbols (256).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from schemas import NUM_SYMBOLS
from stage2_student.data.examples import NO_LABEL, Encoded, Example
from stage2_student.data.micro_batch import MicroBatch

Head = Callable[[Tensor], Tensor]  # (n, D) -> (n, vocabulary): the student's own token logits, `Student.token_logits`


@dataclass(frozen=True)
class StudentShape:
    """What an interface may know of the student that it is made for."""

    hidden_size: int
    head_rows: int  # ids from len(token_bytes) on are padding of the head
    token_bytes: tuple[bytes | None, ...]  # by token id; None for a token that spells nothing
    prefix: bytes  # what the tokenizer puts before a document
    end_ids: tuple[int, ...]  # tokens that mean END


class ByteScores(NamedTuple):
    """What an interface says about a micro-batch."""

    logits_PV: Tensor  # float32; any logits, the losses normalise them
    counted_P: Tensor  # bool; where it is False the interface does not stand by its logits: neither byte CE nor KL
    token_nats_N: Tensor | None = None  # -ln p(label | state) of the supervised tokens in the order of `labels_BL`;
    # from an interface that applies the head anyway, so that the head is applied once


class Interface(nn.Module, ABC):
    """A module that turns the student's hidden states into next-symbol logits."""

    own_file: str | None = None  # the operator's, in which it is defined
    max_bytes: int | None  # bytes of a token that it predicts, what follows in a longer one is left out; None: all

    @abstractmethod
    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """Scores of the positions of `batch`, each from the state `state_P` that predicts the token in which it lies.

        The positions of a token stand together, `offset_P` ascending from 0; an END is a token of its own there.
        It may look at the bytes of that token before the position (`symbols_P` at smaller `offset_P`), never at the
        position's own or a later one. It applies `head` to a part of the rows at a time, if at all.
        """

    def prepare(
        self, documents: Sequence[Encoded], examples: Sequence[Example], batch: MicroBatch
    ) -> dict[str, Tensor]:
        """What `forward` needs beyond the micro-batch: it becomes `batch.extra`. Runs in the data path, on the CPU.

        Args:
            documents: those of the micro-batch in turn, with their `examples`; both are empty on a rank that only
                waits.
            batch: the examples collated, its `extra` still empty.
        """
        return {}

    def scores(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """What `forward` gives. Raises ValueError, naming the operator's own file, where it does not fit the
        micro-batch.
        """
        found: ByteScores = self(hidden_BLD, batch, head)
        if self.own_file is not None:
            _check_rows(self.own_file, found, batch)
        return found


def _check_rows(file: str, scores: ByteScores, batch: MicroBatch) -> None:
    if not isinstance(scores, tuple) or not isinstance(scores[0], Tensor) or not isinstance(scores[1], Tensor):
        raise ValueError(f"{file}: forward gives a {type(scores).__name__}, and has to give ByteScores")
    num_positions = len(batch.state_P)
    wanted = {"logits_PV": (num_positions, NUM_SYMBOLS), "counted_P": (num_positions,)}
    if scores.token_nats_N is not None:
        wanted["token_nats_N"] = (int((batch.labels_BL != NO_LABEL).sum()),)
    for name, shape in wanted.items():
        if (given := tuple(getattr(scores, name).shape)) != shape:
            raise ValueError(
                f"{file}: forward gives {name} of shape {given}, and has to give {shape}: a row for each of the micro-batch's "
                f"{shape[0]} supervised {'tokens' if name == 'token_nats_N' else 'byte positions'}, in their order"
            )
