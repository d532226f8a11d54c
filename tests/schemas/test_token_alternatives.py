"""Alternatives of a record's tokens, against loops over them."""

import numpy as np
import pytest

from schemas.token_alternatives import TokenAlternatives


def alternatives(seed: int, num_tokens: int) -> TokenAlternatives:
    """Make alternatives of some tokens, every fifth of which has none."""
    rng = np.random.default_rng(seed)
    rows, token_ids = [], []
    for token in range(num_tokens):
        count = 0 if token % 5 == 4 else int(rng.integers(1, 7))
        probs = np.sort(rng.dirichlet(np.ones(count + 1))[:count])[::-1] if count else np.empty(0)
        ids = rng.permutation(40)[:count]
        rows.append((ids, np.log(probs)))
        token_ids.append(int(rng.choice(ids)) if count else -1)
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    ids, log_probs = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    own = [dict(zip(of, logs, strict=True)).get(t, 0.0) for (of, logs), t in zip(rows, token_ids, strict=True)]
    return TokenAlternatives(
        offsets,
        ids.astype(np.int32),
        log_probs.astype(np.float32),
        np.array(token_ids, np.int32),
        np.array(own, np.float32),
        np.full(num_tokens + 1, -5.0, np.float32),
    )


@pytest.mark.parametrize("seed", range(3))
def test_tails_and_ranks_are_those_of_a_loop_over_tokens(seed: int) -> None:
    found = alternatives(seed, num_tokens=12)
    for token, (start, stop) in enumerate(zip(found.offsets[:-1], found.offsets[1:], strict=True)):
        assert found.counts[token] == stop - start
        assert found.tails[token] == pytest.approx(1 - sum(np.exp(found.log_probs[start:stop])), abs=1e-6)
        if stop > start:
            assert found.ids[start + found.ranks[token]] == found.token_ids[token]
        else:
            assert (found.token_ids[token], found.ranks[token], found.tails[token]) == (-1, 0, 1)
