"""The covering of `pipeline.covering.covering`, differentiable: cells of canonical rows, summed to symbols.

The weight of a row is the product of the student's probabilities of the tokens before it. Only ratios between rows that
reach one position matter, so each position has its own scale, and masses down to 1e-300 of the largest there keep their
digits; all of it is float64.

Shape legend: R rows, D nodes of a row by depth, I cells, Q positions, U requested positions, P supervised byte
positions, V symbols (256).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from schemas import END, NUM_SYMBOLS
from stage2_student.interfaces.token_marginal.plan import NO_TOKEN, Plan
from stage2_student.interfaces.token_marginal.types import Sums

NEVER = math.log(1e-10)  # log-probability of a symbol that no token continues with: a constant, without gradient


class Distributions(NamedTuple):
    """The canonical covering's distributions at the supervised positions."""

    logprobs_PV: Tensor  # float64, natural logs; NEVER where no token of a canonical row continues so
    token_end_P: Tensor  # float64, without gradient; as in `pipeline.covering.covering.Targets`
    dropped_P: Tensor  # likewise


class _Nodes(NamedTuple):
    """Masses of the rows' nodes, relative to their row."""

    position_RD: Tensor  # clamped where there is no node
    complete_RD: Tensor  # on tokens that end at the node's position
    deeper_RD: Tensor  # on tokens that continue with the document's symbol
    reach_RD: Tensor  # on all tokens that continue


def distributions(sums: Sums, plan: Plan) -> Distributions:
    """Compute normalised next-symbol distributions of all requested positions.

    Differentiable in `mass_I`, `end_R` and the next tokens.

    Args:
        sums: of all rows of the plan; `logprob_R2[:, 0]` is that of the canonical token that follows.
    """
    nodes = _nodes(sums.mass_I, plan)
    next_R = torch.where(plan.next_R == NO_TOKEN, 0.0, sums.logprob_R2[:, 0])
    # Through all spans: everything before a span scales all of its rows alike.
    log_weight_R = next_R.cumsum(0) - next_R
    scale_Q = _log_scale(log_weight_R.detach(), nodes, len(plan.realised_Q))
    weight_RD = _exp_where(nodes.reach_RD > 0, log_weight_R[:, None] - scale_Q[nodes.position_RD])
    mass_UV = _masses(sums, plan, nodes, weight_RD)
    with torch.no_grad():
        token_end_Q, dropped_Q = _shares(plan, nodes, log_weight_R, scale_Q, weight_RD)
    logprobs_UV = _normalised(mass_UV)
    supervised = plan.asked_U[plan.unique_P]
    return Distributions(logprobs_UV[plan.unique_P], token_end_Q[supervised], dropped_Q[supervised])


def _exp_where(condition: Tensor, exponents: Tensor) -> Tensor:
    """Compute exp where the condition holds, else 0.

    No infinity occurs on the way; its gradient would be NaN.
    """
    return torch.where(condition, exponents.where(condition, 0.0).exp(), 0.0)


def _nodes(mass_I: Tensor, plan: Plan) -> _Nodes:
    num_rows, max_depth = len(plan.num_nodes_R), len(plan.depth_D)
    zero = mass_I.new_zeros(num_rows * max_depth)
    going_on_RD = zero.index_add(0, plan.node_I, mass_I.where(~plan.is_complete_I, 0.0)).view(num_rows, max_depth)
    complete_RD = zero.index_add(0, plan.node_I, mass_I.where(plan.is_complete_I, 0.0)).view(num_rows, max_depth)
    # Sums from the deepest node up: differences would lose values that are small beside the root.
    total_RD = (going_on_RD + complete_RD).flip(-1).cumsum(-1).flip(-1)
    deeper_RD = torch.cat([total_RD[:, 1:], total_RD.new_zeros(num_rows, 1)], dim=-1)
    position_RD = plan.offset_R[:, None] + torch.minimum(plan.depth_D, plan.num_nodes_R[:, None] - 1)
    return _Nodes(position_RD, complete_RD, deeper_RD, going_on_RD + deeper_RD)


def _log_scale(log_weight_R: Tensor, nodes: _Nodes, num_positions: int) -> Tensor:
    """Return Q: the log of the largest mass that one row has on tokens that reach past a position; 0 if none does."""
    log_mass_RD = log_weight_R[:, None] + nodes.reach_RD.detach().log()
    scale_Q = log_weight_R.new_full((num_positions,), -torch.inf)
    scale_Q.scatter_reduce_(0, nodes.position_RD.flatten(), log_mass_RD.flatten(), "amax")
    return scale_Q.where(scale_Q > -torch.inf, 0.0)


def _masses(sums: Sums, plan: Plan, nodes: _Nodes, weight_RD: Tensor) -> Tensor:
    """Return U x V, each position at its own scale.

    Symbols of positions that are not requested go into one more position, which is cut off.
    """
    num_asked = len(plan.asked_U)
    mass = sums.mass_I.new_zeros((num_asked + 1) * NUM_SYMBOLS)
    mass = mass.index_add(0, plan.fed_I, sums.mass_I * weight_RD.flatten()[plan.node_I])
    unique_RD, realised_RD = plan.unique_Q[nodes.position_RD], plan.realised_Q[nodes.position_RD]
    mass = mass.index_add(0, (unique_RD * NUM_SYMBOLS + realised_RD).flatten(), (weight_RD * nodes.deeper_RD).flatten())
    mass = mass.index_add(0, unique_RD[:, 0] * NUM_SYMBOLS + END, weight_RD[:, 0] * sums.end_R)
    return mass.view(-1, NUM_SYMBOLS)[:num_asked]


def _normalised(mass_UV: Tensor) -> Tensor:
    is_possible_UV = mass_UV > 0
    logprobs_UV = mass_UV.where(is_possible_UV, 1.0).log() - mass_UV.sum(-1, keepdim=True).log()
    return logprobs_UV.where(is_possible_UV, NEVER)


def _shares(
    plan: Plan, nodes: _Nodes, log_weight_R: Tensor, scale_Q: Tensor, weight_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (token_end, dropped): shares of the mass known just before each position, 0 at a span's first."""
    zero_Q = torch.zeros_like(scale_Q)
    known_Q = zero_Q.index_add(0, nodes.position_RD.flatten(), (weight_RD * nodes.deeper_RD).flatten())
    # A token that ends at a position belongs to the mass known just before it.
    before_RD = (nodes.position_RD - 1).clamp(min=0)
    ends_RD = nodes.complete_RD * _exp_where(nodes.complete_RD > 0, log_weight_R[:, None] - scale_Q[before_RD])
    ended_Q = zero_Q.index_add(0, nodes.position_RD.flatten(), ends_RD.flatten())
    follows_R = (plan.next_R != NO_TOKEN).roll(1)  # the very last row has no successor
    continued_R = _exp_where(follows_R, log_weight_R - scale_Q[(plan.offset_R - 1).clamp(min=0)])
    continued_Q = zero_Q.index_copy(0, plan.offset_R, continued_R)
    before_Q = known_Q.roll(1)
    before_Q = before_Q.where(before_Q > 0, 1.0)  # where nothing is known, nothing ended
    dropped_Q = ((ended_Q - continued_Q) / before_Q).clamp(0.0, 1.0)
    is_start_Q = torch.zeros_like(zero_Q, dtype=torch.bool).index_fill(0, plan.offset_R, True)
    inside_Q = (ended_Q / before_Q).clamp(0.0, 1.0).where(~is_start_Q, 0.0)
    # A running maximum that restarts with each token: shares are at most 1, and each token adds 2 more to its own.
    level_Q = 2.0 * is_start_Q.cumsum(0)
    return (inside_Q + level_Q).cummax(0).values - level_Q, dropped_Q
