"""Fast Vocabulary Transfer: move a model to another tokenizer by rewriting its embedding and head rows.

Shape legend: V tokens of a vocabulary, D hidden width.
Source: Gee et al. 2022, EMNLP industry track, "Fast Vocabulary Transfer for Language Model Compression".
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.tokenization.yielded_tokens import Tokenizing, reachable

KINDS = ("copied", "averaged", "fallback", "control", "unreachable")


class TransferTokenizer(Tokenizing, Protocol):
    """The tokenizer that a transfer needs: bytes by id, and encodings.

    `pipeline.tokenization.byte_tokenizer.ByteTokenizer` is one.
    """


@dataclass(frozen=True)
class TransferCounts:
    """Numbers of rows of the new vocabulary, by their source."""

    copied: int  # the old tokenizer yields a token with the same bytes, or has one for this single byte
    averaged: int  # mean over the old tokenizer's encoding of the bytes
    # mean over the longest old tokens that spell the bytes: half a character, or bytes that the tokenizer drops
    fallback: int
    control: int  # spells nothing: a start or end row of the old model, or the mean of all rows
    # never yielded by the new tokenizer, like `<0x2E>` beside `.`: the mean of all rows, which is far from any text
    unreachable: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in asdict(self).items())


def transfer(
    model: Any,
    old: TransferTokenizer,
    new: TransferTokenizer,
    controls: dict[int, int],
    averaged_row_scale: float = 1.0,
) -> TransferCounts:
    """Move a causal language model to the vocabulary of `new`, in place: embedding, head and vocabulary size.

    Args:
        controls: new id -> old id of tokens with a role (start, end), whatever their spelling.
        averaged_row_scale: factor for rows that are means of old ones. The mean of a word's pieces says how likely its
            pieces are, not how likely they are in sequence: unscaled, such tokens get several times the mass they
            should.
    Raises:
        ValueError: an old id in `controls` has no embedding row.
    """
    width = model.get_input_embeddings().weight.shape[0]
    lacking = {n: o for n, o in controls.items() if o >= width}
    if lacking:
        raise ValueError(f"old control tokens {lacking} (new id: old id) have no row in an embedding of {width} rows")
    sources, kinds = row_sources(old, new, controls, width)
    tied = (
        model.get_output_embeddings() is None
        or model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    scales = torch.tensor([averaged_row_scale if kind in ("averaged", "fallback") else 1.0 for kind in kinds])
    embedding_VD = mean_rows(model.get_input_embeddings().weight.detach(), sources, scales)
    head_VD = None if tied else mean_rows(model.get_output_embeddings().weight.detach(), sources, scales)
    bias_V = getattr(model.get_output_embeddings(), "bias", None)  # separate even if the weight is tied
    bias_V1 = None if bias_V is None else mean_rows(bias_V.detach()[:, None], sources, torch.ones(len(sources)))
    model.resize_token_embeddings(len(sources), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding_VD)
        if head_VD is not None:
            model.get_output_embeddings().weight.copy_(head_VD)
        if bias_V1 is not None:
            model.get_output_embeddings().bias.copy_(bias_V1[:, 0])
    return TransferCounts(**{kind: kinds.count(kind) for kind in KINDS})


def row_sources(
    old: TransferTokenizer, new: TransferTokenizer, controls: dict[int, int], old_rows: int
) -> tuple[list[list[int]], list[str]]:
    """Return for each new token the old rows whose mean it gets (empty: the mean of all), and its kind.

    A token that the new tokenizer never yields must not share the mass of one that it does: two rows of the same bytes
    get the same logit, and a sum over bytes cannot tell them apart.
    """
    pieces_of = spelling_tokens(old, old_rows)
    longest = max(map(len, pieces_of))
    yields_V = reachable(new)
    averaged = _old_encodings(
        old, [b for b, yields in zip(new.token_bytes, yields_V, strict=True) if yields and b not in pieces_of], old_rows
    )
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


def mean_rows(weight_VD: Tensor, sources: Sequence[Sequence[int]], scales: Tensor) -> Tensor:
    """Return rows in the weight's dtype: row `i` is `scales[i]` times the float32 mean of the rows `sources[i]`.

    An empty source means all rows.
    """
    flat = torch.tensor([i for source in sources for i in source], dtype=torch.long)
    counts = torch.tensor([len(source) for source in sources])
    into = torch.repeat_interleave(torch.arange(len(sources)), counts)
    sums_VD = torch.zeros(len(sources), weight_VD.shape[1])
    sums_VD.index_add_(0, into, weight_VD.float()[flat])
    means_VD = sums_VD / counts.clamp(min=1)[:, None]
    means_VD[counts == 0] = weight_VD.float().mean(0)
    return (scales[:, None] * means_VD).to(weight_VD.dtype)
