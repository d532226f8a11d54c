"""The Python interface for training loops of one's own: data sets of a dump, a collator, the loss.

The names below are public, and keep their meaning over releases (README.md#from-python). May import `data`,
`interfaces`, `losses`, `model`, `schemas`, and the parts of `pipeline` that both stages share; needs neither vLLM nor
DeepSpeed.
"""

from stage2_student.data.order import Position
from stage2_student.library.collator import DistillationBatch, DistillationCollator, DistillationTargets
from stage2_student.library.datasets import DumpDataset, DumpStream, StreamedRecord
from stage2_student.library.document import DocumentArrays, read_document
from stage2_student.library.loss import DistillationLoss, byte_distillation_loss, token_head

__all__ = [
    "DistillationBatch",
    "DistillationCollator",
    "DistillationLoss",
    "DistillationTargets",
    "DocumentArrays",
    "DumpDataset",
    "DumpStream",
    "Position",
    "StreamedRecord",
    "byte_distillation_loss",
    "read_document",
    "token_head",
]
