"""The making of micro-batches: encoded documents as tensors, with all that a recipe's objectives need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from pipeline.config import StudentConfig, TrainConfig
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate, empty_micro_batch
from stage2_student.interfaces import Interface
from stage2_student.losses.alm import chunk_tensors, cut_tensors
from stage2_student.losses.token_objective import TokenObjective


@dataclass(frozen=True)
class MicroBatchMaker:
    """A maker of micro-batches for a student.

    Attributes:
        ids: of the student's start and END tokens.
        interface: None if no objective needs bytes.
        on_tokens: the student's objectives that compare tokens.
        token_bytes: of the student's tokens by id; only `train.alm_space` needs them.
    """

    student: StudentConfig
    train: TrainConfig
    ids: SpecialIds
    interface: Interface | None
    on_tokens: Mapping[str, TokenObjective] = field(default_factory=dict)
    token_bytes: Sequence[bytes | None] = ()

    def __call__(self, documents: Sequence[Encoded], row_sizes: Sequence[int] | None = None) -> MicroBatch:
        """Make a micro-batch of these documents; of one token with nothing supervised if there are none.

        Args:
            row_sizes: number of documents in each row; None: one each.
        """
        masks = Masks(self.student.max_doubt, self.student.max_token_end)
        max_bytes = 0 if self.interface is None else self.interface.max_bytes
        start_id, end_id = self.ids.document_start, self.ids.end
        examples = [make_example(document, start_id, end_id, max_bytes, masks) for document in documents]
        micro = collate(examples, row_sizes) if examples else empty_micro_batch(start_id)
        extra = {} if self.interface is None else self.interface.prepare(documents, examples, micro)
        if self.train.objectives.alm:
            extra |= self._alm_tensors(documents, micro)
        for objective in self.on_tokens.values():
            extra |= objective.tensors(documents, micro.layout)
        return replace(micro, extra=extra)

    def _alm_tensors(self, documents: Sequence[Encoded], micro: MicroBatch) -> dict[str, Tensor]:
        debias, end_id = self.train.alm_debias, self.ids.end
        tensors = chunk_tensors(documents, micro.layout, debias, end_id if self.train.alm_end else None)
        if self.train.alm_space:
            tensors |= cut_tensors(documents, micro.layout, debias, self.token_bytes, end_id)
        return tensors
