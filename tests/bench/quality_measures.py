"""What is measured of a model in the quality benchmark, document by document, and what tells two methods apart.

Resumable: a model's figures lie in one JSON file. Intervals are of paired differences: both methods on the same documents
and seeds, documents and seeds drawn anew together (a bootstrap), so that what is hard about a document cancels out.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import TasksConfig
from schemas.manifest import write_json
from stage2_student.asked import records_of
from stage2_student.divergence import ByteModel, DocumentDivergence, document_divergence
from stage2_student.harness import run_tasks

RESAMPLES = 2000
TASKS = {"PIQA": "bld_piqa", "SIQA": "bld_siqa", "OpenBookQA": "bld_openbookqa"}


class Figures(NamedTuple):
    """Of one model: its documents in each dump, and which questions of each task it answers rightly."""

    documents: dict[str, list[DocumentDivergence]]
    right: dict[str, list[bool]]

    def per_document(self, dump: str, measure: str) -> np.ndarray:
        """documents x 2: the measure's sum and what it is divided by."""
        numerator, denominator = MEASURES[measure]
        return np.array([[getattr(d, numerator), getattr(d, denominator)] for d in self.documents[dump]], dtype=float)

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


def measure(
    model: str, start: int, ends: tuple[int, ...], dumps: dict[str, Path], num_questions: int, file: Path
) -> Figures:
    """A model's figures, from `file` where they are known; what is not there is measured and added."""
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"right": {}}
    tasks = [task for task in TASKS if len(known["right"].get(task, ())) < num_questions]
    if "documents" not in known:
        byte_model = ByteModel.load(model, start, ends)
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
    """Of each task's first questions, whether the option that is most probable per byte is the right one."""
    asked = TasksConfig(names=tuple(TASKS[task] for task in tasks), limit=num_questions)
    samples = run_tasks(model, {"tasks": asked}, log_samples=True)["tasks"]["samples"]
    return {
        task: [bool(row["acc_bytes"]) for row in sorted(samples[TASKS[task]], key=lambda row: row["doc_id"])]
        for task in tasks
    }


def paired_interval(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of two methods' ratios, and the bounds of its 95 % interval.

    Args:
        ours, theirs: for each seed, documents x 2 (sum, divisor), the same documents in the same order.
    """
    return _interval((ours, theirs), lambda ratios: ratios[0] - ratios[1])


def gap_closed(
    ours: Sequence[np.ndarray], control: Sequence[np.ndarray], best: np.ndarray
) -> tuple[float, float, float]:
    """How much of the way from the control's ratio to the best model's a method goes, with its 95 % interval.

    Args:
        best: as one seed of the others; it has no seeds.
    """
    methods = (ours, control, [best] * len(ours))
    return _interval(methods, lambda ratios: (ratios[1] - ratios[0]) / (ratios[1] - ratios[2]))


def _interval(
    methods: Sequence[Sequence[np.ndarray]], of_ratios: Callable[[np.ndarray], float]
) -> tuple[float, float, float]:
    """What `of_ratios` makes of the methods' ratios, and its 95 % interval: seeds and documents drawn anew together."""
    figures = np.stack([np.stack(seeds) for seeds in methods])  # methods x seeds x documents x 2
    random = np.random.default_rng(0)
    num_seeds, num_documents = figures.shape[1:3]

    def drawn(seeds: np.ndarray, documents: np.ndarray) -> float:
        sums = figures[:, seeds][:, :, documents].sum((1, 2))
        return float(of_ratios(sums[:, 0] / sums[:, 1]))

    again = [
        drawn(random.integers(num_seeds, size=num_seeds), random.integers(num_documents, size=num_documents))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(again, [0.025, 0.975])
    return drawn(np.arange(num_seeds), np.arange(num_documents)), float(low), float(high)
