"""Dropped mass shared out by a guess of how it goes on, instead of as the rows that are known do.

A covering normalises over what it knows: where a branch that held a tenth of the mass is dropped, the target says that the other
tokens' continuations are all there is, and is confidently wrong. Most often a dropped token ends a word inside of a longer
canonical one, and what follows the end of a word is no secret: the document's own targets at the canonical boundaries show it,
by the kind of byte before them.

Shape legend: P positions, V symbols (256), C kinds of bytes.
"""

from dataclasses import replace

import numpy as np

from pipeline.covering import Targets
from schemas import NUM_SYMBOLS

# Kind of each byte: a letter, a digit, white space, other ASCII, part of a longer character.
KINDS = np.array(
    [
        0 if bytes([b]).isalpha() else 1 if bytes([b]).isdigit() else 2 if bytes([b]).isspace() else 3 if b < 128 else 4
        for b in range(256)
    ]
)
PRIOR_POSITIONS = 2.0  # the mean over all kinds counts as so many positions of each


def spread(targets: Targets, document: bytes, boundaries: np.ndarray) -> Targets:
    """Targets in which the share `dropped` of each position follows the document's mean target behind bytes of the same kind.

    Args:
        boundaries: ascending offsets of the canonical rows, the first of them 0.
    Returns:
        new targets; `dropped`, `token_end`, `doubt` and the prefix mass still tell of the covering alone. Unchanged where the
        document has no boundary to learn from.
    """
    known = boundaries[boundaries > 0]
    if not len(known):
        return targets
    kind_P = np.concatenate([[0], KINDS[np.frombuffer(document, dtype=np.uint8)]])
    sums_CV = np.zeros((KINDS.max() + 1, NUM_SYMBOLS))
    np.add.at(sums_CV, kind_P[known], targets.probs_PV[known])
    guess_CV = sums_CV + PRIOR_POSITIONS * sums_CV.sum(axis=0) / len(known)
    guess_CV /= guess_CV.sum(axis=1, keepdims=True)
    dropped_P1 = targets.dropped_P[:, None]
    return replace(targets, probs_PV=(1.0 - dropped_P1) * targets.probs_PV + dropped_P1 * guess_CV[kind_P])
