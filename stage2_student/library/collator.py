"""Records of a dump in a student's tokens, as batches that hold all that the loss needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

from pipeline.config import StudentConfig, TrainConfig
from pipeline.config.train import DEFAULT_MAX_TOKENS
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from schemas.record import Record
from stage2_student.data.encode import encode_pieces
from stage2_student.data.examples import Encoded
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.data.order import Position
from stage2_student.interfaces import StudentShape
from stage2_student.interfaces.token_marginal.interface import TokenMarginal
from stage2_student.interfaces.token_marginal.types import Columns
from stage2_student.library.datasets import StreamedRecord
from stage2_student.losses.micro_batches import MicroBatchMaker
from stage2_student.losses.objectives import OBJECTIVES
from stage2_student.model.initial_student import end_tokens

TRAIN_OPTIONS = ("kl_direction", "kl_temperature", "alm_tau", "alm_debias", "alm_space", "alm_end")
STUDENT_OPTIONS = ("start", "end", "max_doubt", "max_token_end", "max_dropped")


@dataclass(frozen=True)
class DistillationTargets:
    """The targets of a batch, and the settings that they were made with.

    Attributes:
        micro_batch: as `bld student` makes it.
        columns: the head's columns in byte order; None if no objective needs bytes.
        train, student: the settings, as sections of a recipe.
        num_bytes: supervised bytes; END is not one.
        doc_ids: of each row.
        left_out: records that cannot be used, by id, with the reason.
        after: where a stream goes on after this batch; None if its records came by index.
    """

    micro_batch: MicroBatch
    columns: Columns | None
    train: TrainConfig
    student: StudentConfig
    left_out: Mapping[str, str]
    after: Position | None

    @property
    def num_bytes(self) -> int:
        return self.micro_batch.num_bytes

    @property
    def doc_ids(self) -> tuple[str, ...]:
        return self.micro_batch.doc_ids

    def to(self, device: torch.device | str) -> "DistillationTargets":
        """Return a copy with its tensors on `device`."""
        columns = self.columns
        if columns is not None:
            columns = columns._replace(token_C=columns.token_C.to(device), column_V=columns.column_V.to(device))
        return replace(self, micro_batch=self.micro_batch.to(device), columns=columns)


class DistillationBatch(TypedDict):
    """A batch of B rows, padded at their ends to L tokens.

    Attributes:
        input_ids: int64, B x L; each row begins with a start token. A causal model needs no mask for the padding.
        targets: all that the loss needs.
    """

    input_ids: Tensor
    targets: DistillationTargets


@dataclass(frozen=True)
class DistillationCollator:
    """A collator of a dump's records for a student with any tokenizer: for a DataLoader's or a Trainer's batches.

    A row is a record in the student's tokens; of a record of more than `max_tokens` each piece is a row, cut as
    `bld student` cuts it. A record that cannot be used is named in `targets.left_out`.

    Attributes:
        tokenizer: of transformers.
        objectives: weights by name, of `ce`, `byte_ce`, `kl` and `alm`, in nats per supervised byte; default: a
            recipe's. Bytes are scored by the interface `token_marginal`.
        max_tokens: of a row; at least 8.
        vocab_size: rows of the model's head; default: as many as the tokenizer has tokens.
        chats: the dump holds chats, which the tokenizer's chat template writes.
        options: keys of a recipe. Of its `train` section kl_direction, kl_temperature, alm_tau, alm_debias, alm_space,
            alm_end; of its `student` section start, end, max_doubt, max_token_end, max_dropped.
    Raises:
        ValueError: an objective or option is unknown, or the tokenizer cannot spell every text or has no token for
            start or END.
    """

    tokenizer: Any
    objectives: Mapping[str, float] | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    vocab_size: int | None = None
    chats: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens < 8:
            raise ValueError(f"max_tokens is {self.max_tokens}; give 8 or more")
        assert self._parts.make.train is not None  # made now, so that faults are found now

    def __call__(self, records: Sequence[Record | StreamedRecord]) -> DistillationBatch:
        """Make a batch of records.

        Raises:
            ValueError: a record is a chat, and the collator is not for chats.
        """
        own = [item.record if isinstance(item, StreamedRecord) else item for item in records]
        after = max((item.after for item in records if isinstance(item, StreamedRecord)), default=None)
        parts = self._parts
        if parts.chat is None and any(record.message_roles for record in own):
            raise ValueError("the dump holds chats: give DistillationCollator(chats=True)")
        documents: list[Encoded] = []
        left_out: dict[str, str] = {}
        for record, pieces in zip(own, encode_pieces(own, parts.tokenizer, parts.chat, self.max_tokens), strict=True):
            if isinstance(pieces, str):
                left_out[record.doc_id] = pieces
            else:
                documents += pieces
        micro, make = parts.make(documents), parts.make
        targets = DistillationTargets(micro, parts.columns, make.train, make.student, left_out, after)
        return {"input_ids": micro.tokens_BL, "targets": targets}

    @cached_property
    def _parts(self) -> "_Parts":
        return _Parts.of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings alone: a worker process makes its own parts."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class _Parts:
    """The parts of a collator, made from its settings."""

    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None
    make: MicroBatchMaker
    columns: Columns | None

    @classmethod
    def of(cls, settings: DistillationCollator) -> "_Parts":
        name = getattr(settings.tokenizer, "name_or_path", "") or type(settings.tokenizer).__name__
        train, student = _sections(settings, name)
        tokenizer = ByteTokenizer.from_wrapped(settings.tokenizer, name)
        chat = ChatTokenizer(tokenizer, settings.tokenizer) if settings.chats else None
        ids = end_tokens(student, tokenizer, chat)
        interface = None
        if train.objectives.uses_bytes:
            num_rows = len(tokenizer.token_bytes) if settings.vocab_size is None else settings.vocab_size
            # token_marginal reads no hidden size.
            shape = StudentShape(0, num_rows, tokenizer.token_bytes, tokenizer.prefix, ids.ends)
            interface = TokenMarginal(shape, student.max_dropped)
        columns = None
        if interface is not None:
            # In shared memory: workers send a handle with each batch, not the columns.
            token_C, column_V = (column.clone().share_memory_() for column in interface.columns[:2])
            columns = interface.columns._replace(token_C=token_C, column_V=column_V)
        return cls(
            tokenizer, chat, MicroBatchMaker(student, train, ids, interface, token_bytes=tokenizer.token_bytes), columns
        )


def _sections(settings: DistillationCollator, name: str) -> tuple[TrainConfig, StudentConfig]:
    """Return the settings as sections of a recipe."""
    known = (*TRAIN_OPTIONS, *STUDENT_OPTIONS)
    if other := [option for option in settings.options if option not in known]:
        raise ValueError(f"{other[0]!r} is no option of DistillationCollator; there are {', '.join(known)}")
    of_train = {key: settings.options[key] for key in TRAIN_OPTIONS if key in settings.options}
    of_student = {key: settings.options[key] for key in STUDENT_OPTIONS if key in settings.options}
    for objective in settings.objectives or ():
        if objective not in OBJECTIVES:
            raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}; `bld student` has others")
    if settings.objectives is not None:
        of_train["objectives"] = dict.fromkeys(OBJECTIVES, 0.0) | dict(settings.objectives)
    train = TrainConfig.model_validate({"max_tokens": settings.max_tokens, "dtype": "float32", **of_train})
    return train, StudentConfig.model_validate({"model": name, "path": "-", **of_student})
