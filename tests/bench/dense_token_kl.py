"""KL of the next token from the whole softmax of a teacher in memory, for a student with its tokenizer.

An objective of the benchmark `methods`, which names the teacher's folder in BLD_BENCH_TEACHER. Both models read the
same tokens, the start token included.

Shape legend: B rows, L tokens, D hidden width, N supervised tokens, V vocabulary.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.runtime.huggingface import load_model
from stage2_student.data.examples import NO_LABEL
from stage2_student.losses.objectives import ObjectiveInputs

Targets = Callable[[Tensor], Tensor]  # (n, V) of the teacher's log-probabilities to probabilities that are learnt


@cache
def teacher(device: torch.device) -> Any:
    return load_model(os.environ["BLD_BENCH_TEACHER"], torch.float32).eval().to(device)


def divergence(inputs: ObjectiveInputs, targets: Targets) -> Tensor:
    """Sum KL(targets || student) over the supervised tokens, without a constant if the targets are draws."""
    batch = inputs.batch
    with torch.no_grad():
        model = teacher(batch.tokens_BL.device)
        packed = {} if batch.positions_BL is None else {"position_ids": batch.positions_BL}
        hidden_BLD = model.base_model(input_ids=batch.tokens_BL, use_cache=False, **packed).last_hidden_state
    state_N = (batch.labels_BL.flatten() != NO_LABEL).nonzero()[:, 0]

    def nats(logits_nV: Tensor, hidden_nD: Tensor) -> Tensor:
        with torch.no_grad():
            own_nV = model.get_output_embeddings()(hidden_nD).float().log_softmax(-1)
            probs_nV = targets(own_nV)
            entropy = torch.special.entr(probs_nV).sum()
        return (cross_entropy(logits_nV, probs_nV, reduction="sum") - entropy).reshape(1)

    return inputs.rows_of_head(state_N, nats, hidden_BLD.flatten(0, 1)[state_N]).sum()


def objective(inputs: ObjectiveInputs) -> Tensor:
    """Compute the divergence from the whole softmax."""
    return divergence(inputs, torch.exp)
