"""Head rows that give a token the first piece's logit and the measured log-likelihood of its other pieces.

For the old model, `p(token) = p(first piece) * p(other pieces | first piece)`. The second factor depends little on what
comes before; it is measured at the beginning of a text.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width, B prefixes, L tokens.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.padding import padded_groups
from stage2_student.model.row_starts.base import IN_PIECES, Move, NewRows
from stage2_student.model.row_starts.pieces import mean_rows

_BATCH_TOKENS = 4096  # maximum in a forward pass
_MAX_LOGITS = 2**27  # maximum in a forward pass: half a GiB in float32
_MIN_LEFT = 0.05  # the smallest share that longer tokens leave a token: where they take all, the estimate is rough

Pieces = tuple[int, ...]


def first_likelihood(move: Move, weight_OD: Tensor) -> NewRows:
    """Make the first piece's row, and a bias: the log-likelihood of the token's other pieces and no longer token."""
    sources = [tuple(source) for source in move.sources]
    firsts = [source[:1] if kind in IN_PIECES else source for source, kind in zip(sources, move.kinds, strict=True)]
    spelled = [
        source if kind in ("copied", *IN_PIECES) else () for source, kind in zip(sources, move.kinds, strict=True)
    ]
    nats = later_pieces_nats(move.old_model.model, set(spelled) - {()}, move.old_model.start_id)
    bias_of = token_biases(nats)
    bias_V = torch.tensor([bias_of.get(pieces, 0.0) for pieces in spelled])
    return NewRows(mean_rows(weight_OD, firsts, torch.ones(len(firsts))), bias_V)


def token_biases(log_likelihoods: Mapping[Pieces, float]) -> dict[Pieces, float]:
    """Return for each token `ln p(its other pieces, and then no longer token | its first piece)`.

    Where a longer token begins with all pieces of this one, a text of these pieces is that longer token.

    Args:
        log_likelihoods: `ln p(other pieces | first piece)` of all tokens, by their pieces.
    """
    longer_mass: dict[Pieces, float] = defaultdict(float)
    for pieces, log_likelihood in log_likelihoods.items():
        shorter = (pieces[:size] for size in range(len(pieces) - 1, 0, -1))
        parent = next((prefix for prefix in shorter if prefix in log_likelihoods), None)
        if parent is not None:
            longer_mass[parent] += math.exp(log_likelihood - log_likelihoods[parent])
    return {
        pieces: log_likelihood + math.log(max(_MIN_LEFT, 1 - longer_mass[pieces]))
        for pieces, log_likelihood in log_likelihoods.items()
    }


@torch.no_grad()
def later_pieces_nats(model: Any, tokens: Collection[Pieces], start_id: int | None) -> dict[Pieces, float]:
    """Measure `ln p(other pieces | start, first piece)` of tokens, in float32; 0 for a token of one piece.

    Each prefix of pieces is read once, however many tokens share it.

    Args:
        model: a causal language model; its own logits are used.
        tokens: their pieces, at least one each.
        start_id: the token before the first piece; None for nothing.
    """
    asked: dict[Pieces, list[tuple[Pieces, int]]] = defaultdict(list)  # prefix -> tokens, and the piece that follows it
    for pieces in tokens:
        for size in range(1, len(pieces)):
            asked[pieces[:size]].append((pieces, pieces[size]))
    ordered = sorted(asked)
    # A prefix is read with the next one if that begins with it.
    read = [p for p, after in pairwise([*ordered, ()]) if after[: len(p)] != p]
    start = () if start_id is None else (start_id,)
    limit = min(_BATCH_TOKENS, max(1, _MAX_LOGITS // int(model.get_output_embeddings().weight.shape[0])))
    found = dict.fromkeys(tokens, 0.0)
    for group in padded_groups([len(start) + len(prefix) for prefix in read], limit):
        width = len(start) + len(read[group[0]])
        rows = [[*start, *read[index]] for index in group]
        tokens_BL = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
        for index, logits_LV in zip(group, logits_BLV, strict=True):
            for size in range(1, len(read[index]) + 1):
                if wanted := asked.pop(read[index][:size], None):
                    logprobs_V = logits_LV[len(start) + size - 1].float().log_softmax(-1)
                    next_ids = torch.tensor([piece for _, piece in wanted], device=model.device)
                    for (pieces, _), nats in zip(wanted, logprobs_V[next_ids].tolist(), strict=True):
                        found[pieces] += nats
    return found
