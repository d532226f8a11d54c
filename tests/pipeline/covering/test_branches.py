"""Branch rows against brute force over all tokenizations, on random models, vocabularies and documents."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import CoveringConfig
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering, exp_logits
from pipeline.covering.vocabulary import Vocabulary
from tests.pipeline.covering.test_covering import RandomModel, case, covering_targets
from tests.support import brute_force, slow_weighing

ALL = CoveringConfig(beam_width=1_000_000, branch_threshold=0.0, rejoin_after_tokens=None)


def branched(
    model: RandomModel,
    vocabulary: Vocabulary,
    tokens: list[int],
    document: bytes,
    config: CoveringConfig,
    rounds: int = 1_000,
) -> Branching:
    """Return the covering after `rounds` of expansion, each row computed from its path."""
    covering = Covering(vocabulary, tokens, document)
    branching = Branching(covering, tokens, config)
    logits_RC = np.stack([model.logits(tuple(tokens[:r]))[vocabulary.order] for r in range(len(tokens) + 1)])
    branching.add_canonical(covering.reduce_rows(covering.offsets, exp_logits(logits_RC)))
    for _ in range(rounds):
        wanted = branching.branches_to_expand()
        if not wanted:
            break
        paths = [branching.path(branch) for branch in wanted]
        logits_RC = np.stack(
            [model.logits((*tokens[: path.num_canonical], *path.tokens))[vocabulary.order] for path in paths]
        )
        ends = [branch.end for branch in wanted]
        branching.add(wanted, covering.reduce_rows(ends, exp_logits(logits_RC)))
    return branching


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_all_rows_give_the_exact_distribution(seed: int, num_tokens: int) -> None:
    model, token_bytes, end, tokens, document, vocabulary = case(seed, num_tokens)
    found = branched(model, vocabulary, tokens, document, ALL).targets()
    expected = brute_force.all_targets(model.probs, token_bytes, {end}, document)
    np.testing.assert_allclose(found.probs_PV, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.dropped_P, 0, atol=1e-9)
    np.testing.assert_allclose(found.doubt_P, 0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0.001, 0.5))
def test_each_round_knows_more_and_never_more_than_is_true(seed: int, num_tokens: int, threshold: float) -> None:
    model, _, _, tokens, document, vocabulary = case(seed, num_tokens)
    config = CoveringConfig(beam_width=3, branch_threshold=threshold, rejoin_after_tokens=None)
    exact = branched(model, vocabulary, tokens, document, ALL).targets().log_prefix_mass_P
    before = covering_targets(model, vocabulary, tokens, document).log_prefix_mass_P
    for rounds in range(1, 5):
        found = branched(model, vocabulary, tokens, document, config, rounds).targets().log_prefix_mass_P
        assert (found >= before - 1e-9).all()
        assert (found <= exact + 1e-9).all()
        before = found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([None, 0, 1, 3]), st.floats(0, 0.5))
def test_mass_is_conserved_at_every_offset(
    seed: int, num_tokens: int, rejoin_after_tokens: int | None, threshold: float
) -> None:
    model, _, _, tokens, document, vocabulary = case(seed, num_tokens)
    config = CoveringConfig(beam_width=4, branch_threshold=threshold, rejoin_after_tokens=rejoin_after_tokens)
    found = branched(model, vocabulary, tokens, document, config, rounds=6).targets()
    before, after = brute_force.known_masses(found, document)
    # What is known before an offset is what goes on past it, plus what is dropped there, plus what feeds no symbol
    # there.
    assert (after <= before * (1 - found.dropped_P[1:]) * (1 + 1e-9)).all()
    assert (found.token_end_P[1:] >= 0).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 8),
    st.sampled_from([None, 0, 1, 3]),
    st.floats(0, 0.3),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_rows_weigh_what_arrives_at_them(
    seed: int, num_tokens: int, rejoin_after_tokens: int | None, threshold: float, width: int, rounds: int
) -> None:
    model, _, _, tokens, document, vocabulary = case(seed, num_tokens)
    config = CoveringConfig(beam_width=width, branch_threshold=threshold, rejoin_after_tokens=rejoin_after_tokens)
    branching = branched(model, vocabulary, tokens, document, config, rounds)
    rows = dict(zip(branching._paths, branching._reduced, strict=True))
    expected = slow_weighing.weigh(branching.covering, tokens, rows, config)
    found = branching._weigh()
    weights = [expected.weights[path] for path in branching._paths]
    np.testing.assert_allclose(found.log_weight_R, weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.log_known_P, expected.known, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.log_continued_P, expected.continued, rtol=0, atol=1e-12)
    assert {branching.path(branch) for branch in branching.branches_to_expand()} == set(expected.wanted)


def test_without_width_nothing_but_the_canonical_rows_is_wanted() -> None:
    model, _, _, tokens, document, vocabulary = case(5, 6)
    branching = branched(model, vocabulary, tokens, document, CoveringConfig(beam_width=0, branch_threshold=0.0))
    assert branching.num_branch_rows == 0
    expected = covering_targets(model, vocabulary, tokens, document)
    found = branching.targets()
    for field in ("probs_PV", "log_prefix_mass_P", "dropped_P", "token_end_P", "doubt_P"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), atol=1e-12)


def test_a_width_bounds_the_rows_of_an_offset_to_the_heaviest() -> None:
    model, _, _, tokens, document, vocabulary = case(11, 3)
    narrow = branched(model, vocabulary, tokens, document, ALL.model_copy(update={"beam_width": 1}))
    wide = branched(model, vocabulary, tokens, document, ALL)
    assert 0 < narrow.num_branch_rows < wide.num_branch_rows
    assert narrow.num_branch_rows <= 2 * len(document)  # a round may add a row, and the next a heavier one
    np.testing.assert_array_less(narrow.targets().log_prefix_mass_P - 1e-9, wide.targets().log_prefix_mass_P + 1e-12)
