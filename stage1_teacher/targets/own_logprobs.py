"""Comparison of a record's stored token log-probabilities with the model's own, without the code that made them.

Shape legend: N tokens compared.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline.tokenization.chat_records import encode_whole
from schemas.record import Record
from stage1_teacher.engines.base import ListingEngine
from stage1_teacher.engines.self_check import TIMES_CONTROL
from stage1_teacher.inputs.chat_windows import chat_window
from stage1_teacher.inputs.encoded_windows import EncodedWindow, text_window
from stage1_teacher.inputs.windows import Window
from stage1_teacher.targets.teacher import Teacher

MAX_TOKENS = 64  # compared per record: each takes a row of the whole vocabulary
MIN_COMPARED_NATS = -15.0  # below this a shard's levels are up to 1.6 nats apart
# Half the mean square of the differences in token log-probability, nats: the KL of two distributions that differ by so
# little. bfloat16 in another batch costs about 1.5e-3; wrong heads have cost hundreds.
LIMIT_NATS = 0.05


class OwnTokens(NamedTuple):
    """The model's own log-probabilities of a window's first covered tokens."""

    logprobs_N: np.ndarray  # nats
    first: int  # index of the first of them in a record's `teacher_token_logprobs`


def compute_own(teacher: Teacher, window: EncodedWindow, max_tokens: int = MAX_TOKENS) -> OwnTokens:
    """Compute the model's own log-probabilities of the first covered tokens (in a chat, those of its first turn)."""
    span = window.spans[0]
    prompt = teacher.prompt(window)
    at = len(prompt) - len(window.tokens) + span.first  # index of the first covered token; at least 1
    tokens = span.tokens[:max_tokens]
    gap = 1 if span.start else 0  # the text before a span is stored as one token
    if not tokens:
        return OwnTokens(np.zeros(0), gap)
    prefix = prompt[: at + len(tokens)]
    if isinstance(teacher.engine, ListingEngine):
        [rows] = teacher.engine.listed_rows([prefix])
        return OwnTokens(rows[at - 1 : len(prefix) - 1].logprobs_of(tokens), gap)
    own_NV = teacher.engine.own_logprobs(prefix, at - 1)[:-1]
    return OwnTokens(own_NV.numpy()[np.arange(len(tokens)), tokens].astype(np.float64), gap)


def half_squares(record: Record, own: OwnTokens) -> np.ndarray:
    """Return half the squared difference of each stored log-probability from the model's own: N, nats."""
    stored_N = record.teacher_token_logprobs[own.first : own.first + len(own.logprobs_N)].astype(np.float64)
    return _half_square(stored_N, own.logprobs_N)


class Comparison(NamedTuple):
    """Differences of the stored log-probabilities from the model's own.

    Attributes:
        nats_N: from `half_squares`.
        limit_nats: maximum of their mean: `LIMIT_NATS`; if the mean exceeds that, `TIMES_CONTROL` times the difference
            between two runs of the model, if that is more (experts may be chosen differently).
    """

    nats_N: np.ndarray
    limit_nats: float

    @property
    def nats(self) -> float:
        """Mean difference; 0 if nothing was compared."""
        return float(self.nats_N.mean()) if len(self.nats_N) else 0.0

    @property
    def is_within_limit(self) -> bool:
        """True if the mean is at most the limit; False if it is nan."""
        return self.nats <= self.limit_nats


def compare(record: Record, window: EncodedWindow, teacher: Teacher) -> Comparison:
    """Compare a record with the model, which runs once more as a control if they differ by more than `LIMIT_NATS`."""
    own = compute_own(teacher, window)
    comparison = Comparison(half_squares(record, own), LIMIT_NATS)
    if comparison.is_within_limit:
        return comparison
    control = float(_half_square(own.logprobs_N, compute_own(teacher, window).logprobs_N).mean())
    return comparison._replace(limit_nats=max(LIMIT_NATS, TIMES_CONTROL * control))


def _half_square(one_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    return (np.maximum(one_N, MIN_COMPARED_NATS) - np.maximum(other_N, MIN_COMPARED_NATS)) ** 2 / 2


def window_of(record: Record, teacher: Teacher) -> EncodedWindow:
    """Rebuild the window that a record with segments was made from.

    Raises ValueError for a chat that the template cannot render.
    """
    if record.message_roles:
        assert teacher.chat is not None  # the recipe says that the corpus holds chats
        conversation = record.conversation
        [encoded] = encode_whole(teacher.chat, [record])
        if isinstance(encoded, ValueError):
            raise encoded
        window = chat_window(record.doc_id, record.message_roles, encoded, teacher.ends, conversation=conversation)
        # A window need not supervise all its turns, nor the END of one that was cut off.
        stored = {(segment.start, segment.length): segment for segment in record.segments}
        spans = ((span, stored.get((span.segments[0].start, span.segments[0].length))) for span in window.spans)
        return replace(window, spans=tuple(replace(s, segments=(own,)) for s, own in spans if own is not None))
    end, first = record.window_start + len(record.document), record.segments[0].start
    bounds = Window(record.window_start, end, record.window_start + first, record.segments[-1].has_end)
    tokens = teacher.tokenizer.encode(record.document)
    return text_window(record.doc_id, bounds, record.document, tokens, teacher.tokenizer.prefix, record.segments)
