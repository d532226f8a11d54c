"""Redistribution of dropped mass by a guess of how it continues, instead of in proportion to the known rows.

A covering normalises over what it knows: if a branch with a tenth of the mass is dropped, the target says that the
other tokens' continuations are everything, and is confidently wrong. Most often a dropped token ends a word inside a
longer canonical token, and what follows the end of a word can be estimated: from the document's own targets at the
canonical boundaries, by the kind of byte before them, and better from the branch rows that were expanded.

Dropped mass does not vanish at the next byte either: if the document continues with a byte that the guess finds likely
and the known rows do not, the dropped branch was probably the right one. Lost mass is therefore tracked by Bayes' rule
from byte to byte, up to the next canonical boundary, where most branches have met the canonical row again.

Shape legend: P positions, V symbols (256), C classes of positions, B branch rows, N positions learned from.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.targets import Targets
from schemas import END, NUM_SYMBOLS

# Kind of each byte: a letter, a digit, white space, other ASCII, part of a longer character.
KINDS = np.array(
    [
        0 if bytes([b]).isalpha() else 1 if bytes([b]).isdigit() else 2 if bytes([b]).isspace() else 3 if b < 128 else 4
        for b in range(256)
    ]
)
PRIOR_POSITIONS = 2.0  # weight of the coarser guess, in positions per class
# Share of the mass lost at earlier positions that is used. Over 30 encyclopaedic documents, branches above 0.05: KL
# 0.0074, 0.0052, 0.0050 and 0.0049 at 0, 0.1, 0.3 and 1; Jensen-Shannon divergence 0.00074, 0.00074, 0.00074 and
# 0.00078.
CARRIED_SHARE = 0.3

MAX_ODDS = 1e9  # of lost mass against known mass


class Guesses(NamedTuple):
    """Guesses of the symbol that follows unknown mass, at each position."""

    ended_PV: np.ndarray  # after a token that ends there
    inside_PV: np.ndarray  # inside a token that ended off the canonical path earlier


def redistribute(targets: Targets, covering: Covering, branch_rows: Sequence[ReducedRow] = ()) -> Targets:
    """Redistribute the dropped mass of targets by a guess.

    Args:
        covering: the document's covering; the guess learns from its canonical boundaries.
        branch_rows: rows that start off the boundaries; the guess learns from them too.
    Returns:
        new targets; `dropped`, `token_end`, `doubt` and the prefix mass still describe the covering alone. The targets
        are unchanged if the document has no boundary to learn from.
    """
    document = np.frombuffer(covering.document, dtype=np.uint8)
    if not len(document):
        return targets
    guesses = _guess(targets.probs_PV, document, covering, branch_rows)
    at = np.arange(len(document))
    realised = [probs_PV[at, document] for probs_PV in (targets.probs_PV, *guesses)]
    ended_P, carried_P = _lost_odds(targets.dropped_P, covering.offsets, *realised)
    probs_PV = targets.probs_PV + ended_P[:, None] * guesses.ended_PV
    probs_PV += CARRIED_SHARE * carried_P[:, None] * guesses.inside_PV
    return replace(targets, probs_PV=probs_PV / probs_PV.sum(axis=1, keepdims=True))


def _guess(
    probs_PV: np.ndarray, document: np.ndarray, covering: Covering, branch_rows: Sequence[ReducedRow]
) -> Guesses:
    kind_P = np.concatenate([[0], KINDS[document]])
    boundaries = covering.offsets[covering.offsets > 0]
    ended_CV = _learned(kind_P[boundaries], probs_PV[boundaries], probs_PV[boundaries].mean(axis=0), KINDS.max() + 1)
    if branch_rows:
        offsets = [row.offset for row in branch_rows]
        rows_BV = np.stack([_symbols(covering, row) for row in branch_rows])
        ended_CV = _learned(kind_P[offsets], rows_BV, ended_CV, len(ended_CV))
    by_kind_CV = _learned(kind_P[1:], probs_PV[1:], probs_PV.mean(axis=0), KINDS.max() + 1)
    by_byte_CV = _learned(document, probs_PV[1:], by_kind_CV[KINDS], NUM_SYMBOLS)
    return Guesses(ended_CV[kind_P], by_byte_CV[np.concatenate([[0], document])])


def _learned(class_N: np.ndarray, probs_NV: np.ndarray, prior_CV: np.ndarray, num_classes: int) -> np.ndarray:
    """Average each class (C x V), shrunk towards its coarser guess if it has few positions."""
    sums_CV = np.zeros((num_classes, NUM_SYMBOLS))
    np.add.at(sums_CV, class_N, probs_NV)
    num_C1 = np.bincount(class_N, minlength=num_classes)[:, None]
    mean_CV: np.ndarray = (sums_CV + PRIOR_POSITIONS * prior_CV) / (num_C1 + PRIOR_POSITIONS)
    return mean_CV


def _symbols(covering: Covering, row: ReducedRow) -> np.ndarray:
    """Return the row's own distribution (V) of the symbol after its path."""
    labels = covering.vocabulary.trie.labels(np.zeros(1, dtype=np.int64))  # of the root, a row's last node
    probs_V = np.zeros(NUM_SYMBOLS)
    probs_V[labels] = row.masses_I[-len(labels) :]
    probs_V[END] += row.end
    return probs_V / probs_V.sum()


def _lost_odds(
    dropped_P: np.ndarray, boundaries: np.ndarray, known: np.ndarray, ended: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, per position, the mass lost there and the mass lost earlier that continues, as odds to the known mass.

    Args:
        known, ended, inside: P - 1 each, the probability of the document's symbol by the known rows and by the guesses.
    """
    is_boundary_P = np.zeros(len(dropped_P), dtype=bool)
    is_boundary_P[boundaries] = True
    new_odds = np.minimum(dropped_P / np.maximum(1.0 - dropped_P, 1.0 / MAX_ODDS), MAX_ODDS).tolist()
    ended_ratios, inside_ratios = ((guess / np.maximum(known, 1.0 / MAX_ODDS)).tolist() for guess in (ended, inside))
    arrived, carried_odds = 0.0, []
    for position, (is_boundary, new) in enumerate(zip(is_boundary_P.tolist(), new_odds, strict=True)):
        # The known mass shrinks by what is dropped here.
        carried = 0.0 if is_boundary else min(arrived * (1.0 + new), MAX_ODDS)
        carried_odds.append(carried)
        if position < len(known):
            arrived = new * ended_ratios[position] + carried * inside_ratios[position]
    return np.array(new_odds), np.array(carried_odds)
