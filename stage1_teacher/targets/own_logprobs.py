"""A record's stored log-probabilities of tokens beside the model's own: nothing of what made them is used again.

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

MAX_TOKENS = 64  # of a record: each takes a row of the whole vocabulary
MIN_COMPARED_NATS = -15.0  # below, a shard's levels are up to 1.6 nats apart
# Half the mean square of what a token's log-probability is off by, nats: what two distributions that differ by as
# little have as their KL. bfloat16 in another batch costs about 1.5e-3; heads that were wrong have cost hundreds.
LIMIT_NATS = 0.05


class OwnTokens(NamedTuple):
    """What the model itself says of a window's first tokens."""

    logprobs_N: np.ndarray  # nats
    first: int  # the place of the first of them in a record's `teacher_token_logprobs`


def compute_own(teacher: Teacher, window: EncodedWindow, most: int = MAX_TOKENS) -> OwnTokens:
    """Ask the engine's model for the first tokens that are covered (of a chat, those of its first turn)."""
    span = window.spans[0]
    prompt = teacher.prompt(window)
    at = len(prompt) - len(window.tokens) + span.first  # of the first covered token; at least one is before it
    tokens = span.tokens[:most]
    gap = 1 if span.start else 0  # what is before a span is stored as one token
    if not tokens:
        return OwnTokens(np.zeros(0), gap)
    asked = prompt[: at + len(tokens)]
    if isinstance(teacher.engine, ListingEngine):
        [rows] = teacher.engine.listed_rows([asked])
        return OwnTokens(rows[at - 1 : len(asked) - 1].logprobs_of(tokens), gap)
    own_NV = teacher.engine.own_logprobs(asked, at - 1)[:-1]
    return OwnTokens(own_NV.numpy()[np.arange(len(tokens)), tokens].astype(np.float64), gap)


def half_squares(record: Record, own: OwnTokens) -> np.ndarray:
    """N, nats: half the square of what each stored log-probability is off by."""
    stored_N = record.teacher_token_logprobs[own.first : own.first + len(own.logprobs_N)].astype(np.float64)
    return _half_square(stored_N, own.logprobs_N)


class Comparison(NamedTuple):
    """What is stored beside what the model says now.

    Attributes:
        nats_N: as `half_squares`.
        limit_nats: what their mean may be: `LIMIT_NATS`, or where they are further apart `TIMES_CONTROL` times what the
            model's answer differs by from its own a moment later, if that is more (experts chosen otherwise).
    """

    nats_N: np.ndarray
    limit_nats: float

    @property
    def nats(self) -> float:
        """The mean; 0 where nothing was compared."""
        return float(self.nats_N.mean()) if len(self.nats_N) else 0.0

    @property
    def is_within_limit(self) -> bool:
        """False for what is not a number, too."""
        return self.nats <= self.limit_nats


def compare(record: Record, window: EncodedWindow, teacher: Teacher) -> Comparison:
    """Ask the model now, and once more where the record is further from its answer than `LIMIT_NATS`."""
    own = compute_own(teacher, window)
    found = Comparison(half_squares(record, own), LIMIT_NATS)
    if found.is_within_limit:
        return found
    control = float(_half_square(own.logprobs_N, compute_own(teacher, window).logprobs_N).mean())
    return found._replace(limit_nats=max(LIMIT_NATS, TIMES_CONTROL * control))


def _half_square(one_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    return (np.maximum(one_N, MIN_COMPARED_NATS) - np.maximum(other_N, MIN_COMPARED_NATS)) ** 2 / 2


def window_of(record: Record, teacher: Teacher) -> EncodedWindow:
    """What a record was made of. Raises ValueError for a chat that this teacher's template does not render."""
    if record.message_roles:
        assert teacher.chat is not None  # the recipe says that the corpus holds chats
        conversation = record.conversation
        [encoded] = encode_whole(teacher.chat, [record])
        if isinstance(encoded, ValueError):
            raise encoded
        window = chat_window(record.doc_id, record.message_roles, encoded, teacher.ends, conversation=conversation)
        # A window does not supervise its first turns.
        return replace(window, spans=tuple(s for s in window.spans if s.segment in record.segments))
    [segment] = record.segments
    end = record.window_start + len(record.document)
    bounds = Window(record.window_start, end, record.window_start + segment.start, segment.has_end)
    tokens = teacher.tokenizer.encode(record.document)
    return text_window(record.doc_id, bounds, record.document, tokens, teacher.tokenizer.prefix)
