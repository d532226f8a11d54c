"""Alternatives of a record's tokens, against loops over them; the version of shards that hold them."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.columns import shard_schema
from schemas.record import Record
from schemas.record_checks import record_faults
from schemas.shard import commit_shard, read_record_texts, read_shard, to_table
from schemas.token_alternatives import COLUMNS, TokenAlternatives
from tests.support.readable_dumps import cut_positions, make_record, varied_record, with_tokens

IDENTITY = {"tokens": {"top_k": 4, "min_prob": 0.0}}


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


def records() -> list[Record]:
    first = make_record("windows", "aé  ".encode(), has_end=False)
    second = cut_positions(make_record("windows", b"  end", window_start=3), start=2)
    return [varied_record("varied", seed=1, document=b"golden"), first, second]


# What the last release without token columns wrote, with pyarrow 26.
WITHOUT = {
    "d324ebed5c25974ca034b7eaeffb30675af8aed9c96ba82f454635710a8eeec4": {"golden": 1},
    "e6cbe7879cb56d58078816e3b06b894e5f761cba7b14804c128e6b39c584e2e3": {
        "coding": "float32",
        "corpus": {"turns": "rendered"},
    },
}

# What wrote version 2 alone wrote of it, likewise.
VERSION_2 = "157394c2d67f2b053764ca75e004ef51137dab834f6688d83f8e5d8630f9623b"


@pytest.mark.skipif(pa.__version__ != "26.0.1", reason="another pyarrow writes other bytes")
@pytest.mark.parametrize("sha256", WITHOUT)
def test_a_shard_without_token_columns_is_the_file_that_it_was_before_there_were_any(
    sha256: str, tmp_path: Path
) -> None:
    commit_shard(to_table(records(), WITHOUT[sha256], version=1), tmp_path / "shard.parquet", zstd_level=3)
    assert hashlib.sha256((tmp_path / "shard.parquet").read_bytes()).hexdigest() == sha256


@pytest.mark.skipif(pa.__version__ != "26.0.1", reason="another pyarrow writes other bytes")
def test_a_shard_of_version_2_is_the_file_that_it_was_before_there_was_a_third(tmp_path: Path) -> None:
    stored = [with_tokens(record) for record in records()]
    commit_shard(to_table(stored, IDENTITY, version=2), tmp_path / "shard.parquet", zstd_level=3)
    assert hashlib.sha256((tmp_path / "shard.parquet").read_bytes()).hexdigest() == VERSION_2


@pytest.mark.parametrize("version", [2, 3])
def test_a_shard_with_token_columns_gives_back_what_was_stored(version: int, tmp_path: Path) -> None:
    assert set(shard_schema(IDENTITY, version).names) - set(shard_schema({}, version).names) == set(COLUMNS)
    stored = [with_tokens(record) for record in records()]
    commit_shard(to_table(stored, IDENTITY, version), tmp_path / "shard.parquet", zstd_level=3)
    assert pq.read_schema(tmp_path / "shard.parquet").metadata[b"bld.schema_version"] == str(version).encode()
    for ours, theirs in zip(read_shard(tmp_path / "shard.parquet"), stored, strict=True):
        assert ours.tokens is not None and theirs.tokens is not None and not record_faults(ours)
        for name, value in vars(theirs.tokens).items():
            np.testing.assert_array_equal(getattr(ours.tokens, name), value)
    assert [text.document for text in read_record_texts(tmp_path / "shard.parquet")] == [r.document for r in stored]


def test_a_shard_that_lacks_one_of_the_columns_is_refused(tmp_path: Path) -> None:
    table = to_table([with_tokens(record) for record in records()], IDENTITY)
    for name in COLUMNS:
        pq.write_table(table.drop_columns([name]), tmp_path / "less.parquet")
        with pytest.raises(ValueError, match=f"column {name} is missing"):
            next(read_shard(tmp_path / "less.parquet"))


def changed(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """Return a change of one column's first list."""

    def apply(table: pa.Table) -> pa.Table:
        lists = table[name].to_pylist()
        at = table.schema.get_field_index(name)
        field = table.schema.field(name)
        return table.set_column(at, field, pa.array([change(lists[0]), *lists[1:]], field.type))

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            changed("alternative_counts", lambda values: values[:-1]),
            "2 counts of alternatives and 3 ranks",
        ),
        (changed("alternative_ids", lambda values: values[:-1]), "11 ids and 12 log-probabilities for 12 alternatives"),
        (changed("end_token_logprobs", lambda values: values[1:]), "3 log-probabilities of the end token"),
        (changed("teacher_token_ranks", lambda values: [values[0], 4, values[2]]), "token 1 is not among its altern"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(
    damage: Callable[[pa.Table], pa.Table], said: str, tmp_path: Path
) -> None:
    table = to_table([with_tokens(record) for record in records()], IDENTITY)
    pq.write_table(damage(table), tmp_path / "damaged.parquet")
    with pytest.raises(ValueError, match=f"document 'varied': token columns do not fit together: {said}"):
        next(read_shard(tmp_path / "damaged.parquet"))


@pytest.mark.parametrize(
    ("name", "at", "value", "said"),
    [
        ("log_probs", 0, 0.5, "is positive or not finite"),
        ("log_probs", 1, np.nan, "is positive or not finite"),
        ("log_probs", 0, 0.0, "sum to more than 1"),
        ("log_probs", 2, -9.0, "not in descending probability"),
        ("end_log_probs", 1, 0.5, "is positive or not finite"),
        ("ids", 3, -1, "id is negative"),
    ],
)
def test_an_alternative_that_cannot_be_is_found(name: str, at: int, value: float, said: str) -> None:
    record = with_tokens(varied_record("varied", seed=1, document=b"golden"))
    assert record.tokens is not None and not record_faults(record)
    values = getattr(record.tokens, name).copy()
    values[at] = value
    assert said in "; ".join(record_faults(replace(record, tokens=replace(record.tokens, **{name: values}))))


def test_an_alternative_that_is_there_twice_is_found() -> None:
    record = with_tokens(varied_record("varied", seed=1, document=b"golden"))
    assert record.tokens is not None
    ids = record.tokens.ids.copy()
    ids[1] = ids[0]
    assert "the same alternative twice" in record_faults(replace(record, tokens=replace(record.tokens, ids=ids)))[0]
