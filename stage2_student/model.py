"""The student: a causal language model with a byte interface on its last hidden states.

Shape legend: B documents, L tokens (start token included), N supervised tokens, D hidden width.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from stage2_student.alm import chunk_loss
from stage2_student.batches import NO_LABEL, MicroBatch
from stage2_student.interfaces import ByteScores, Interface
from stage2_student.losses import class_divergence, symbol_cross_entropy, token_cross_entropy

PARTS = ("ce", "byte_ce", "kl", "alm")
COUNTS = ("positions", "uncounted", "kl_positions")  # all; those the interface does not stand by; those with KL


@dataclass(frozen=True)
class Precision:
    """Weights stay float32; with bfloat16 the matrix products run under autocast, and the losses in float32."""

    dtype: torch.dtype

    def context(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)


class Student(nn.Module):
    """A causal language model and its interface. `forward` is the loss: under ZeRO-3 weights exist only inside it.

    Only what has a weight is computed. Without a byte objective there is no interface (None): plain cross-entropy is the
    control, and as fast as it can be.
    """

    def __init__(self, lm: Any, interface: Interface | None, train: TrainConfig) -> None:
        super().__init__()
        assert (interface is not None) == train.objectives.uses_bytes
        self.lm = lm
        self.interface = interface
        self.train_config = train
        self.objectives = train.objectives
        self.precision = Precision(getattr(torch, train.dtype))
        self.logit_softcap: float | None = getattr(lm.config, "final_logit_softcapping", None)

    def forward(
        self, batch: MicroBatch, interface_alone: bool = False, tokens_alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the objectives in nats, and what `sums_names` names (unweighted, detached).

        With `interface_alone` the interface learns, and none of its gradient reaches the states that it reads. With
        `tokens_alone` it is the nats of the batch's labels, and no sums: evaluation has to come through `forward` too.
        """
        if tokens_alone:
            nats = self._label_nats(batch)
            return nats, nats.new_empty(0)
        with self.precision.context(batch.tokens_BL.device.type):
            packed = {} if batch.positions_BL is None else {"position_ids": batch.positions_BL}
            hidden_BLD = self.lm.base_model(input_ids=batch.tokens_BL, use_cache=False, **packed).last_hidden_state
            sums: dict[str, Tensor] = {}
            nats_N = None
            if self.interface is not None:
                read_BLD = hidden_BLD.detach() if interface_alone else hidden_BLD
                scores = self.interface(read_BLD, batch, self.token_logits)
                sums |= self._byte_sums(scores, batch)
                nats_N = None if interface_alone else scores.token_nats_N
            if self.objectives.uses_tokens:
                sums |= self._token_sums(hidden_BLD, batch, nats_N)
        weights = self.objectives.model_dump()
        nats = torch.stack([weights[name] * sums[name] for name in PARTS if weights[name]]).sum()
        return nats, torch.stack([sums[name] for name in self.sums_names]).detach()

    def _label_nats(self, batch: MicroBatch) -> Tensor:
        """Sum of -ln p(label | tokens before), a float32 scalar."""
        with self.precision.context(batch.tokens_BL.device.type):
            hidden_BLD = self.lm.base_model(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state
            supervised_BL = batch.labels_BL != NO_LABEL
            nats_N = token_cross_entropy(hidden_BLD[supervised_BL], batch.labels_BL[supervised_BL], self.token_logits)
        return nats_N.sum()

    @property
    def sums_names(self) -> tuple[str, ...]:
        """What `forward` sums up: the parts that are computed, then counts of positions."""
        used = self.objectives
        computed = {"ce": used.uses_tokens, "byte_ce": used.uses_bytes, "kl": used.kl > 0, "alm": used.alm > 0}
        return tuple(name for name in PARTS if computed[name]) + (COUNTS if used.uses_bytes else ())

    def _token_sums(self, hidden_BLD: Tensor, batch: MicroBatch, nats_N: Tensor | None) -> dict[str, Tensor]:
        """Sums over the supervised tokens, END included; `nats_N` where the interface knows them already."""
        supervised_BL = batch.labels_BL != NO_LABEL
        if nats_N is None:
            labels_N = batch.labels_BL[supervised_BL]
            nats_N = token_cross_entropy(hidden_BLD[supervised_BL], labels_N, self.token_logits)
        sums = {"ce": nats_N.sum()}
        if self.objectives.alm:
            chunk_N = batch.extra["alm_chunk_BL"][supervised_BL]
            sums["alm"] = chunk_loss(nats_N, chunk_N, batch.extra["alm_teacher_C"], self.train_config.alm_tau)
        return sums

    def _byte_sums(self, scores: ByteScores, batch: MicroBatch) -> dict[str, Tensor]:
        """Sums over the positions that the interface stands by."""
        logits_PV, counted_P = scores.logits_PV, scores.counted_P
        kl_P = batch.kl_P & counted_P
        sums = {
            "byte_ce": symbol_cross_entropy(logits_PV, batch.symbols_P, counted_P),
            "positions": counted_P.new_ones(counted_P.shape).sum().float(),
            "uncounted": (~counted_P).sum().float(),
            "kl_positions": kl_P.sum().float(),
        }
        if self.objectives.kl:
            entries = (batch.entry_symbols_PE, batch.entry_logprobs_PE)
            train = self.train_config
            sums["kl"] = class_divergence(logits_PV, *entries, kl_P, train.kl_direction, train.kl_temperature)
        return sums

    def token_logits(self, hidden_ND: Tensor) -> Tensor:
        """The student's own next-token logits."""
        with self.precision.context(hidden_ND.device.type):  # again: the checkpointed head runs outside `forward` too
            logits_NV = self.lm.get_output_embeddings()(hidden_ND)
        return self._capped(logits_NV)

    def _capped(self, logits_NV: Tensor) -> Tensor:
        cap = self.logit_softcap
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def rates(self) -> dict[float, list[nn.Parameter]]:
        """The parameters that learn, by the multiple of the learning rate that they learn at."""
        ends = (self.lm.get_input_embeddings(), self.lm.get_output_embeddings())
        embedding = {id(parameter) for module in ends for parameter in module.parameters()}
        found: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            rate = self.train_config.embedding_lr if id(parameter) in embedding else 1.0
            if name.startswith("interface."):
                rate = self.train_config.interface_lr
            if parameter.requires_grad:
                found.setdefault(rate, []).append(parameter)
        return found

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise ValueError where `token_logits`, in float32, are not the model's: a family that scales its logits in another way."""
        tokens_BL = torch.tensor([[0, 1, 2]])
        theirs_BLV = self.lm(input_ids=tokens_BL, use_cache=False).logits
        hidden_BLD = self.lm.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        ours_BLV = self._capped(self.lm.get_output_embeddings()(hidden_BLD))
        if not torch.allclose(theirs_BLV, ours_BLV, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{self.lm.config.model_type}: the head applied to the last hidden states differs from the model's "
                f"logits by {(theirs_BLV - ours_BLV).abs().max().item():.3g}; its scaling of logits is not supported"
            )
