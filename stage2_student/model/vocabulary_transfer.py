"""Fast Vocabulary Transfer: move a model to another tokenizer by rewriting its embedding and head rows.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width.
Source: Gee et al. 2022, EMNLP industry track, "Fast Vocabulary Transfer for Language Model Compression".
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config import Recipe, student_config
from stage2_student.model.folded_bias import Folding, fold
from stage2_student.model.old_model import OldModel
from stage2_student.model.row_sources import KINDS, TransferTokenizer, row_sources, spelling_tokens, two_parts
from stage2_student.model.row_starts import INPUT_ROWS, Move, chosen_kinds, make_rows
from stage2_student.model.row_starts.pieces import mean_rows
from stage2_student.model.untie import is_tied, untie


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
    """Account of a transfer.

    Attributes:
        counts: rows by kind.
        row_kinds: of embedding and head.
        tied: the head is the embedding.
        folding: of a bias into the head's rows; None if there was none.
        facts: what the ways of making rows have to say of them.
    """

    counts: TransferCounts
    row_kinds: tuple[str, str]
    tied: bool
    folding: Folding | None
    facts: dict[str, float]


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
    spelling = spelling_tokens(tokenizers[0], old_model.num_rows)
    sources, kinds = row_sources(*tokenizers, controls, old_model.num_rows, spelling)
    return Move(recipe, *tokenizers, sources, two_parts(spelling), kinds, start_id, old_model)


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
    tied = is_tied(model)
    input_kind, output_kind = chosen_kinds(move, tied)
    if tied:
        _check_one_kind(model, input_kind, output_kind)
    inputs = make_rows(input_kind, move, embedding.weight.detach())
    outputs = inputs if tied else make_rows(output_kind, move, head.weight.detach())
    head_VD, added_V = outputs.rows_VD, outputs.bias_V
    bias_V = _moved_bias(head, move, output_kind)
    if added_V is not None and bias_V is not None:
        bias_V, added_V = bias_V + added_V / move.old_model.student.logit_scale, None
    model.resize_token_embeddings(len(move.sources), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(inputs.rows_VD)
        if not tied:
            model.get_output_embeddings().weight.copy_(head_VD)
        if bias_V is not None:
            model.get_output_embeddings().bias.copy_(bias_V)
    folding = None if added_V is None else fold(model, head_VD, added_V, move)
    facts = {**inputs.facts, **outputs.facts}
    return Transferred(
        TransferCounts(**{kind: move.kinds.count(kind) for kind in KINDS}),
        (input_kind, output_kind),
        tied,
        folding,
        facts,
    )


# The pieces whose mean a head's own bias gets, by kind of head rows; else all.
_BIAS_PIECES = {"first": slice(0, 1), "first_likelihood": slice(0, 1), "last": slice(-1, None)}


def _moved_bias(head: Any, move: Move, output_kind: str) -> Tensor | None:
    """Return the head's own bias for the new vocabulary; None if it has none. It is separate even if tied."""
    bias_O = getattr(head, "bias", None)
    if bias_O is None:
        return None
    chosen = _BIAS_PIECES.get(output_kind, slice(None))
    sources = [source[chosen] for source in move.sources]
    return mean_rows(bias_O.detach()[:, None], sources, torch.ones(len(sources)))[:, 0]


def _check_one_kind(model: Any, input_kind: str, output_kind: str) -> None:
    if input_kind != output_kind:
        remedy = (
            "set one kind for both"
            if output_kind in INPUT_ROWS
            else f"set another student.transfer.output ({', '.join(INPUT_ROWS)}), the same as the input"
        )
        raise ValueError(
            f"student.transfer makes {input_kind} rows for the input and {output_kind} rows for the output, but "
            f"the head of this model ({model.config.model_type}) is its embedding; set student.transfer.tie=untie, or "
            f"{remedy}"
        )
