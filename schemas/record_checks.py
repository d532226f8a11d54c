"""Checks of a record: structural errors, and invalid target values."""

import json
from itertools import accumulate

import numpy as np

from schemas.record import Record
from schemas.token_alternatives import token_faults, token_layout_faults


def record_faults(record: Record) -> list[str]:
    """Describe everything that is wrong with a record; empty for a valid one."""
    return layout_faults(record) or value_faults(record)


def value_faults(record: Record) -> list[str]:
    """Describe invalid values of a record without structural errors."""
    return _entry_faults(record) + ([] if record.tokens is None else token_faults(record.tokens))


def layout_faults(record: Record) -> list[str]:
    """Describe structural errors: inconsistent counts, and numbers that are not log-probabilities."""
    checks = [
        (record.window_start >= 0, "its window starts before the document"),
        (_is_utf8(record), "its text, or that of a message, is not UTF-8"),
        (
            int(record.teacher_token_lengths.sum(dtype=np.int64)) == len(record.document)
            and bool((record.teacher_token_lengths >= 0).all()),
            "teacher tokens do not span the document",
        ),
        (len(record.teacher_token_lengths) == len(record.teacher_token_logprobs), "token columns differ in length"),
        (
            all(s.start >= 0 and s.length >= 0 and s.start + s.length <= len(record.document) for s in record.segments),
            "a segment lies outside the document",
        ),
        (len(record.message_roles) == len(record.message_lengths), "message columns differ in length"),
        (
            not record.message_lengths
            or (sum(record.message_lengths) == len(record.document) and min(record.message_lengths) >= 0),
            "messages do not span the document",
        ),
        (
            not record.conversation
            or _roles(record.conversation)[-len(record.message_roles) :] == [*record.message_roles],
            "its conversation does not end with its messages",
        ),
        (
            {len(record.entry_counts), *map(len, record.measures.values())} == {record.num_positions},
            "position columns differ from the segments' positions",
        ),
        (
            int(record.entry_counts.sum(dtype=np.int64)) == len(record.symbols) == len(record.logprobs),
            "entry columns differ in length",
        ),
        (bool((record.entry_counts > 0).all()), "a position has no entry"),
        (
            bool(((record.logprobs <= 0) & (record.logprobs > -np.inf)).all()),
            "a stored log-probability is positive or not finite",
        ),
    ]
    of_tokens = [] if record.tokens is None else token_layout_faults(record.tokens)
    return [text for passed, text in checks if not passed] + of_tokens


def _roles(conversation: str) -> list[str]:
    """Return the role of each message in a conversation; empty if it is damaged."""
    try:
        return [str(message["role"]) for message in json.loads(conversation)["messages"]]
    except (ValueError, TypeError, LookupError, RecursionError):
        return []


def _is_utf8(record: Record) -> bool:
    """Tell whether the document is UTF-8, and no message starts inside a character."""
    try:
        record.document.decode("utf-8")
    except UnicodeDecodeError:
        return False
    starts = accumulate(record.message_lengths[:-1])
    return not any(0x80 <= first < 0xC0 for at in starts if at >= 0 for first in record.document[at : at + 1])


def _entry_faults(record: Record) -> list[str]:
    if not len(record.entry_counts):
        return []
    position, faults = record.entry_positions(), []
    if (record.per_position(record.probs()) > 1 + 1e-5).any():  # float32's rounding of logs
        faults.append("the entries of a position sum to more than 1")
    if len(np.unique(position << 8 | record.symbols)) != len(record.symbols):
        faults.append("a position has a symbol twice")
    has_realised = np.zeros(len(record.entry_counts), dtype=bool)
    has_realised[position[record.symbols == record.realised()[position]]] = True
    if not has_realised.all():
        faults.append(f"the realised symbol is not stored at position {int(np.argmin(has_realised))}")
    return faults
