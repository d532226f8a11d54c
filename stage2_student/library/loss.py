"""The loss of a batch, for a training loop of one's own.

Shape legend: B rows, L tokens (including the start token), D hidden width, V rows of the head, N any number of states.
"""

from typing import Any, NamedTuple

from torch import Tensor

from pipeline.config import TrainConfig
from stage2_student.interfaces import Head
from stage2_student.interfaces.token_marginal.interface import byte_scores
from stage2_student.library.collator import DistillationBatch
from stage2_student.losses.objectives import ObjectiveInputs, active_objectives
from stage2_student.losses.weighted_loss import label_nats, weighted_loss
from stage2_student.model.student import Student


class DistillationLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        nats: the weighted sum of the objectives; a scalar with a gradient.
        num_bytes: supervised bytes of the batch. Over several batches or ranks, divide the sum of `nats` once by the
            sum of `num_bytes`, as `bld student` does.
        sums: each objective by name, unweighted and detached, nats.
    """

    nats: Tensor
    num_bytes: int
    sums: dict[str, Tensor]

    @property
    def per_byte(self) -> Tensor:
        """Return the loss in nats per supervised byte of this batch alone; 0 for a batch without any."""
        return self.nats / max(self.num_bytes, 1)


def byte_distillation_loss(
    logits_or_hidden: Tensor, batch: DistillationBatch, head: Head | None = None
) -> DistillationLoss:
    """Compute the loss that `bld student` would compute on the same documents with the same settings.

    Args:
        logits_or_hidden: of `batch["input_ids"]`: the model's logits (B, L, V); or with `head` its last hidden states
            (B, L, D). Logits of all tokens are large; with a head only those of some rows are held at once.
        head: (N, D) to (N, V), as `token_head` gives it.
    Raises:
        ValueError: the model's head has another number of rows than the collator was told.
    """
    targets = batch["targets"].to(logits_or_hidden.device)
    micro, train = targets.micro_batch, targets.train
    if logits_or_hidden.shape[:2] != micro.tokens_BL.shape:
        raise ValueError(
            f"logits_or_hidden has shape {tuple(logits_or_hidden.shape)}, but input_ids "
            f"{tuple(micro.tokens_BL.shape)}: give the model's output of batch['input_ids'], the batch first"
        )
    read = _itself if head is None else head
    scores = None
    if targets.columns is not None:
        width = len(targets.columns.column_V)
        checked = _with_width(read, width)
        scores = byte_scores(logits_or_hidden, micro, checked, targets.columns, targets.student.max_dropped)
    nats_N = None if scores is None else scores.token_nats_N
    if nats_N is None and train.objectives.uses_tokens:
        nats_N = label_nats(logits_or_hidden, micro, read)
    inputs = ObjectiveInputs(micro, scores, nats_N, train, logits_or_hidden, read)
    nats, sums = weighted_loss(inputs, active_objectives(train.objectives))
    return DistillationLoss(nats, micro.num_bytes, {name: value.detach() for name, value in sums.items()})


def token_head(model: Any) -> Head:
    """Return the function from a model's last hidden states to its logits.

    It includes the factor or the soft cap that the model's family applies after its head (Granite, Cohere, Gemma 2),
    and is compared with the model's own logits.

    Args:
        model: a causal language model of transformers, with all its weights in this process.
    Raises:
        ValueError: the family does more to its logits; use them instead.
    """
    tokens_alone = {"ce": 1.0, "byte_ce": 0.0, "kl": 0.0}
    student = Student(model, None, TrainConfig.model_validate({"dtype": "float32", "objectives": tokens_alone}))
    was_training = model.training
    model.eval()
    try:
        student.find_logit_scale()
    finally:
        model.train(was_training)
    return student.token_logits


def _itself(logits_NV: Tensor) -> Tensor:
    return logits_NV


def _with_width(head: Head, width: int) -> Head:
    """Return the head, checked to have this many rows."""

    def checked(hidden_ND: Tensor) -> Tensor:
        logits_NV = head(hidden_ND)
        if logits_NV.shape[-1] != width:
            raise ValueError(
                f"the model's head has {logits_NV.shape[-1]} rows, but the batch is made for {width}: "
                f"give DistillationCollator(vocab_size={logits_NV.shape[-1]})"
            )
        return logits_NV

    return checked
