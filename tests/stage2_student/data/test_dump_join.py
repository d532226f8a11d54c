"""Records of several dumps, joined by content whatever their names, shards and windows."""

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.tokenization.special_ids import SpecialIds
from schemas import END, SCHEMA_VERSION, shard
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record, RecordText, Segment
from schemas.shard import commit_shard, to_table
from stage2_student.data.align import aligned, overlapping, speakers, whole_document
from stage2_student.data.contents import table
from stage2_student.data.mix import Mix
from stage2_student.data.reader import DumpReader
from stage2_student.runs import folder
from stage2_student.runs.identity import run_identity
from tests.support.small_dumps import make_recipe, make_record, make_text

How = Literal["arithmetic", "geometric"]


def write_dump(
    folder: Path, records: Sequence[Record], per_shard: int, teacher: str, versions: Sequence[int] = (SCHEMA_VERSION,)
) -> Path:
    """Write a dump whose shards are of these versions of the format, in turns."""
    (folder / "shards").mkdir(parents=True)
    parts = [records[at : at + per_shard] for at in range(0, len(records), per_shard)]
    plans = tuple(
        ShardPlan(index=i, first_document=i * per_shard, num_documents=len(part), num_bytes=0, sha256=f"{teacher}-{i}")
        for i, part in enumerate(parts)
    )
    identity = {"teacher": {"model": teacher}}
    counts = {"used": len(records)}
    Manifest(schema_version=max(versions), identity=identity, corpus_counts=counts, shards=plans).save(folder)
    for part, plan, version in zip(parts, plans, islice(cycle(versions), len(parts)), strict=True):
        commit_shard(to_table(part, identity, version), plan.path(folder), 3)
    return folder


def corpus_records(seed: int, texts: Sequence[bytes]) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [make_record(f"{seed}-{i}", text, rng) for i, text in enumerate(texts)]


TEXTS = [b"text %d" % i for i in range(11)] + [b"twice", b"twice"]


def open_mixed(dumps: Sequence[Path], seed: int = 0) -> DumpReader:
    return DumpReader(dumps[0], seed, dumps[1:], Mix.of([1.0] * len(dumps), "arithmetic"))


def test_joined_shards_are_read_bit_by_bit_for_many_are_open_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = [write_dump(tmp_path / name, corpus_records(1, TEXTS), 4, name) for name in ("one", "two")]
    reader = open_mixed(dumps)
    opened: list[bool] = []
    before = shard.open_parquet
    monkeypatch.setattr(shard, "open_parquet", lambda path, beside=False: opened.append(beside) or before(path, beside))
    next(reader.records_of(0, iter([0])))
    assert opened == [True, True]


def test_dumps_of_several_versions_of_the_format_are_mixed_as_those_of_one_are(tmp_path: Path) -> None:
    one, two = corpus_records(1, TEXTS), corpus_records(2, TEXTS)
    of_one = [write_dump(tmp_path / "a3", one, 4, "a"), write_dump(tmp_path / "b3", two, 3, "b")]
    of_several = [write_dump(tmp_path / "a", one, 4, "a", [1, 3]), write_dump(tmp_path / "b", two, 3, "b", [1])]
    for found, expected in zip(
        *(islice(open_mixed(d).records(), len(TEXTS)) for d in (of_several, of_one)), strict=True
    ):
        assert found[1] == expected[1] and found[0].document == expected[0].document
        for name in ("entry_counts", "symbols", "token_end", "doubt"):
            np.testing.assert_array_equal(getattr(found[0], name), getattr(expected[0], name))
        np.testing.assert_allclose(found[0].logprobs, expected[0].logprobs, atol=1e-6)


def test_records_are_joined_by_content_whatever_their_names_shards_and_order(tmp_path: Path) -> None:
    one, two = corpus_records(1, TEXTS), corpus_records(2, TEXTS)
    dumps = [write_dump(tmp_path / "one", one, 4, "a"), write_dump(tmp_path / "two", two[::-1], 3, "b")]
    reader = open_mixed(dumps)
    assert not reader.remarks
    found = [record for record, _ in islice(reader.records(), len(TEXTS))]
    assert sorted(record.document for record in found) == sorted(TEXTS)
    mix = Mix.of([1, 1], "arithmetic")
    for record in found:
        candidates = [
            mix([a, b])
            for a in one
            for b in two
            if a.document == b.document == record.document and a.doc_id == record.doc_id
        ]
        assert any(np.array_equal(record.logprobs, candidate.logprobs) for candidate in candidates)


def test_mixed_dumps_are_read_on_from_every_position(tmp_path: Path) -> None:
    dumps = [
        write_dump(tmp_path / "one", corpus_records(1, TEXTS), 4, "a"),
        write_dump(tmp_path / "two", corpus_records(2, TEXTS[2:]), 5, "b"),
    ]
    stream = [(record, after) for record, after in islice(open_mixed(dumps, 1).records(), 30)]
    for at, (_, after) in enumerate(stream[:-2]):
        again = [record for record, _ in islice(open_mixed(dumps, 1).records(after), 2)]
        for record, (expected, _) in zip(again, stream[at + 1 : at + 3], strict=True):
            assert record.doc_id == expected.doc_id and np.array_equal(record.logprobs, expected.logprobs)


def test_a_document_that_a_dump_lacks_is_counted_by_name_and_left_out(tmp_path: Path) -> None:
    one, two = corpus_records(1, TEXTS[:6]), corpus_records(2, TEXTS[2:9])
    dumps = [write_dump(tmp_path / "one", one, 4, "a"), write_dump(tmp_path / "two", two, 4, "b")]
    reader = open_mixed(dumps)
    a, b = dumps
    assert reader.remarks == {f"in {a} but not in {b}: left out": 2, f"in {b} but not in {a}: left out": 3}
    assert sorted(record.document for record, _ in islice(reader.records(), 4)) == TEXTS[2:6]
    two = corpus_records(2, TEXTS[6:])
    with pytest.raises(
        ValueError, match=r"no document is in all of .*one, .*three; student.dumps must name dumps of one corpus"
    ):
        open_mixed([a, write_dump(tmp_path / "three", two, 4, "b")])


def test_chats_of_the_same_words_by_other_speakers_are_other_documents(tmp_path: Path) -> None:
    said = [replace(r, message_lengths=(3, len(r.document) - 3)) for r in corpus_records(0, [b"you said", b"so it is"])]
    one = [replace(record, message_roles=("user", "assistant")) for record in said]
    two = [one[0], replace(said[1], message_roles=("system", "assistant"))]
    dumps = [write_dump(tmp_path / name, records, 1, name) for name, records in (("a", one), ("b", two))]
    reader = open_mixed(dumps)
    assert {record.document for record, _ in islice(reader.records(), 3)} == {b"you said"}
    assert reader.remarks


def test_who_says_what_is_known_by_where_each_message_starts_whole_or_in_windows() -> None:
    plain = make_record("d", b"hi there you", np.random.default_rng(0))
    whole = replace(plain, message_roles=("user", "assistant", "user"), message_lengths=(3, 6, 3))
    first = replace(plain, message_roles=("user", "assistant"), message_lengths=(3, 6))
    second = replace(plain, window_start=3, message_roles=("assistant", "user"), message_lengths=(6, 3))
    assert speakers([whole]) == speakers([first, second]) == b"0 user\n3 assistant\n9 user\n"
    assert speakers([plain]) == b""


def windows_of(rng: np.random.Generator, name: str, document: bytes, ends: Sequence[int], overlap: int) -> list[Record]:
    """Cut a document at these ends, each window after the first with `overlap` bytes of context."""
    records = []
    for start, end in pairwise([0, *ends]):
        context = min(overlap, start)
        part = document[start - context : end]
        record = make_record(name, part, rng, [Segment(context, end - start, end == len(document))])
        records.append(replace(record, window_start=start - context))
    return records


def answers(records: Sequence[Record]) -> dict[tuple[int, int], dict[int, float]]:
    """Return a dump's symbols and log-probabilities for each place of a document, position by position."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for record in records:
        entry, position = 0, 0
        for segment in record.segments:
            for offset in range(segment.num_positions):
                count = int(record.entry_counts[position])
                place = (record.window_start + segment.start + offset, int(offset == segment.length))
                assert place not in found
                found[place] = {int(record.symbols[e]): float(record.logprobs[e]) for e in range(entry, entry + count)}
                entry, position = entry + count, position + 1
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_windows_that_teachers_cut_differently_are_mixed_position_by_position(seed: int) -> None:
    rng = np.random.default_rng(seed)
    document = make_text(rng, 8)
    cuts = [sorted(rng.choice(np.arange(1, len(document)), 3, replace=False).tolist()) for _ in range(2)]
    one, two = (windows_of(rng, str(i), document, [*cut, len(document)], 4) for i, cut in enumerate(cuts))
    mix = Mix.of([2, 1], "arithmetic")
    assert whole_document(one) == whole_document(two) == document
    mixed = [mix(aligned(record, [overlapping(record, two)])) for record in one]
    found, first, second = answers(mixed), answers(one), answers(two)
    assert found.keys() == first.keys() == second.keys() and len(found) == len(document) + 1
    for place, entries in found.items():
        both = first[place].keys() | second[place].keys()
        assert entries.keys() == both
        realised = END if place[1] else document[place[0]]
        expected = 2 / 3 * np.exp(first[place][realised]) + 1 / 3 * np.exp(second[place][realised])
        assert np.exp(entries[realised]) == pytest.approx(expected, rel=1e-5)
    assert [(r.window_start, r.document, r.segments) for r in mixed] == [
        (r.window_start, r.document, r.segments) for r in one
    ]


def test_where_dumps_supervise_different_positions_those_of_all_are_mixed_and_the_others_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = b"user says assistant says"
    one = make_record("0", text, rng, [Segment(2, 3, True), Segment(10, 14, True)])
    two = make_record("0", text, rng, [Segment(3, 2, False), Segment(9, 8, False), Segment(20, 4, True)])
    a, b = write_dump(tmp_path / "one", [one], 4, "a"), write_dump(tmp_path / "two", [two], 4, "b")
    reader = open_mixed([a, b])
    told = f"with other positions supervised in {b} than in {a}: those that both supervise are mixed"
    assert reader.remarks == {told: 1}
    mixed, _ = next(reader.records())
    assert mixed.segments == (Segment(3, 2, False), Segment(10, 7, False), Segment(20, 4, True))
    first, second, found = answers([one]), answers([two]), answers([mixed])
    assert found.keys() == first.keys() & second.keys()
    assert all(found[place].keys() == first[place].keys() | second[place].keys() for place in found)


def test_an_end_that_all_supervise_stays_where_the_byte_before_it_does_not() -> None:
    rng = np.random.default_rng(0)
    one = make_record("0", b"abcd", rng, [Segment(1, 3, True)])
    two = make_record("0", b"abcd", rng, [Segment(1, 1, False), Segment(4, 0, True)])
    both = aligned(one, [[two]])
    assert [record.segments for record in both] == [(Segment(1, 1, False), Segment(4, 0, True))] * 2
    assert answers([both[0]]) == {
        place: entries for place, entries in answers([one]).items() if place in answers([two])
    }
    assert answers([both[1]]) == answers([two])


def test_a_document_cut_into_windows_in_one_dump_is_joined_with_it_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [make_text(rng, 9), b"short", make_text(rng, 12)]
    whole = [make_record(str(i), text, rng) for i, text in enumerate(texts)]
    cut = [
        r
        for i, text in enumerate(texts)
        for r in windows_of(rng, str(i), text, [3, 20, len(text)] * (len(text) > 20) or [5], 2)
    ]
    dumps = [write_dump(tmp_path / "whole", whole, 2, "a"), write_dump(tmp_path / "cut", cut, 4, "b")]
    for order in (dumps, dumps[::-1]):
        reader = open_mixed(order)
        assert not reader.remarks
        found = [record for record, after in takewhile(lambda item: item[1].epoch == 0, reader.records())]
        for text in texts:
            own = [record for record in found if record.document in text]
            assert answers(own).keys() == {(i, 0) for i in range(len(text))} | {(len(text), 1)}


def test_matching_a_teachers_own_tokens_is_refused_with_several_dumps_and_they_are_named(tmp_path: Path) -> None:
    dumps = [{"path": "runs/a"}, {"path": "runs/b"}]
    train = {"objectives": {"alm": 100.0}}
    assert make_recipe(tmp_path, tmp_path, tmp_path, train, dumps=dumps[:1]).train.objectives.alm
    with pytest.raises(
        ValidationError, match=r"objectives.alm \(100\) .* student.dumps \(runs/a, runs/b\) .* set alm to 0"
    ):
        make_recipe(tmp_path, tmp_path, tmp_path, train, dumps=dumps)


def test_a_dump_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="runs/a named more than once; name it once, with the sum of the weights"):
        make_recipe(tmp_path, tmp_path, tmp_path, {}, dumps=[{"path": "runs/a"}, {"path": "runs/a/"}])


def test_a_runs_identity_covers_all_dumps_their_weights_and_how_they_are_mixed(tmp_path: Path) -> None:
    dumps = [write_dump(tmp_path / name, corpus_records(1, TEXTS), 4, name) for name in ("a", "b", "c")]

    def identity(paths: Sequence[Path], weight: float = 1.0, how: How = "arithmetic") -> dict[str, Any]:
        refs = [{"path": str(path), "weight": weight if path == paths[-1] else 1.0} for path in paths]
        recipe = make_recipe(tmp_path, tmp_path, tmp_path / "run", {"objectives": {"alm": 0.0}}, dumps=refs, mix=how)
        first, *others = (Manifest.load(path) for path in paths)
        return run_identity(recipe, first, "s", SpecialIds(1, (1,)), others)

    (tmp_path / "run").mkdir()
    folder.claim(tmp_path / "run", identity(dumps[:2]))
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    folder.claim(tmp_path / "run", identity(dumps[:2]))
    for changed, field in [
        (identity([dumps[0], dumps[2]]), "other_dumps.1.teacher.model: 'b' there, 'c' here"),
        (identity(dumps[:2], weight=3), r"mix.weights.1: 0.5 there, 0.75 here"),
        (identity(dumps[:2], how="geometric"), "mix.how: 'arithmetic' there, 'geometric' here"),
        (identity(dumps[:1]), "mix.how: 'arithmetic' there, None here"),
    ]:
        with pytest.raises(ValueError, match=field):
            folder.claim(tmp_path / "run", changed)


def test_what_a_dump_asks_takes_28_bytes_a_document_and_little_more_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def record_texts(shard: int) -> Iterator[RecordText]:
        return (RecordText(str(i), 0, b"%d %d" % (shard, i), (Segment(0, 3, True),)) for i in range(200))

    monkeypatch.setattr(table, "read_record_texts", record_texts)
    dump: Any = SimpleNamespace(shards=list(range(100)))
    tracemalloc.start()
    contents = table.Contents.of(dump)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(contents.keys_N) == 20_000
    assert kept < 32 * 20_000 and peak < 80 * 20_000


def test_dumps_that_ask_about_other_positions_are_told_by_how_many_documents(tmp_path: Path) -> None:
    one = corpus_records(1, TEXTS)
    two = [replace(record, segments=(Segment(0, 3, False),)) if i in (2, 5) else record for i, record in enumerate(one)]
    two = [make_record(r.doc_id, r.document, np.random.default_rng(i), r.segments) for i, r in enumerate(two)]
    dumps = [write_dump(tmp_path / "one", one, 4, "a"), write_dump(tmp_path / "two", two[::-1], 3, "b")]
    said = f"with other positions supervised in {dumps[1]} than in {dumps[0]}: those that both supervise are mixed"
    assert open_mixed(dumps).remarks == {said: 2}
