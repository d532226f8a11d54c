"""The student: a causal language model with a byte interface on its last hidden states.

Shape legend: B documents, L tokens (including the start token), V vocabulary, N supervised tokens, D hidden width.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from stage2_student.acceleration.fused_ce import fused_label_nats
from stage2_student.data.examples import NO_LABEL
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces import ByteScores, Interface, OrderableHead
from stage2_student.losses.objectives import NONE, ObjectiveInputs, active_objectives
from stage2_student.losses.token_objective import TokenObjective
from stage2_student.losses.weighted_loss import label_nats, weighted_loss

_LOUDER = 64
COUNTS = ("positions", "uncounted", "kl_positions")  # all; those masked by the interface; those with KL


@dataclass(frozen=True)
class Precision:
    """The dtype of the arithmetic.

    Weights stay float32; with bfloat16, matrix products run under autocast, and losses in float32.
    """

    dtype: torch.dtype

    def context(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)


class Student(nn.Module):
    """A causal language model and its interface. `forward` is the loss: under ZeRO-3 weights exist only inside it.

    Only terms with a weight are computed. Without a byte objective there is no interface (None): plain cross-entropy is
    the control, and runs as fast as it can.
    """

    remarks: tuple[str, ...] = ()  # on what it does not learn, for the user

    def __init__(
        self,
        lm: Any,
        interface: Interface | None,
        train: TrainConfig,
        on_tokens: Mapping[str, TokenObjective] = NONE,
    ) -> None:
        super().__init__()
        assert (interface is not None) == train.objectives.uses_bytes
        self.lm = lm
        self.interface = interface
        self.train_config = train
        self.objectives = train.objectives
        self.on_tokens = on_tokens
        self.terms = active_objectives(train.objectives, on_tokens)
        self.weights = train.objectives.weights
        self.precision = Precision(getattr(torch, train.dtype))
        self.logit_scale = 1.0  # see `find_logit_scale`
        self.logit_softcap: float | None = getattr(lm.config, "final_logit_softcapping", None)

    def forward(
        self, batch: MicroBatch, interface_alone: bool = False, tokens_alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted sum of the objectives in nats, and the sums named by `sums_names`.

        The latter are unweighted and detached.

        Args:
            interface_alone: the interface learns, but none of its gradient reaches the states that it reads.
            tokens_alone: return the nats of the batch's labels, and no sums: evaluation must go through `forward` too.
        """
        if tokens_alone:
            nats = self._label_nats(batch)
            return nats, nats.new_empty(0)
        with self.precision.context(batch.tokens_BL.device.type):
            packed = {} if batch.positions_BL is None else {"position_ids": batch.positions_BL}
            hidden_BLD = self.lm.base_model(input_ids=batch.tokens_BL, use_cache=False, **packed).last_hidden_state
            scores = None
            if self.interface is not None:
                read_BLD = hidden_BLD.detach() if interface_alone else hidden_BLD
                scores = self.interface.scores(read_BLD, batch, self.head)
            nats_N = None if scores is None or interface_alone else scores.token_nats_N
            if nats_N is None and self.objectives.uses_tokens:
                nats_N = self._fused_nats(hidden_BLD, batch)
                if nats_N is None:
                    nats_N = label_nats(hidden_BLD, batch, self.token_logits)
            inputs = ObjectiveInputs(batch, scores, nats_N, self.train_config, hidden_BLD, self.token_logits)
            nats, sums = weighted_loss(inputs, self.terms)
        counts = () if scores is None else _counts(scores, batch)
        return nats, torch.stack([*sums.values(), *counts]).detach()

    def _fused_nats(self, hidden_BLD: Tensor, batch: MicroBatch) -> Tensor | None:
        """Compute the sum of -ln p(label) in the kernel of `train.fused_ce`, (1,).

        None without it, and where nothing is supervised, which the kernel does not take.
        """
        supervised_BL = batch.labels_BL != NO_LABEL
        if self.train_config.fused_ce == "none" or not bool(supervised_BL.any()):
            return None
        states = hidden_BLD[supervised_BL], batch.labels_BL[supervised_BL]
        return fused_label_nats(*states, self.lm.get_output_embeddings(), self.logit_scale, self.logit_softcap)

    def _label_nats(self, batch: MicroBatch) -> Tensor:
        """Sum -ln p(label | tokens before), a float32 scalar."""
        with self.precision.context(batch.tokens_BL.device.type):
            hidden_BLD = self.lm.base_model(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state
            return label_nats(hidden_BLD, batch, self.token_logits).sum()

    @property
    def sums_names(self) -> tuple[str, ...]:
        """Names of the sums from `forward`: the objectives that are computed, then counts of positions."""
        return tuple(self.terms) + (COUNTS if self.objectives.uses_bytes else ())

    @property
    def head(self) -> OrderableHead:
        """Return `token_logits` for an interface that may want the head's rows in an order of its own."""
        return OrderableHead(self.token_logits, _plain(self.lm.get_output_embeddings()), self.scaled)

    def token_logits(self, hidden_ND: Tensor) -> Tensor:
        """Compute the student's own next-token logits."""
        with self.precision.context(
            hidden_ND.device.type
        ):  # again, because the checkpointed head also runs outside `forward`
            logits_NV = self.lm.get_output_embeddings()(hidden_ND)
        return self.scaled(logits_NV)

    def scaled(self, logits_NV: Tensor) -> Tensor:
        """Scale or cap the head's products, as the family does."""
        cap = self.logit_softcap
        if cap is not None:
            return cap * torch.tanh(logits_NV / cap)
        return logits_NV if self.logit_scale == 1 else logits_NV * self.logit_scale

    @torch.no_grad()
    def find_logit_scale(self) -> None:
        """Find the factor by which the family multiplies its logits (Granite, Cohere).

        It is found from the model's own logits of a few tokens. They are also compared with a louder head, because a
        soft cap leaves the small logits of a new model unchanged.

        Raises:
            ValueError: `token_logits`, in float32, still differ from the model's logits: the family does more with
                them.
        """
        theirs_BLV, plain_BLV = self._own_and_plain()
        if self.logit_softcap is None:
            theirs, plain = theirs_BLV.double().flatten(), plain_BLV.double().flatten()
            scale = float(theirs @ plain / (plain @ plain))
            # Six digits, as in a config, drop the rounding of the products. Within 1e-4 of 1 it is rounding.
            self.logit_scale = float(f"{scale:.6g}") if math.isfinite(scale) and abs(scale - 1) > 1e-4 else 1.0
        self._compare(theirs_BLV, plain_BLV)
        weight = self.lm.get_output_embeddings().weight
        weight.mul_(_LOUDER)
        theirs_BLV, plain_BLV = self._own_and_plain()
        weight.div_(_LOUDER)  # a power of 2, so the weights are restored bit for bit
        self._compare(theirs_BLV, plain_BLV)

    def _own_and_plain(self) -> tuple[Tensor, Tensor]:
        """Return the model's own logits of a few tokens, and the plain head's of its last hidden states."""
        tokens_BL = torch.tensor([[0, 1, 2]], device=self.lm.device)
        trunk = self.lm.base_model(input_ids=tokens_BL, use_cache=False)
        if not hasattr(trunk, "last_hidden_state"):
            raise ValueError(
                f"{self._named}: it has no separate trunk that returns its last hidden states, which training needs; "
                "use a student.model of another family"
            )
        plain_BLV = self.lm.get_output_embeddings()(trunk.last_hidden_state)
        return self.lm(input_ids=tokens_BL, use_cache=False).logits, plain_BLV

    def _compare(self, theirs_BLV: Tensor, plain_BLV: Tensor) -> None:
        difference = (theirs_BLV - self.scaled(plain_BLV)).abs().max().item()
        if not difference <= 1e-3 * max(theirs_BLV.abs().max().item(), abs(self.logit_scale)):  # also true for NaN
            raise ValueError(
                f"{self._named}: the head applied to the last hidden states differs from the model's logits by "
                f"{difference:.3g}, by more than a factor; training does not support what this family does to its "
                "logits. Use a student.model of another family"
            )

    @property
    def _named(self) -> str:
        return f"{type(self.lm).__name__} ({self.lm.config.model_type})"


def _plain(head: nn.Module) -> nn.Linear | None:
    """Return a head that multiplies with a weight which is here whole, and does nothing else; else None."""
    is_partitioned = hasattr(getattr(head, "weight", None), "ds_id")  # by ZeRO stage 3
    is_watched = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return None if type(head) is not nn.Linear or is_partitioned or is_watched else head


def _counts(scores: ByteScores, batch: MicroBatch) -> tuple[Tensor, ...]:
    """Count positions, in the order of `COUNTS`."""
    counted_P = scores.counted_P
    num_positions = counted_P.new_ones(counted_P.shape).sum().float()
    return num_positions, (~counted_P).sum().float(), (batch.kl_P & counted_P).sum().float()
