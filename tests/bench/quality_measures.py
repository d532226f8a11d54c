"""Measures of the quality benchmark, per document, and the differences between two methods.

Resumable: a model's figures lie in one JSON file. Intervals are of paired differences: both methods on the same
documents and seeds, so that what is hard about a document cancels out (`tests.bench.quality_intervals`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import TasksConfig
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import write_json
from stage2_student.evaluation.asked_positions import records_of
from stage2_student.evaluation.divergence import ByteModel, DocumentDivergence, document_divergence
from stage2_student.evaluation.lm_eval_tasks import run_tasks
from tests.bench.quality_intervals import Interval, difference, interval

TASKS = {"PIQA": "bld_piqa", "SIQA": "bld_siqa", "OpenBookQA": "bld_openbookqa"}


class Figures(NamedTuple):
    """Figures of one model: the records of its documents in each dump, and its right answers by task."""

    documents: dict[str, list[DocumentDivergence]]
    right: dict[str, list[bool]]

    def per_document(self, dump: str, measure: str) -> np.ndarray:
        """Return documents x 2: the measure's sum and its divisor.

        Windows of a document count as one document.
        """
        numerator, denominator = MEASURES[measure]
        sums: dict[str, np.ndarray] = {}
        for record in self.documents[dump]:
            of_record = np.array([getattr(record, numerator), getattr(record, denominator)], dtype=float)
            sums[record.doc_id] = sums.get(record.doc_id, 0.0) + of_record
        return np.array(list(sums.values()))

    def mean(self, dump: str, measure: str) -> float:
        total, number = self.per_document(dump, measure).sum(0)
        return float(total / number * SCALES.get(measure, 1.0)) if number else float("nan")

    def accuracy(self, task: str) -> float:
        return float(np.mean(self.right[task]))


MEASURES = {
    "jsd": ("jsd_nats", "positions"),
    "kl_clear": ("kl_clear_nats", "clear"),
    "bits_per_byte": ("token_nats", "num_bytes"),
}
SCALES = {"bits_per_byte": 1 / np.log(2)}


def measure(model: str, ids: SpecialIds, dumps: dict[str, Path], num_questions: int, file: Path) -> Figures:
    """Return a model's figures from `file`; measure and add those that are missing."""
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"right": {}}
    tasks = [task for task in TASKS if len(known["right"].get(task, ())) < num_questions]
    if "documents" not in known:
        byte_model = ByteModel.load(model, ids)
        known["documents"] = {
            name: [document_divergence(byte_model, r)._asdict() for r in records_of(dump)]
            for name, dump in dumps.items()
        }
        write_json(file, known)
    if tasks:
        known["right"] |= right_answers(model, tasks, num_questions)
        write_json(file, known)
    documents = {name: [DocumentDivergence(**d) for d in found] for name, found in known["documents"].items()}
    return Figures(documents, known["right"])


def right_answers(model: str, tasks: Sequence[str], num_questions: int) -> dict[str, list[bool]]:
    """Tell for each task's first questions if the option most probable per byte is the right one."""
    asked = TasksConfig(names=tuple(TASKS[task] for task in tasks), limit=num_questions)
    samples = run_tasks(model, {"tasks": asked}, log_samples=True)["tasks"]["samples"]
    return {
        task: [bool(row["acc_bytes"]) for row in sorted(samples[TASKS[task]], key=lambda row: row["doc_id"])]
        for task in tasks
    }


def closed(ratios: np.ndarray) -> np.ndarray:
    """Return how far the first method goes from the second's ratio to the third's.

    The second is the control, the third the best model.
    """
    share: np.ndarray = (ratios[1] - ratios[0]) / (ratios[1] - ratios[2])
    return share


def paired_interval(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Interval:
    """Return the mean difference of two methods' ratios, with its 95 % interval.

    Args:
        ours, theirs: for each seed, documents x 2 (sum, divisor), the same documents in the same order.
    """
    return interval((ours, theirs), difference)


def gap_closed(ours: Sequence[np.ndarray], control: Sequence[np.ndarray], best: np.ndarray) -> Interval:
    """Return how far a method goes from the control's ratio to the best model's, with a 95 % interval.

    Args:
        best: as one seed of the others; it has no seeds.
    """
    return interval((ours, control, [best] * len(ours)), closed)
