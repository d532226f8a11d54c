"""Cross-entropy computed with the head in one kernel, by Liger, which never holds the logits of all tokens.

Source: Hsu et al. 2024, arXiv:2410.10989. Shape legend: N supervised tokens, D hidden width, V vocabulary.
"""

import importlib
from typing import TYPE_CHECKING

from pipeline.config import TrainConfig
from stage2_student.acceleration.requirements import require_gpu, require_package

if TYPE_CHECKING:  # the launcher checks options without torch
    from torch import Tensor, nn

_KEY, _OTHERWISE = "train.fused_ce: liger", "train.fused_ce=none"


def check_fused_ce(train: TrainConfig) -> None:
    """Raise ValueError if this machine lacks the package or the GPU of `train.fused_ce`."""
    if train.fused_ce == "liger":
        require_package(_KEY, "liger-kernel", "pip install liger-kernel", _OTHERWISE)
        require_gpu(_KEY, _OTHERWISE)


def fused_label_nats(
    hidden_ND: "Tensor", labels_N: "Tensor", head: "nn.Module", scale: float, softcap: float | None
) -> "Tensor":
    """Compute the sum of -ln p(label | state), in nats; (1,), float32.

    Args:
        hidden_ND: the states that predict the labels, at least one.
        head: a linear layer.
        scale: of the head's products, as the family has it.
        softcap: of these, as the family has it.
    """
    import torch

    kernel = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    loss = kernel(reduction="sum", softcap=softcap, accum_dtype=torch.float32)
    bias = getattr(head, "bias", None)
    if scale != 1:
        hidden_ND, bias = hidden_ND * scale, None if bias is None else bias * scale
    nats: Tensor = loss(head.weight, hidden_ND, labels_N, bias)
    return nats.float().reshape(1)
