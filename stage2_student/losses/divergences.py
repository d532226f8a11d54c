"""The terms of the loss, each a sum in nats; the loop divides once, by the global number of supervised bytes.

Shape legend: N student tokens, D hidden width, P supervised byte positions, E entries stored per position (padded), C =
E + 1 classes (the entries and the tail), V symbols (256).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from stage2_student.data.examples import NO_SYMBOL

# Entries may sum to 1, or slightly more with float32 rounding: a smaller tail is indistinguishable from 0, and 0 would
# make the reverse KL infinite.
MIN_TAIL = 1e-6

Direction = Literal["forward", "reverse", "jensen_shannon"]


def token_cross_entropy(
    hidden_ND: Tensor, labels_N: Tensor, token_logits: Callable[[Tensor], Tensor], chunk_tokens: int = 512
) -> Tensor:
    """Compute -ln p(label | state) of each token, in nats; (N,) float32.

    Only the logits of `chunk_tokens` tokens are held at once, and computed again for the gradient: all (N, vocabulary)
    of them in float32 would be larger than a small student (4096 x 49152 x 4 bytes = 805 MB).

    Args:
        hidden_ND: the states that predict the labels, supervised tokens only.
        labels_N: int64.
        token_logits: the student's head, (n, D) -> (n, vocabulary).
    """

    def chunk_nats(hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
        return cross_entropy(token_logits(hidden_nD).float(), labels_n, reduction="none")

    # At least one chunk, even if empty: on a rank without supervised tokens the head must still get a (zero) gradient.
    chunks = zip(
        hidden_ND.split(chunk_tokens) or (hidden_ND,), labels_N.split(chunk_tokens) or (labels_N,), strict=True
    )
    if not torch.is_grad_enabled():
        return torch.cat([chunk_nats(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(chunk_nats, *chunk, use_reentrant=False) for chunk in chunks])


def symbol_cross_entropy(logits_PV: Tensor, symbols_P: Tensor, counted_P: Tensor) -> Tensor:
    """Sum -ln p(symbol) over the counted positions, in nats; a scalar. END counts like any other symbol."""
    return cross_entropy(logits_PV[counted_P].float(), symbols_P[counted_P], reduction="sum")


def class_divergence(
    logits_PV: Tensor,
    entry_symbols_PE: Tensor,
    entry_logprobs_PE: Tensor,
    counted_P: Tensor,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """Sum the divergence between student and teacher over counted positions.

    Each stored symbol is a class; all others together are one (the tail). Symbols may be tokens of any vocabulary.

    `forward` is KL(teacher || student), `reverse` KL(student || teacher), `jensen_shannon` the mean of the two KLs to
    the mean distribution. A temperature T makes both class distributions proportional to p^(1/T); the tail is tempered
    as a single class, because nothing is known of its parts. The result is multiplied by T^2, so that the gradient, and
    with it the meaning of the weight, keeps its size (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2).

    Args:
        logits_PV: raw logits of the V symbols; the arithmetic is float32.
        entry_symbols_PE: int64, `NO_SYMBOL` at padding; a symbol is stored at most once per position.
        entry_logprobs_PE: float32 natural logs; ignored at padding.
        counted_P: bool; a position that is not counted has no gradient.
    Returns:
        nats, a scalar.
    """
    symbols_PE, stored_PE = entry_symbols_PE[counted_P], entry_symbols_PE[counted_P] != NO_SYMBOL
    student_PC, teacher_PC, is_class_PC = classes(
        logits_PV[counted_P].float().log_softmax(-1), symbols_PE, entry_logprobs_PE[counted_P].float(), stored_PE
    )
    return divergence_of_classes(student_PC, teacher_PC, is_class_PC, direction, temperature)


def divergence_of_classes(
    student_PC: Tensor,
    teacher_PC: Tensor,
    is_class_PC: Tensor,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """Sum the divergence of log-probabilities of the same classes, each side normalised over them; in nats.

    Args:
        is_class_PC: bool; False at padding, whose values are ignored. Each position has a class.
    """
    log_q_PC, log_t_PC = (_tempered(logprobs_PC, is_class_PC, temperature) for logprobs_PC in (student_PC, teacher_PC))
    q_PC, t_PC = (torch.where(is_class_PC, log_PC.exp(), 0.0) for log_PC in (log_q_PC, log_t_PC))
    if direction == "forward":
        terms_PC = t_PC * (log_t_PC - log_q_PC)
    elif direction == "reverse":
        terms_PC = q_PC * (log_q_PC - log_t_PC)
    else:
        log_m_PC = torch.logaddexp(log_t_PC, log_q_PC) - math.log(2)
        terms_PC = (t_PC * (log_t_PC - log_m_PC) + q_PC * (log_q_PC - log_m_PC)) / 2
    return temperature**2 * terms_PC.sum()


def classes(
    logprobs_PV: Tensor, symbols_PE: Tensor, teacher_PE: Tensor, stored_PE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (student, teacher, is a class), each (P, E + 1): log-probabilities of the entries and, last, the tail.

    -inf where there is no class. The student's tail is a log-sum-exp over the unstored symbols, because 1 - sum p in
    float32 is noise when the student is sure.
    """
    # An integer sum, not an assignment: padding points at symbol 0, and must not overwrite it.
    hits_PV = torch.zeros_like(logprobs_PV, dtype=torch.int32).scatter_add_(
        -1, symbols_PE.clamp(min=0), stored_PE.to(torch.int32)
    )
    is_stored_PV = hits_PV > 0
    has_tail_P = ~is_stored_PV.all(-1)
    is_class_PC = torch.cat([stored_PE, has_tail_P[:, None]], dim=-1)
    # No mask where every symbol is stored: a log-sum-exp over nothing has NaN gradients.
    tail_P = logprobs_PV.masked_fill(is_stored_PV & has_tail_P[:, None], -torch.inf).logsumexp(-1)
    student_PC = torch.cat([logprobs_PV.gather(-1, symbols_PE.clamp(min=0)), tail_P[:, None]], dim=-1)
    # float64: a small tail is a difference of numbers near 1, and a reverse KL or a temperature below 1 takes its
    # logarithm.
    teacher_tail_P = 1.0 - torch.where(stored_PE, teacher_PE.double().exp(), 0.0).sum(-1)
    log_tail_P = teacher_tail_P.clamp(min=MIN_TAIL).log().float()
    teacher_PC = torch.cat([teacher_PE, log_tail_P[:, None]], dim=-1)
    return student_PC, teacher_PC, is_class_PC


def _tempered(logprobs_PC: Tensor, is_class_PC: Tensor, temperature: float) -> Tensor:
    """Return ln of p^(1/T), normalised over the classes.

    It is 0 where there is no class, so that no infinity enters a product.
    """
    powers_PC = (logprobs_PC / temperature).masked_fill(~is_class_PC, -torch.inf)
    return powers_PC.log_softmax(-1).masked_fill(~is_class_PC, 0.0)
