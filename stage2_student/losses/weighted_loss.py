"""The loss of a micro-batch: the weighted sum of its objectives, in nats.

Shape legend: B rows, L tokens (including the start token), D hidden width, N supervised tokens.
"""

from collections.abc import Mapping

from torch import Tensor

from stage2_student.data.examples import NO_LABEL
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces import Head
from stage2_student.losses.balance import balanced
from stage2_student.losses.divergences import token_cross_entropy
from stage2_student.losses.objectives import Objective, ObjectiveInputs


def label_nats(hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> Tensor:
    """Compute -ln p of the supervised tokens, including END; (N,) float32, in the order of `labels_BL`."""
    supervised_BL = batch.labels_BL != NO_LABEL
    return token_cross_entropy(hidden_BLD[supervised_BL], batch.labels_BL[supervised_BL], head)


def weighted_loss(inputs: ObjectiveInputs, terms: Mapping[str, Objective]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the objectives, and their sum weighted by `train.objectives` and balanced by `train.balance`.

    Args:
        terms: the objectives to compute, by name (`active_objectives`).
    Returns:
        (nats, a scalar; the unweighted sum of each objective).
    """
    weights = inputs.train.objectives.weights
    sums = {name: objective(inputs) for name, objective in terms.items()}
    weighted = {name: weights[name] * value for name, value in sums.items() if weights[name]}
    return balanced(weighted, inputs.train.balance, inputs.hidden_BLD), sums
