"""The terms of the loss by name; each computes a sum in nats from a micro-batch.

A new one is a Python file anywhere, named with its weight in `train.objectives` (interfaces/README.md). A built-in one
is a function here, and a field of `pipeline.config.Objectives` with its weight and description.

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
class ObjectiveInputs:
    """The inputs of an objective for one micro-batch.

    Attributes:
        batch: the micro-batch; `symbols_P` is the document's symbol at each position, `entry_symbols_PE` and
            `entry_logprobs_PE` are the dump's entries there, `kl_P` says where they may be trusted, `measures_P` has
            the dump's further measures, by column.
        scores: the interface's output; None if no objective needs it.
        nats_N: -ln p of the supervised tokens, in the order of `labels_BL`, float32; None if no objective needs them.
        train: the recipe's section.
    """

    batch: MicroBatch
    scores: ByteScores | None
    nats_N: Tensor | None
    train: TrainConfig


Objective = Callable[[ObjectiveInputs], Tensor]  # a scalar: nats, summed over the micro-batch

# The name in users' own files of earlier releases.
Seen = ObjectiveInputs


def ce(inputs: ObjectiveInputs) -> Tensor:
    """Compute the cross-entropy of the student's own tokens, including END."""
    assert inputs.nats_N is not None
    return inputs.nats_N.sum()


def byte_ce(inputs: ObjectiveInputs) -> Tensor:
    """Compute the cross-entropy of the document's bytes, at the positions that the interface counts."""
    assert inputs.scores is not None
    return symbol_cross_entropy(inputs.scores.logits_PV, inputs.batch.symbols_P, inputs.scores.counted_P)


def kl(inputs: ObjectiveInputs) -> Tensor:
    """Compute the divergence from the dump, at the positions that neither its masks nor the interface exclude."""
    batch, scores, train = inputs.batch, inputs.scores, inputs.train
    assert scores is not None
    entries = (batch.entry_symbols_PE, batch.entry_logprobs_PE)
    counted_P = batch.kl_P & scores.counted_P
    return class_divergence(scores.logits_PV, *entries, counted_P, train.kl_direction, train.kl_temperature)


def alm(inputs: ObjectiveInputs) -> Tensor:
    """Compute how the likelihoods of chunks differ from the teacher's (approximate likelihood matching)."""
    assert inputs.nats_N is not None
    extra = inputs.batch.extra
    chunk_N = extra["alm_chunk_BL"][inputs.batch.labels_BL != NO_LABEL]
    return chunk_loss(inputs.nats_N, chunk_N, extra["alm_teacher_C"], inputs.train.alm_tau)


OBJECTIVES: dict[str, Objective] = {"ce": ce, "byte_ce": byte_ce, "kl": kl, "alm": alm}


def active_objectives(weights: Objectives) -> dict[str, Objective]:
    """Return the objectives to compute, by name.

    These are the ones with a weight, and those that need nothing beyond what is computed anyway (`ce`, `byte_ce`).
    """
    also_logged = {"ce": weights.uses_tokens, "byte_ce": weights.uses_bytes}
    ours = {name: objective for name, objective in OBJECTIVES.items() if also_logged.get(name) or weights.weights[name]}
    return ours | {name: _own(file) for name, file in weights.files.items()}


def _own(file: str) -> Objective:
    objective = run_file(file, "objective")

    def nats(inputs: ObjectiveInputs) -> Tensor:
        value = objective(inputs)
        if not isinstance(value, Tensor) or value.ndim:
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{file}: objective() must return a tensor with no dimensions, the sum in nats; it returns {kind}"
            )
        return value

    return nats
