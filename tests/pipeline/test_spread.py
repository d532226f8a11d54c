"""Dropped mass that is shared out, against the definition written out position by position."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.covering import Covering
from pipeline.spread import KINDS, spread
from tests.pipeline.test_covering import case, covering_targets


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_each_dropped_share_follows_the_mean_behind_bytes_of_its_kind(seed: int, num_tokens: int) -> None:
    model, _, _, tokens, document, vocabulary = case(seed, num_tokens)
    targets = covering_targets(model, vocabulary, tokens, document)
    boundaries = Covering(vocabulary, tokens, document).offsets
    found = spread(targets, document, boundaries)
    behind = {int(offset): targets.probs_PV[offset] for offset in boundaries if offset}
    everywhere = sum(behind.values()) / len(behind)
    for position, probs_V in enumerate(found.probs_PV):
        kind = KINDS[document[position - 1]] if position else None
        alike = [probs for offset, probs in behind.items() if KINDS[document[offset - 1]] == kind]
        guess = (sum(alike) + 2 * everywhere) / (len(alike) + 2)
        share = targets.dropped_P[position]
        np.testing.assert_allclose(probs_V, (1 - share) * targets.probs_PV[position] + share * guess, atol=1e-12)
    np.testing.assert_allclose(found.probs_PV.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(found.dropped_P, targets.dropped_P)


def test_nothing_changes_where_there_is_nothing_to_learn_from() -> None:
    model, _, _, _, _, vocabulary = case(0, 0)
    targets = covering_targets(model, vocabulary, [], b"")
    assert spread(targets, b"", np.array([0])) is targets
