"""Redistributed dropped mass, against the definition written out position by position."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import CoveringConfig
from pipeline.covering.covering import Covering
from pipeline.covering.dropped_mass import CARRIED_SHARE, KINDS, MAX_ODDS, redistribute
from pipeline.covering.targets import Targets
from schemas import END
from tests.pipeline.covering.test_branches import branched
from tests.pipeline.covering.test_covering import case, covering_targets


def slow_redistribution(targets: Targets, covering: Covering, branches: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Return P x V as shares of all mass, known and lost.

    `branches`: offset and distribution of each row off the boundaries.
    """
    document, probs_PV = covering.document, targets.probs_PV
    boundaries = [int(offset) for offset in covering.offsets if offset]

    def kind(position: int) -> int:
        return int(KINDS[document[position - 1]]) if position else 0

    def ended(position: int) -> np.ndarray:
        alike = [probs_PV[at] for at in boundaries if kind(at) == kind(position)]
        everywhere = probs_PV[boundaries].mean(axis=0)
        coarse = (sum(alike) + 2 * everywhere) / (len(alike) + 2)
        rows = [probs_V for at, probs_V in branches if kind(at) == kind(position)]
        guess: np.ndarray = (sum(rows) + 2 * coarse) / (len(rows) + 2)
        return guess

    def inside(position: int) -> np.ndarray:
        places = range(1, len(probs_PV))
        byte = document[position - 1] if position else 0
        of_kind = [probs_PV[at] for at in places if kind(at) == KINDS[byte]]
        coarse = (sum(of_kind) + 2 * probs_PV.mean(axis=0)) / (len(of_kind) + 2)
        alike = [probs_PV[at] for at in places if document[at - 1] == byte]
        guess: np.ndarray = (sum(alike) + 2 * coarse) / (len(alike) + 2)
        return guess

    found = np.empty_like(probs_PV)
    before = 0.0  # the share of all mass that was lost before
    for position, probs_V in enumerate(probs_PV):
        if position in covering.offsets:
            before = 0.0
        known = 1.0 - before
        lost_here, known = known * targets.dropped_P[position], known * (1.0 - targets.dropped_P[position])
        parts = (known * probs_V, lost_here * ended(position), CARRIED_SHARE * before * inside(position))
        found[position] = sum(parts) / sum(part.sum() for part in parts)
        if position < len(document):
            c = document[position]
            lost = lost_here * ended(position)[c] + before * inside(position)[c]
            before = lost / (lost + known * max(probs_V[c], 1 / MAX_ODDS))  # odds are bounded
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_what_is_dropped_follows_what_is_known_of_ends_of_tokens_and_then_bayes_rule(
    seed: int, num_tokens: int
) -> None:
    model, _, _, tokens, document, vocabulary = case(seed, num_tokens)
    covering = Covering(vocabulary, tokens, document)
    targets = covering_targets(model, vocabulary, tokens, document)
    found = redistribute(targets, covering)
    np.testing.assert_allclose(found.probs_PV, slow_redistribution(targets, covering, []), atol=1e-9)
    np.testing.assert_allclose(found.probs_PV.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(found.dropped_P, targets.dropped_P)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_rows_of_branches_that_were_expanded_teach_what_the_dropped_ones_do(seed: int, num_tokens: int) -> None:
    model, token_bytes, end, tokens, document, vocabulary = case(seed, num_tokens)
    config = CoveringConfig(beam_width=4, branch_threshold=0.1)
    branching = branched(model, vocabulary, tokens, document, config)
    targets = branching.targets()
    branches = []
    for number in range(len(tokens) + 1, len(tokens) + 1 + branching.num_branch_rows):
        path, row = branching._paths[number], branching._reduced[number]
        if row.offset not in branching.covering.offsets:
            probs_V = np.zeros(256)
            for token, prob in enumerate(model.probs((*tokens[: path.num_canonical], *path.tokens))):
                spelled = token_bytes[token] if token < len(token_bytes) else None
                if token == end:
                    probs_V[END] += prob
                elif spelled and END not in spelled:
                    probs_V[spelled[0]] += prob
            branches.append((row.offset, probs_V / probs_V.sum()))
    found = redistribute(targets, branching.covering, branching.off_boundaries())
    np.testing.assert_allclose(found.probs_PV, slow_redistribution(targets, branching.covering, branches), atol=1e-9)


def test_nothing_changes_where_there_is_nothing_to_learn_from() -> None:
    model, _, _, _, _, vocabulary = case(0, 0)
    targets = covering_targets(model, vocabulary, [], b"")
    assert redistribute(targets, Covering(vocabulary, [], b"")) is targets


def test_bytes_are_of_five_kinds() -> None:
    assert KINDS[list(b"aZ07 \n._\x00\x7f\x80\xc3\xff")].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4]
