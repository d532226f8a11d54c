"""The protocol between the student and its byte interface.

Shape legend: B documents, L tokens (including the start token), D hidden width, N supervised tokens, P supervised byte
positions, V symbols (256).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas import NUM_SYMBOLS
from stage2_student.data.examples import NO_LABEL, Encoded, Example
from stage2_student.data.micro_batch import MicroBatch

Head = Callable[[Tensor], Tensor]  # (n, D) -> (n, vocabulary): the student's own token logits, `Student.token_logits`


@dataclass(frozen=True)
class OrderableHead:
    """A head, with what an interface needs to apply it with its rows in another order."""

    apply: Head
    plain: nn.Linear | None  # what `apply` multiplies with; None if it does more, or does not have the weight whole
    scaled: Head  # what follows the product

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return self.apply(hidden_ND)


@dataclass(frozen=True)
class StudentShape:
    """The properties of a student that its interface may depend on."""

    hidden_size: int
    head_rows: int  # ids from len(token_bytes) on are padding of the head
    token_bytes: tuple[bytes | None, ...]  # by token id; None for a token that spells nothing
    prefix: bytes  # bytes that the tokenizer puts before a document
    end_ids: tuple[int, ...]  # tokens that mean END

    @classmethod
    def of(cls, lm: Any, tokenizer: ByteTokenizer, ids: SpecialIds) -> "StudentShape":
        """Return the shape of a causal language model with this tokenizer."""
        return cls(
            hidden_size=lm.config.get_text_config().hidden_size,
            head_rows=lm.get_output_embeddings().weight.shape[0],
            token_bytes=tokenizer.token_bytes,
            prefix=tokenizer.prefix,
            end_ids=ids.ends,
        )


class ByteScores(NamedTuple):
    """An interface's output for a micro-batch."""

    logits_PV: Tensor  # float32; the losses normalise them
    counted_P: Tensor  # bool; False: the position is masked, and contributes neither byte CE nor KL
    # -ln p(label | state) of the supervised tokens in the order of `labels_BL`; an interface that applies the head
    # anyway returns them, so that the head is applied once.
    token_nats_N: Tensor | None = None


class Interface(nn.Module, ABC):
    """A module that turns the student's hidden states into next-symbol logits."""

    own_file: str | None = None  # the user's own file that defines it
    max_bytes: int | None  # leading bytes of a token that it predicts; the rest are left out. None: all

    @abstractmethod
    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """Score the positions of `batch`, each from the state `state_P` that predicts the token containing it.

        The positions of a token are consecutive, with `offset_P` ascending from 0; an END counts as a token of its own
        there. It may use the bytes of that token before the position (`symbols_P` at smaller `offset_P`), never the
        position's own byte or a later one. It applies `head`, if at all, to a part of the rows at a time.
        """

    def prepare(
        self, documents: Sequence[Encoded], examples: Sequence[Example], batch: MicroBatch
    ) -> dict[str, Tensor]:
        """Return tensors that `forward` needs beyond the micro-batch; they become `batch.extra`.

        It runs in the data path, on the CPU.

        Args:
            documents: the documents of the micro-batch in turn, with their `examples`; both are empty on a rank that
                only waits.
            batch: the collated examples; its `extra` is still empty.
        """
        return {}

    def scores(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """Run `forward`, and check the output of a user's own interface.

        Raises:
            ValueError: the output does not fit the micro-batch; the message names the user's file.
        """
        scores: ByteScores = self(hidden_BLD, batch, head)
        if self.own_file is not None:
            _check_rows(self.own_file, scores, batch)
        return scores


def _check_rows(file: str, scores: ByteScores, batch: MicroBatch) -> None:
    if not isinstance(scores, tuple) or not isinstance(scores[0], Tensor) or not isinstance(scores[1], Tensor):
        raise ValueError(f"{file}: forward must return ByteScores, not a {type(scores).__name__}")
    num_positions = len(batch.state_P)
    expected = {"logits_PV": (num_positions, NUM_SYMBOLS), "counted_P": (num_positions,)}
    if scores.token_nats_N is not None:
        expected["token_nats_N"] = (int((batch.labels_BL != NO_LABEL).sum()),)
    for name, shape in expected.items():
        if (given := tuple(getattr(scores, name).shape)) != shape:
            raise ValueError(
                f"{file}: forward returns {name} of shape {given}; it must be {shape}: a row for each of the "
                f"micro-batch's {shape[0]} supervised {'tokens' if name == 'token_nats_N' else 'byte positions'}, "
                "in their order"
            )
