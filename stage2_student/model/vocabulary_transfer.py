"""Fast Vocabulary Transfer: move a model to another tokenizer by rewriting its embedding and head rows.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width.
Source: Gee et al. 2022, EMNLP industry track, "Fast Vocabulary Transfer for Language Model Compression".
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.config import Recipe, TransferConfig, student_config
from pipeline.tokenization.yielded_tokens import Tokenizing, reachable
from stage2_student.model.folded_bias import Folding, fold
from stage2_student.model.old_model import OldModel
from stage2_student.model.row_starts import INPUT_ROWS, OUTPUT_ROWS, Move, NewRows
from stage2_student.model.row_starts.pieces import mean_rows
from stage2_student.model.untie import is_tied, untie

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


class Transferred(NamedTuple):
    """What a transfer did.

    Attributes:
        counts: rows by kind.
        tied: the head is the embedding.
        folding: of a bias into the head's rows; None if there was none.
    """

    counts: TransferCounts
    tied: bool
    folding: Folding | None


def plan_move(
    recipe: Recipe,
    tokenizers: tuple[TransferTokenizer, TransferTokenizer],
    controls: dict[int, int],
    start_id: int,
    old_model: OldModel,
) -> Move:
    """Find what the rows of the new vocabulary are made from.

    Args:
        tokenizers: the old one and the new one.
        controls: new id -> old id of tokens with a role (start, end), whatever their spelling.
        start_id: the new token that begins a text.
    Raises:
        ValueError: an old id in `controls` has no embedding row.
    """
    lacking = {n: o for n, o in controls.items() if o >= old_model.num_rows}
    if lacking:
        raise ValueError(
            f"old control tokens {lacking} (new id: old id) have no row in an embedding of {old_model.num_rows} rows"
        )
    sources, kinds = row_sources(*tokenizers, controls, old_model.num_rows)
    return Move(recipe, *tokenizers, sources, kinds, start_id, old_model)


def transfer(model: Any, move: Move) -> Transferred:
    """Move a causal language model to a new vocabulary, in place: embedding, head and vocabulary size.

    `student.transfer` says how rows are made, and whether a head that is the embedding stays it.

    Raises:
        ValueError: embedding and head are one and would need different rows.
    """
    config = student_config(move.recipe).transfer
    if config.tie == "untie":
        untie(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied := is_tied(model):
        _check_one_kind(model, config)
    embedding_VD = INPUT_ROWS[config.input](move, embedding.weight.detach()).rows_VD
    head_VD, added_V = NewRows(embedding_VD) if tied else OUTPUT_ROWS[config.output](move, head.weight.detach())
    bias_V = _moved_bias(head, move)
    if added_V is not None and bias_V is not None:
        bias_V, added_V = bias_V + added_V / move.old_model.student.logit_scale, None
    model.resize_token_embeddings(len(move.sources), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding_VD)
        if not tied:
            model.get_output_embeddings().weight.copy_(head_VD)
        if bias_V is not None:
            model.get_output_embeddings().bias.copy_(bias_V)
    folding = None if added_V is None else fold(model, head_VD, added_V, move)
    return Transferred(TransferCounts(**{kind: move.kinds.count(kind) for kind in KINDS}), tied, folding)


# The pieces whose mean a head's own bias gets, by kind of head rows; else all.
_BIAS_PIECES = {"first": slice(0, 1), "first_likelihood": slice(0, 1), "last": slice(-1, None)}


def _moved_bias(head: Any, move: Move) -> Tensor | None:
    """Return the head's own bias for the new vocabulary; None if it has none. It is separate even if tied."""
    bias_O = getattr(head, "bias", None)
    if bias_O is None:
        return None
    chosen = _BIAS_PIECES.get(student_config(move.recipe).transfer.output, slice(None))
    sources = [source[chosen] for source in move.sources]
    return mean_rows(bias_O.detach()[:, None], sources, torch.ones(len(sources)))[:, 0]


def _check_one_kind(model: Any, config: TransferConfig) -> None:
    if config.input != config.output:
        remedy = (
            "set one kind for both"
            if config.output in INPUT_ROWS
            else f"set another student.transfer.output ({', '.join(INPUT_ROWS)}), the same as the input"
        )
        raise ValueError(
            f"student.transfer makes {config.input} rows for the input and {config.output} rows for the output, but "
            f"the head of this model ({model.config.model_type}) is its embedding; set student.transfer.tie=untie, or "
            f"{remedy}"
        )


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
