"""The terms of the loss, each a sum in nats; the loop divides once, by the global number of supervised bytes.

Shape legend: N student tokens, D hidden width, P supervised byte positions, E entries stored per
position (padded), V symbols (256).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

NO_SYMBOL = -1  # pads a position's entries


def token_cross_entropy(
    hidden_ND: Tensor, labels_N: Tensor, token_logits: Callable[[Tensor], Tensor], chunk_tokens: int = 512
) -> Tensor:
    """-ln p(label | state) of each token, in nats; (N,) float32.

    The logits of `chunk_tokens` tokens are held at once, and computed again for the gradient: the whole
    (N, vocabulary) in float32 would be larger than a small student (4096 x 49152 x 4 bytes = 805 MB).

    Args:
        hidden_ND: the states that predict the labels, supervised tokens only.
        labels_N: int64.
        token_logits: the student's head, (n, D) -> (n, vocabulary).
    """

    def chunk_nats(hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
        return cross_entropy(token_logits(hidden_nD).float(), labels_n, reduction="none")

    # At least one chunk, empty or not: on a rank without supervised tokens the head must still have a (zero) gradient.
    chunks = zip(
        hidden_ND.split(chunk_tokens) or (hidden_ND,), labels_N.split(chunk_tokens) or (labels_N,), strict=True
    )
    if not torch.is_grad_enabled():
        return torch.cat([chunk_nats(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(chunk_nats, *chunk, use_reentrant=False) for chunk in chunks])


def symbol_cross_entropy(logits_PV: Tensor, symbols_P: Tensor, counted_P: Tensor) -> Tensor:
    """Sum of -ln p(symbol) over the counted positions, in nats; a scalar. END counts as any other symbol."""
    return cross_entropy(logits_PV[counted_P].float(), symbols_P[counted_P], reduction="sum")


def sparse_kl(logits_PV: Tensor, entry_symbols_PE: Tensor, entry_logprobs_PE: Tensor, counted_P: Tensor) -> Tensor:
    """KL(teacher || student) over the stored symbols and one class for all the others, summed over counted positions.

    At a position: sum over entries of t ln(t / p) + tail ln(tail / p_tail). `p_tail` is a log-sum-exp over the unstored
    symbols: 1 - sum p in float32 is noise when the student is sure. Entries that sum to slightly more than 1 (float16
    rounding) leave a tail of 0.

    Args:
        logits_PV: raw logits of the 256 symbols; the arithmetic is float32.
        entry_symbols_PE: int64, `NO_SYMBOL` at padding; a symbol is stored at most once per position.
        entry_logprobs_PE: float32 natural logs; ignored at padding.
        counted_P: bool; a position that is not counted has no gradient.
    Returns:
        nats, a scalar.
    """
    logprobs_PV = logits_PV[counted_P].float().log_softmax(-1)
    symbols_PE, teacher_logprobs_PE = entry_symbols_PE[counted_P], entry_logprobs_PE[counted_P].float()
    stored_PE = symbols_PE != NO_SYMBOL
    probs_PE = torch.where(stored_PE, teacher_logprobs_PE.exp(), 0.0)
    student_logprobs_PE = logprobs_PV.gather(-1, symbols_PE.clamp(min=0))
    entries_P = torch.where(stored_PE, probs_PE * (teacher_logprobs_PE - student_logprobs_PE), 0.0).sum(-1)
    return (entries_P + _tail_term(logprobs_PV, symbols_PE, stored_PE, probs_PE)).sum()


def _tail_term(logprobs_PV: Tensor, symbols_PE: Tensor, stored_PE: Tensor, probs_PE: Tensor) -> Tensor:
    """P: tail ln(tail / p_tail); 0 where everything is stored or the tail is 0."""
    # An integer sum, not an assignment: padding points at symbol 0, and must not undo it.
    hits_PV = torch.zeros_like(logprobs_PV, dtype=torch.int32).scatter_add_(
        -1, symbols_PE.clamp(min=0), stored_PE.to(torch.int32)
    )
    is_stored_PV = hits_PV > 0
    tail_P = (1.0 - probs_PE.sum(-1)).clamp(min=0.0)
    counts_P = (tail_P > 0) & ~is_stored_PV.all(-1)
    # Masked before the log-sum-exp and before the log: both have NaN gradients where a whole row is -inf, or tail is 0.
    unstored_PV = logprobs_PV.masked_fill(is_stored_PV & counts_P[:, None], -torch.inf)
    safe_tail_P = torch.where(counts_P, tail_P, 1.0)
    return torch.where(counts_P, safe_tail_P * (safe_tail_P.log() - unstored_PV.logsumexp(-1)), 0.0)
