"""The old tokens that spell each token of a new vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from pipeline.tokenization.yielded_tokens import Tokenizing, reachable

KINDS = ("copied", "averaged", "fallback", "control", "unreachable")


class TransferTokenizer(Tokenizing, Protocol):
    """The tokenizer that a transfer needs: bytes by id, and encodings.

    `pipeline.tokenization.byte_tokenizer.ByteTokenizer` is one.
    """


def row_sources(
    old: TransferTokenizer,
    new: TransferTokenizer,
    controls: dict[int, int],
    old_rows: int,
    pieces_of: Mapping[bytes, int] | None = None,
) -> tuple[list[list[int]], list[str]]:
    """Return for each new token the old rows whose mean it gets (empty: the mean of all), and its kind.

    A token that the new tokenizer never yields must not share the mass of one that it does: two rows of the same bytes
    get the same logit, and a sum over bytes cannot tell them apart.

    Args:
        controls: new id -> old id of tokens with a role (start, end), whatever their spelling.
        old_rows: rows of the old embedding.
        pieces_of: `spelling_tokens` of the old tokenizer, if they are known.
    """
    pieces_of = spelling_tokens(old, old_rows) if pieces_of is None else pieces_of
    longest = max(map(len, pieces_of))
    yields_V = reachable(new)
    asked = [b for b, yields in zip(new.token_bytes, yields_V, strict=True) if yields and b not in pieces_of]
    averaged = _old_encodings(old, asked, old_rows)
    sources: list[list[int]] = []
    kinds: list[str] = []
    for token_id, spelled in enumerate(new.token_bytes):
        if token_id in controls:
            source, kind = [controls[token_id]], "control"
        elif not spelled:
            source, kind = [], "control"
        elif not yields_V[token_id]:
            source, kind = [], "unreachable"
        elif spelled in pieces_of:
            source, kind = [pieces_of[spelled]], "copied"
        elif spelled in averaged:
            source, kind = averaged[spelled], "averaged"
        else:
            source, kind = longest_match(spelled, pieces_of, longest), "fallback"
        sources.append(source)
        kinds.append(kind)
    return sources, kinds


def spelling_tokens(old: TransferTokenizer, old_rows: int) -> dict[bytes, int]:
    """Return the old token of each byte string.

    It is the token that the tokenizer itself yields for the string, else the first that it yields anywhere. Tokens that
    it never yields have rows that no text has trained (`<0x61>` beside `a`); they are used only for single bytes that
    no other token spells.
    """
    yields_V = reachable(old)
    spelling = [(token, spelled) for token, spelled in enumerate(old.token_bytes[:old_rows]) if spelled]
    yielded = [(token, spelled) for token, spelled in spelling if yields_V[token]]
    encodings = old.encode_batch([spelled for _, spelled in yielded], [b""] * len(yielded))
    own = {spelled: token for (token, spelled), ids in zip(yielded, encodings, strict=True) if ids == [token]}
    single_bytes = {spelled: token for token, spelled in reversed(spelling) if len(spelled) == 1}
    return single_bytes | {spelled: token for token, spelled in reversed(yielded)} | own


def two_parts(spelling: Mapping[bytes, int]) -> dict[int, tuple[int, int]]:
    """Return the two tokens that spell each token of a vocabulary; tokens without such a pair are left out.

    Of all pairs it is the one whose rarer token is the least rare, by id: vocabularies are in the order in which they
    were learned. In byte-pair encoding that is, or is like, the last merge.
    """
    parts = {}
    for spelled, token in spelling.items():
        pairs = [
            (spelling[spelled[:cut]], spelling[spelled[cut:]])
            for cut in range(1, len(spelled))
            if spelled[:cut] in spelling and spelled[cut:] in spelling
        ]
        if pairs:
            parts[token] = min(pairs, key=lambda pair: (max(pair), min(pair)))
    return parts


def _old_encodings(old: TransferTokenizer, spellings: Sequence[bytes | None], old_rows: int) -> dict[bytes, list[int]]:
    """Encode each of these byte strings with the old tokenizer, as in the middle of a text.

    Strings that it cannot spell are left out.
    """
    texts = [spelled for spelled in spellings if spelled]
    encodings = zip(texts, old.encode_batch(texts, [b""] * len(texts)), strict=True)
    return {text: ids for text, ids in encodings if not isinstance(ids, ValueError) and ids and max(ids) < old_rows}


def longest_match(spelled: bytes, pieces_of: Mapping[bytes, int], longest: int) -> list[int]:
    """Return greedy longest pieces from the left; a byte that no old token spells is skipped."""
    ids, at = [], 0
    while at < len(spelled):
        for size in range(min(longest, len(spelled) - at), 0, -1):
            if spelled[at : at + size] in pieces_of:
                ids.append(pieces_of[spelled[at : at + size]])
                at += size
                break
        else:
            at += 1
    return ids
