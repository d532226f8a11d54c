"""Alternatives of the teacher's tokens at a position, as text: what each token spells, and how probable it is."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from pipeline.dumps.glyphs import readable
from schemas import dump_files
from schemas.record import Record
from schemas.storage.locations import Location
from schemas.token_vocabulary import read_vocabulary

Vocabulary = Sequence[bytes | None]  # bytes of each of the teacher's token ids; None: not text


class TokenDistribution(NamedTuple):
    """The teacher's next-token distribution where one of its tokens starts, or a segment ends.

    Attributes:
        own: id of the token that the text has; None where a segment ends.
        alternatives: (id, probability), most probable first; none where a segment ends.
        tail: probability of all other tokens.
        end: probability of the end tokens, together; None where it is not known.
    """

    own: int | None
    alternatives: list[tuple[int, float]]
    tail: float
    end: float | None


def distribution(record: Record, token: int, ends: bool = False) -> TokenDistribution | None:
    """Return the distribution of a record's token, or what follows its last one; None if the dump stores none.

    Args:
        token: index; with `ends` that of the first token behind a segment's end.
    """
    tokens = record.tokens
    if tokens is None:
        return None
    end = float(np.exp(tokens.end_log_probs[token].astype(np.float64)))
    known_end = None if np.isnan(end) else end
    if ends:
        return TokenDistribution(None, [], 1.0, known_end)
    alternatives = slice(int(tokens.offsets[token]), int(tokens.offsets[token + 1]))
    probs = np.exp(tokens.log_probs[alternatives].astype(np.float64)).tolist()
    listed = list(zip(tokens.ids[alternatives].tolist(), probs, strict=True))
    return TokenDistribution(int(tokens.token_ids[token]), listed, max(0.0, 1.0 - sum(probs)), known_end)


def vocabulary_of(dump: Location) -> Vocabulary:
    """Return what the dump's vocabulary spells; empty for a dump without one."""
    return read_vocabulary(dump) if (dump / dump_files.VOCABULARY).exists() else ()


def token_name(token: int, vocabulary: Vocabulary) -> str:
    """Return a token's text between bars, half a character as hexadecimal digits, or the id of one that is not text.

    For example `|␠the|`, `<c3>`, `#50256`.
    """
    spelled = vocabulary[token] if token < len(vocabulary) else None
    if spelled is None:
        return f"#{token}"
    try:
        spelled.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{spelled.hex()}>"
    return f"|{readable(spelled)}|"


def token_line(found: TokenDistribution, top: int, vocabulary: Vocabulary) -> Text:
    """Return a line with the most probable tokens, the text's own highlighted, and the end token."""
    line = Text("          tokens", style="dim")
    for token, probability in _shown(found, top):
        style = "bold magenta" if token == found.own else "not dim"
        line.append(f"  {token_name(token, vocabulary)} {probability:.4f}", style=style)
    if found.own is not None:
        line.append(f"  tail {found.tail:.4f}", style="not dim")
    if found.end is not None:
        line.append(f"  end token {found.end:.4f}", style="not dim")
    return line


def _shown(found: TokenDistribution, top: int) -> Iterator[tuple[int, float]]:
    """Yield the first alternatives, and the text's own wherever it is."""
    for rank, (token, probability) in enumerate(found.alternatives):
        if rank < top or token == found.own:
            yield token, probability


def as_values(found: TokenDistribution, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return a distribution as JSON values; a token's text, which may be half a character, as a list of bytes."""
    listed = [
        {
            "id": token,
            "bytes": None if token >= len(vocabulary) or (spelled := vocabulary[token]) is None else list(spelled),
            "probability": probability,
        }
        for token, probability in found.alternatives
    ]
    return {"own": found.own, "alternatives": listed, "tail": found.tail, "end": found.end}
