"""The teacher's output head, its rows sorted by token bytes, applied to hidden states chunk by chunk.

The full softmax is reduced to bytes directly from the logits (`stage1_teacher.reduction.reducer`); no log-probability
of a token becomes a Python object.

Shape legend: R rows, D hidden size, C sorted columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pipeline.covering.vocabulary import Vocabulary
from stage1_teacher.reduction.logit_rule import LogitRule

NEVER = -1e30  # logit of a suppressed token: finite, so that the difference of two of them is a number


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products on a CPU round their factors to bfloat16, and still accumulate in float32.

    Exact for factors that are bfloat16 numbers, and faster: oneDNN has kernels for it, which torch's default does not
    use (0.6 of the time on an AMD EPYC). The switch applies to the whole process, not to the thread.
    """
    backend: Any = torch.backends.mkldnn  # whose stubs lack `matmul`
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


class Head:
    """The output head: from hidden states to logits in sorted columns, by the rule of the states' engine (`follow`).

    Args:
        weight_VD: rows by token id, as in the checkpoint.
        bias_V: or None.
        alone: nothing else multiplies matrices in this process while `logits` does; see `bfloat16_products`.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        vocabulary: Vocabulary,
        alone: bool = False,
    ) -> None:
        order = torch.from_numpy(vocabulary.order)
        # float32 on a CPU: its products round the sum to the inputs' dtype, and bfloat16 logits are wrong by up to 0.1.
        self.weight_CD = weight_VD[order].float()
        self.bias_C = None if bias_V is None else bias_V[order].float()
        self.alone, self._column_V = alone, torch.from_numpy(vocabulary.column)
        self.follow(LogitRule())
        self._dtype = weight_VD.dtype
        self._buffer: Tensor | None = None

    def to(self, device: str) -> "Head":
        """Move the head, in place. A GPU holds it in the checkpoint's dtype, and still accumulates in float32."""
        self.weight_CD = self.weight_CD.to(device, torch.float32 if device == "cpu" else self._dtype)
        self.bias_C = None if self.bias_C is None else self.bias_C.to(device)
        self._buffer = None
        self.follow(self.rule)
        return self

    def follow(self, rule: LogitRule) -> None:
        """Apply this rule, that of the engine's model, to the products from now on."""
        self.rule = rule
        self._suppressed = self._column_V[list(rule.suppressed)].to(self.weight_CD.device)

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Compute the logits, R x C float32, on the head's device. The next call overwrites them."""
        weight_CD = self.weight_CD
        logits_RC = self._logits_buffer(len(hidden_RD))
        hidden_RD = hidden_RD.to(weight_CD.device, weight_CD.dtype)
        if weight_CD.dtype == torch.float32:
            with bfloat16_products() if self._holds_bfloat16(hidden_RD) else nullcontext():
                torch.mm(hidden_RD, weight_CD.T, out=logits_RC)
        else:
            torch.mm(hidden_RD, weight_CD.T, out_dtype=torch.float32, out=logits_RC)
        if self.bias_C is not None:
            logits_RC += self.bias_C
        if self.rule.scale != 1.0:
            logits_RC *= self.rule.scale
        if self.rule.soft_cap:
            logits_RC.div_(self.rule.soft_cap).tanh_().mul_(self.rule.soft_cap)
        if self.rule.suppressed:
            logits_RC[:, self._suppressed] = NEVER
        return logits_RC

    def _holds_bfloat16(self, hidden_RD: Tensor) -> bool:
        """Return whether both factors are float32 copies of bfloat16 numbers and `bfloat16_products` may be used."""
        return self.alone and self._dtype == torch.bfloat16 and torch.equal(hidden_RD, hidden_RD.bfloat16().float())

    def _logits_buffer(self, num_rows: int) -> Tensor:
        """Return the buffer for the logits, kept between calls: fresh pages for 25 MB cost more than the product."""
        if self._buffer is None or len(self._buffer) < num_rows:
            self._buffer = torch.empty(num_rows, len(self.weight_CD), dtype=torch.float32, device=self.weight_CD.device)
        return self._buffer[:num_rows]
