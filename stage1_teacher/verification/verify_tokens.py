"""Faults of a record's alternatives that its other columns and the teacher's vocabulary show."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from schemas.record import Record
from schemas.token_alternatives import TokenAlternatives

Vocabulary = Sequence[bytes | None]  # bytes of each of the teacher's token ids; None: not text
# Between the square roots of a token's probability among its alternatives and in `teacher_token_logprobs`: both are
# rounded, the first together with the others and their tail.
MAX_APART = 0.05


def token_faults(record: Record, vocabulary: Vocabulary | None = None, num_ids: int | None = None) -> list[str]:
    """Describe where a record's alternatives contradict its text or its other columns; empty without alternatives.

    Args:
        vocabulary: None: the spelling is not checked.
        num_ids: ids of the teacher's model; None: unknown.
    """
    tokens = record.tokens
    if tokens is None:
        return []
    faults = []
    starts = np.array(list(accumulate(record.teacher_token_lengths.tolist(), initial=0)))[:-1]
    inside_T = np.zeros(len(starts), dtype=bool)
    for segment in record.segments:
        inside_T |= (starts >= segment.start) & (starts < segment.start + segment.length)
    if (lacking_T := inside_T & (tokens.counts == 0)).any():
        faults.append(f"token {int(np.argmax(lacking_T))} is supervised and has no alternatives")
    if num_ids is not None and (tokens.ids >= num_ids).any():
        faults.append(f"an alternative has id {int(tokens.ids.max())}, but the teacher has {num_ids} ids")
    apart_T = _apart(tokens)
    if (apart_T > MAX_APART).any():
        faults.append(f"token {int(np.argmax(apart_T > MAX_APART))} has another probability among its alternatives")
    spelling = None if vocabulary is None else _misspelled(record, tokens, vocabulary)
    return faults if spelling is None else [*faults, spelling]


def _apart(tokens: TokenAlternatives) -> np.ndarray:
    """Return how far apart the square roots of each token's two stored probabilities are; 0 without alternatives."""
    has = tokens.counts > 0
    among = tokens.log_probs[(tokens.offsets[:-1] + tokens.ranks)[has]].astype(np.float64)
    apart_T = np.zeros(len(has))
    apart_T[has] = np.abs(np.exp(among / 2) - np.exp(tokens.token_log_probs[has].astype(np.float64) / 2))
    return apart_T


def _misspelled(record: Record, tokens: TokenAlternatives, vocabulary: Vocabulary) -> str | None:
    """Describe the first token that does not spell its bytes of the document.

    The first of a span may have more in front: bytes that the tokenizer puts before a text, or that belong to a chat's
    template.
    """
    edges = list(accumulate(record.teacher_token_lengths.tolist(), initial=0))
    begins = {segment.start for segment in record.segments}
    before = -1
    for index, (token, (start, end)) in enumerate(zip(tokens.token_ids.tolist(), pairwise(edges), strict=True)):
        if token >= 0:
            said = record.document[start:end]
            spelled = vocabulary[token] if token < len(vocabulary) else None
            fits = spelled is not None and (
                spelled.endswith(said) if before < 0 or start in begins else spelled == said
            )
            if not fits:
                return f"token {index} is {token}, which spells {spelled!r}, but the document has {said!r}"
        before = token
    return None
