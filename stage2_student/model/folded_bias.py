"""A bias of the head's rows without a bias: most classes of models, and engines, have no place for one.

The last hidden states of a model share a direction: there is a vector `u` with `u . h` close to 1 for all of them.
Adding `bias * u` to a row then adds nearly the bias to its logits.

Shape legend: V tokens, N states, L tokens of a text, D hidden width.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stage2_student.model.row_starts import Move

_RIDGE = 1e-4  # of the mean square of a state's component


class Folding(NamedTuple):
    """Figures of a folded bias, on text that the old model has written and the direction was not fitted to.

    Attributes:
        mean, deviation: of the products of the direction and the old model's states; 1 and 0 are exact.
        bits_per_byte: what the moved model loses beside one with a true bias; NaN if nothing written was text.
    """

    mean: float
    deviation: float
    bits_per_byte: float


def constant_direction(states_ND: Tensor) -> Tensor:
    """Return the vector whose products with these states are nearest to 1, by least squares; (D,), float32."""
    states_ND = states_ND.double()
    moments_DD = states_ND.T @ states_ND / len(states_ND)
    ridge = _RIDGE * moments_DD.diagonal().mean() * torch.eye(len(moments_DD), dtype=torch.float64)
    return torch.linalg.solve(moments_DD + ridge, states_ND.mean(0)).float()


@torch.no_grad()
def fold(model: Any, rows_VD: Tensor, added_V: Tensor, move: Move) -> Folding:
    """Give a moved model the head `rows_VD`, with `added_V` added to its logits, in place.

    Args:
        rows_VD: float32.
        added_V: float32; added after the model's scaling of its logits, and before its cap.
    """
    fitted_BL, others_BL = move.old_model.own_texts.chunk(2)
    direction_D = constant_direction(move.old_model.states(fitted_BL))
    folded_VD = rows_VD + (added_V / move.old_model.student.logit_scale)[:, None] * direction_D
    head = model.get_output_embeddings()
    head.weight.copy_(folded_VD)
    products_N = move.old_model.states(others_BL) @ direction_D
    lost_nats, num_bytes = 0.0, 0
    for text in _texts(others_BL, move):
        [tokens] = move.new.encode_batch([text])
        if isinstance(tokens, ValueError):
            continue
        tokens_L = torch.tensor([move.start_id, *tokens])
        states_LD = model.base_model(input_ids=tokens_L[None], use_cache=False).last_hidden_state[0, :-1].float()
        scaled = move.old_model.student.scaled
        exact_LV, logits_LV = scaled(states_LD @ rows_VD.T) + added_V, scaled(states_LD @ folded_VD.T)
        lost_nats += float(_nats(logits_LV, tokens_L) - _nats(exact_LV, tokens_L))
        num_bytes += len(text)
    lost = lost_nats / num_bytes / math.log(2) if num_bytes else math.nan
    return Folding(float(products_N.mean()), float(products_N.std()), lost)


def _texts(tokens_BL: Tensor, move: Move) -> Iterator[bytes]:
    """Yield texts of old tokens, without their start token and half a character at an end."""
    for tokens in tokens_BL.tolist():
        written = b"".join(move.old.token_bytes[token] or b"" for token in tokens[1:])
        if text := written.decode("utf-8", errors="ignore").encode():
            yield text


def _nats(logits_LV: Tensor, tokens_L: Tensor) -> Tensor:
    return cross_entropy(logits_LV.double(), tokens_L[1:], reduction="sum")
