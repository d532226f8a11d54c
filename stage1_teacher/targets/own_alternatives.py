"""Comparison of a record's stored alternatives with the model's own distributions, without the code that made them.

Shape legend: N tokens compared, V token ids, A alternatives of all of them in turn.
"""

import numpy as np

from schemas.record import Record
from schemas.token_alternatives import TokenAlternatives
from stage1_teacher.engines.base import ListingEngine
from stage1_teacher.engines.self_check import TIMES_CONTROL
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.targets.own_logprobs import LIMIT_NATS, MAX_TOKENS, Comparison
from stage1_teacher.targets.teacher import Teacher

TAIL_FLOOR = 1e-4  # of a tail of rounded probabilities, as in `stage1_teacher.targets.distances`
END_FLOOR = 1e-4  # likewise


def compare_alternatives(record: Record, window: EncodedWindow, teacher: Teacher) -> Comparison | None:
    """Compare the alternatives of a record's first tokens, and their END, with the model's own.

    The model runs once more as a control if they differ by more than `LIMIT_NATS`. None for a record without any.
    """
    if record.tokens is None or not window.spans or isinstance(teacher.engine, ListingEngine):
        return None
    own_RV = _own(window, teacher)
    if len(own_RV) < 2:
        return None
    first = 1 if window.spans[0].start else 0  # the text before a span is stored as one token
    comparison = Comparison(differences(record.tokens, first, own_RV, teacher.ends), LIMIT_NATS)
    if comparison.is_within_limit:
        return comparison
    control = float((np.exp(own_RV) * (own_RV - _own(window, teacher))).sum(axis=1).mean())
    return comparison._replace(limit_nats=max(LIMIT_NATS, TIMES_CONTROL * control))


def _own(window: EncodedWindow, teacher: Teacher) -> np.ndarray:
    """Compute the model's own log-probabilities at the first covered tokens and after them (N + 1 x V, float64)."""
    span, prompt = window.spans[0], teacher.prompt(window)
    at = len(prompt) - len(window.tokens) + span.first  # index of the first covered token; at least 1
    tokens = span.tokens[:MAX_TOKENS]
    assert not isinstance(teacher.engine, ListingEngine)
    return teacher.engine.own_logprobs(prompt[: at + len(tokens)], at - 1).double().numpy()


def differences(tokens: TokenAlternatives, first: int, own_RV: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """Return how far stored alternatives are from a model's own distributions: N, nats.

    It is KL(own || stored) over a token's alternatives and its tail, and over END and all else; of the last token also
    over END and all else after it.

    Args:
        first: index of the first token compared.
        own_RV: natural logs, float64, before each of N tokens and after the last.
        ends: ids that mean END.
    """
    own_NV = own_RV[:-1]
    last = first + len(own_NV)
    start, stop = tokens.offsets[first], tokens.offsets[last]
    row_A = np.repeat(np.arange(len(own_NV)), tokens.counts[first:last])
    own_A = np.exp(own_NV[row_A, tokens.ids[start:stop]])
    stored_A = np.exp(tokens.log_probs[start:stop].astype(np.float64))
    own_tail_N = np.maximum(1 - np.bincount(row_A, own_A, len(own_NV)), TAIL_FLOOR)
    stored_tail_N = np.maximum(tokens.tails[first:last], TAIL_FLOOR)
    nats_N = np.bincount(row_A, own_A * np.log(np.maximum(own_A, 1e-35) / stored_A), len(own_NV))
    nats_N += own_tail_N * np.log(own_tail_N / stored_tail_N)
    own_end_R = np.exp(own_RV[:, list(ends)]).sum(axis=1)
    end_R = _two_classes(own_end_R, np.exp(tokens.end_log_probs[first : last + 1].astype(np.float64)))
    nats_N += end_R[:-1]
    nats_N[-1] += end_R[-1]
    return np.asarray(nats_N)


def _two_classes(own_R: np.ndarray, stored_R: np.ndarray) -> np.ndarray:
    """Return KL(own || stored) of an event of these probabilities, and of its absence."""
    pairs = ((own_R, stored_R), (1 - own_R, 1 - stored_R))
    return np.asarray(
        sum(
            np.maximum(own, END_FLOOR) * np.log(np.maximum(own, END_FLOOR) / np.maximum(stored, END_FLOOR))
            for own, stored in pairs
        )
    )
