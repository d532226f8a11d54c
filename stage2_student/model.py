"""The student: a causal language model with a byte interface on its last hidden states.

Shape legend: B documents, L tokens (start token included), N supervised tokens, D hidden width.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Objectives
from stage2_student.batches import NO_LABEL, MicroBatch
from stage2_student.losses import sparse_kl, symbol_cross_entropy, token_cross_entropy

PARTS = ("ce", "byte_ce", "kl")


@dataclass(frozen=True)
class Precision:
    """Weights stay float32; with bfloat16 the matrix products run under autocast, and the losses in float32."""

    dtype: torch.dtype

    def context(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)


class Student(nn.Module):
    """A causal language model and its interface. `forward` is the loss: under ZeRO-3 weights exist only inside it."""

    def __init__(self, lm: Any, interface: nn.Module, objectives: Objectives, precision: Precision) -> None:
        super().__init__()
        self.lm = lm
        self.interface = interface
        self.objectives = objectives
        self.precision = precision
        self.logit_softcap: float | None = getattr(lm.config, "final_logit_softcapping", None)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The weighted sum of the objectives in nats, and its parts (unweighted, detached) in the order of `PARTS`."""
        with self.precision.context(batch.tokens_BL.device.type):
            hidden_BLD = self.lm.base_model(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state
            supervised_BL = batch.labels_BL != NO_LABEL
            ce = token_cross_entropy(hidden_BLD[supervised_BL], batch.labels_BL[supervised_BL], self.token_logits)
            logits_PV = self.interface(hidden_BLD, batch.state_P, batch.offset_P)
            byte_ce = symbol_cross_entropy(logits_PV, batch.symbols_P)
            kl = sparse_kl(logits_PV, batch.entry_symbols_PE, batch.entry_logprobs_PE, batch.kl_P)
        weights = self.objectives
        nats = weights.ce * ce + weights.byte_ce * byte_ce + weights.kl * kl
        return nats, torch.stack([ce, byte_ce, kl]).detach()

    def token_logits(self, hidden_ND: Tensor) -> Tensor:
        """The student's own next-token logits."""
        with self.precision.context(hidden_ND.device.type):  # again: the checkpointed head runs outside `forward` too
            logits_NV = self.lm.get_output_embeddings()(hidden_ND)
        return self._capped(logits_NV)

    def _capped(self, logits_NV: Tensor) -> Tensor:
        cap = self.logit_softcap
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

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
