"""The terms of the loss by name: what each reads of a micro-batch, as a sum in nats.

A new one is one Python file anywhere, named with its weight in `train.objectives` (interfaces/README.md); what comes
with the package is a function here, and a field of `pipeline.config.Objectives`, where its weight and description are.

Shape legend: P supervised byte positions, V symbols (256), N supervised tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.config import Objectives, TrainConfig
from pipeline.runtime.plugins import run_file
from stage2_student.data.examples import NO_LABEL
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces import ByteScores
from stage2_student.losses.alm import chunk_loss
from stage2_student.losses.divergences import class_divergence, symbol_cross_entropy


@dataclass(frozen=True)
class Seen:
    """What there is to learn from in a micro-batch.

    Attributes:
        batch: the micro-batch; `symbols_P` is what the document has at each position, `entry_symbols_PE` and
            `entry_logprobs_PE` what the dump stores there, `kl_P` where it may be trusted, `measures_P` what else the
            dump says, by column.
        scores: what the interface says; None where no objective needs it.
        nats_N: -ln p of the supervised tokens, in the order of `labels_BL`, float32; None where no objective needs
            them.
        train: the recipe's section.
    """

    batch: MicroBatch
    scores: ByteScores | None
    nats_N: Tensor | None
    train: TrainConfig


Objective = Callable[[Seen], Tensor]  # a scalar: nats, summed over the micro-batch


def ce(seen: Seen) -> Tensor:
    """Cross-entropy of the student's own tokens, END included."""
    assert seen.nats_N is not None
    return seen.nats_N.sum()


def byte_ce(seen: Seen) -> Tensor:
    """Cross-entropy of the document's bytes, where the interface stands by what it says."""
    assert seen.scores is not None
    return symbol_cross_entropy(seen.scores.logits_PV, seen.batch.symbols_P, seen.scores.counted_P)


def kl(seen: Seen) -> Tensor:
    """Divergence from the dump, where neither its masks nor the interface leave the position out."""
    batch, scores, train = seen.batch, seen.scores, seen.train
    assert scores is not None
    entries = (batch.entry_symbols_PE, batch.entry_logprobs_PE)
    counted_P = batch.kl_P & scores.counted_P
    return class_divergence(scores.logits_PV, *entries, counted_P, train.kl_direction, train.kl_temperature)


def alm(seen: Seen) -> Tensor:
    """Likelihoods of chunks, matched to the teacher's."""
    assert seen.nats_N is not None
    extra = seen.batch.extra
    chunk_N = extra["alm_chunk_BL"][seen.batch.labels_BL != NO_LABEL]
    return chunk_loss(seen.nats_N, chunk_N, extra["alm_teacher_C"], seen.train.alm_tau)


OBJECTIVES: dict[str, Objective] = {"ce": ce, "byte_ce": byte_ce, "kl": kl, "alm": alm}


def chosen(weights: Objectives) -> dict[str, Objective]:
    """The objectives to compute, by name: those with a weight, and what comes free with what they read (`ce`,
    `byte_ce`).
    """
    free = {"ce": weights.uses_tokens, "byte_ce": weights.uses_bytes}
    ours = {name: objective for name, objective in OBJECTIVES.items() if free.get(name) or weights.weights[name]}
    return ours | {name: _own(file) for name, file in weights.files.items()}


def _own(file: str) -> Objective:
    objective = run_file(file, "objective")

    def nats(seen: Seen) -> Tensor:
        found = objective(seen)
        if not isinstance(found, Tensor) or found.ndim:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{file}: objective(seen) gives {shape}, and has to give a tensor of no dimensions: the sum in nats"
            )
        return found

    return nats
