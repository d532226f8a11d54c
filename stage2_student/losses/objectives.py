"""The terms of the loss by name; each computes a sum in nats from a micro-batch.

A new one is a Python file anywhere, named with its weight in `train.objectives` (interfaces/README.md). A built-in one
is a function here, or a class of `ON_TOKENS` if it compares tokens with the teacher's, and a field of
`pipeline.config.Objectives` with its weight and description.

Shape legend: P supervised byte positions, V symbols (256), N supervised tokens.
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from pipeline.config import Objectives, TrainConfig
from pipeline.runtime.plugins import run_file
from stage2_student.losses.alm import approximate_likelihood
from stage2_student.losses.contextual_mapping import ContextualMapping
from stage2_student.losses.divergences import class_divergence, symbol_cross_entropy
from stage2_student.losses.inputs import Objective, ObjectiveInputs
from stage2_student.losses.projection import ProjectionKL
from stage2_student.losses.ranked import GeneralLogit, UniversalLogit
from stage2_student.losses.token_divergence import MinEditDistance, RootProjectionKL, StrictKL, TokenKL
from stage2_student.losses.token_objective import TokenObjective
from stage2_student.losses.vocabulary_map import TokenizerPair

__all__ = [
    "OBJECTIVES",
    "ON_TOKENS",
    "Objective",
    "ObjectiveInputs",
    "Seen",
    "active_objectives",
    "objectives_on_tokens",
]

NONE: Mapping[str, TokenObjective] = MappingProxyType({})

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


OBJECTIVES: dict[str, Objective] = {"ce": ce, "byte_ce": byte_ce, "kl": kl, "alm": approximate_likelihood}


ON_TOKENS: dict[str, type[TokenObjective]] = {
    kind.name: kind
    for kind in (
        TokenKL,
        StrictKL,
        RootProjectionKL,
        ProjectionKL,
        UniversalLogit,
        GeneralLogit,
        MinEditDistance,
        ContextualMapping,
    )
}


def objectives_on_tokens(pair: TokenizerPair, train: TrainConfig) -> dict[str, TokenObjective]:
    """Make the objectives with a weight that compare tokens, by name.

    Raises:
        ValueError: one cannot compare models with these tokenizers.
    """
    return {name: ON_TOKENS[name](pair, train) for name in train.objectives.on_tokens}


def active_objectives(weights: Objectives, on_tokens: Mapping[str, TokenObjective] = NONE) -> dict[str, Objective]:
    """Return the objectives to compute, by name.

    These are the ones with a weight, and those that need nothing beyond what is computed anyway (`ce`, `byte_ce`).

    Args:
        on_tokens: those with a weight that compare tokens.
    """
    assert set(on_tokens) == set(weights.on_tokens), "objectives on tokens need the teacher's vocabulary"
    also_logged = {"ce": weights.uses_tokens, "byte_ce": weights.uses_bytes}
    ours = {name: objective for name, objective in OBJECTIVES.items() if also_logged.get(name) or weights.weights[name]}
    return {**ours, **on_tokens, **{name: _own(file) for name, file in weights.files.items()}}


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
