"""The slow and obvious covering, in float64: every token path that spells a prefix of the document, one by one."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.covering.targets import Targets
from pipeline.covering.vocabulary import Vocabulary
from schemas import END, NUM_SYMBOLS

NextProbs = Callable[[tuple[int, ...]], np.ndarray]  # token path -> probabilities over all ids of the head


def canonical_targets(
    next_probs: NextProbs,
    token_bytes: Sequence[bytes | None],
    end_ids: set[int],
    tokens: Sequence[int],
    document: bytes,
) -> np.ndarray:
    """Return [bytes + 1, 256] from every (row, token) pair at every position, straight from the definition."""
    rows, offset = [], 0
    for length in range(len(tokens) + 1):
        path = tuple(tokens[:length])
        weight = np.prod([next_probs(path[:k])[path[k]] for k in range(length)]) if length else 1.0
        rows.append((offset, float(weight), next_probs(path)))
        if length < len(tokens):
            offset += len(token_bytes[tokens[length]] or b"")
    return _targets(rows, token_bytes, end_ids, document)


def all_targets(
    next_probs: NextProbs, token_bytes: Sequence[bytes | None], end_ids: set[int], document: bytes
) -> np.ndarray:
    """Compute the same over all tokenizations of all prefixes."""
    rows: list[tuple[int, float, np.ndarray]] = []

    def visit(path: tuple[int, ...], offset: int, weight: float) -> None:
        probs = next_probs(path)
        rows.append((offset, weight, probs))
        for token, spelled in enumerate(token_bytes):
            if spelled and token not in end_ids and END not in spelled and document.startswith(spelled, offset):
                visit((*path, token), offset + len(spelled), weight * float(probs[token]))

    visit((), 0, 1.0)
    return _targets(rows, token_bytes, end_ids, document)


def _targets(
    rows: list[tuple[int, float, np.ndarray]], token_bytes: Sequence[bytes | None], end_ids: set[int], document: bytes
) -> np.ndarray:
    numerators = np.zeros((len(document) + 1, NUM_SYMBOLS))
    for position in range(len(document) + 1):
        for offset, weight, probs in rows:
            if offset > position:
                continue
            known = document[offset:position]
            for token, spelled in enumerate(token_bytes):
                if token in end_ids:
                    numerators[position, END] += weight * probs[token] * (offset == position)
                elif spelled and END not in spelled and len(spelled) > len(known) and spelled.startswith(known):
                    numerators[position, spelled[len(known)]] += weight * probs[token]
    return numerators / numerators.sum(axis=1, keepdims=True)


def known_masses(found: Targets, document: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return for each byte of the document its known mass before it, and the known mass after it.

    The mass before it is the part that continues with this byte. Checks the targets' shares.
    """
    np.testing.assert_allclose(found.probs_PV.sum(axis=1), 1, atol=1e-12)
    for share in (found.dropped_P, found.token_end_P, found.doubt_P):
        assert (share >= 0).all() and (share <= 1).all()
    realised = found.probs_PV[np.arange(len(document)), np.frombuffer(document, np.uint8)]
    return np.exp(found.log_prefix_mass_P[:-1]) * realised, np.exp(found.log_prefix_mass_P[1:])


def prefix_columns(vocabulary: Vocabulary, prefix: bytes) -> range:
    """Find the columns of the tokens whose bytes start with `prefix`, by binary search."""
    low = bisect_left(vocabulary.sorted_bytes, prefix)
    # 0xFF sorts after every byte of a token that feeds symbols.
    return range(low, bisect_left(vocabulary.sorted_bytes, prefix + b"\xff"))
