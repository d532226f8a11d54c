"""Plain text supervised in parts: its dump is that of the whole text, cut to those parts, and a student learns them."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Document
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.manifest import Manifest
from schemas.record import Record, Segment
from schemas.shard import read_shard
from stage1_teacher.dump import audit
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.verification.verify import verify_dump
from stage2_student.data.encode import encode_pieces
from stage2_student.data.examples import NO_LABEL, Example, Masks, make_example
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe

PATTERN = "(?<=or ).*|thing( number)?|é"
LONG = [" ".join(TEXTS[20:26]), "the and " * 40 + "é", "in a " * 90 + "or a river"]
NONE = "in a river"


def records(folder: Path) -> list[Record]:
    return [record for shard in Manifest.load(folder).shards for record in read_shard(shard.path(folder))]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Path]:
    """Return the dumps of a corpus, whole and in parts."""
    texts, work = [*TEXTS[:6], *LONG], tmp_path_factory.mktemp("parts")
    whole = dump(write_recipe(work / "whole", model, texts))
    recipe = write_recipe(work / "parts", model, [*texts, NONE])
    return whole, dump(recipe, f"corpus.supervise={{pattern: {PATTERN!r}}}")


def selected(text: bytes) -> set[int]:
    """Return the bytes that the pattern selects."""
    found, characters = set(), text.decode()
    for match in re.finditer(PATTERN, characters):
        found |= set(range(*(len(characters[:edge].encode()) for edge in match.span())))
    return found


def by_position(of_document: list[Record]) -> dict[tuple[int, bool], tuple[object, ...]]:
    """Return what is stored at each position of a document: its byte offset, and whether it asks for END."""
    stored = {}
    for record in of_document:
        bounds = np.append(0, np.cumsum(record.entry_counts, dtype=np.int64))
        position = 0
        for segment in record.segments:
            for i in range(segment.num_positions):
                entries = slice(bounds[position], bounds[position + 1])
                key = (record.window_start + segment.start + i, i == segment.length)
                assert key not in stored, "a position is supervised once"
                stored[key] = (
                    record.symbols[entries].tobytes(),
                    record.logprobs[entries].tobytes(),
                    *(values[position] for values in record.measures.values()),
                )
                position += 1
    return stored


def test_a_dump_in_parts_holds_what_the_dump_of_the_whole_holds_there(dumps: tuple[Path, Path]) -> None:
    whole, parts = (
        {name: [r for r in found if r.doc_id == name] for name in dict.fromkeys(r.doc_id for r in found)}
        for found in map(records, dumps)
    )
    assert whole.keys() == parts.keys()
    assert any(not record.segments for of_one in parts.values() for record in of_one), "no window of context alone"
    for name, of_whole in whole.items():
        text = b"".join(r.document[max(0, end - r.window_start) :] for r, end in with_ends(of_whole))
        held = selected(text)
        expected = {
            key: value
            for key, value in by_position(of_whole).items()
            if (key[0] in held if not key[1] else key[0] - 1 in held)
        }
        assert by_position(parts[name]) == expected
        assert [r.document for r in parts[name]] == [r.document for r in of_whole]
    assert json.loads((dumps[1] / "manifest.json").read_text())["identity"]["corpus"]["supervise"] == {
        "pattern": PATTERN,
        "field": None,
        "turns": None,
    }


def with_ends(windows: list[Record]) -> list[tuple[Record, int]]:
    """Return each window with the end of the one before."""
    ends = [0, *(window.window_start + len(window.document) for window in windows)]
    return list(zip(windows, ends, strict=False))


def test_a_dump_in_parts_verifies_is_audited_and_counts_what_is_left_out(dumps: tuple[Path, Path]) -> None:
    _, parts = dumps
    assert verify_dump(parts, against_teacher=8) == []
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["left_out_by_corpus"] == {"left out: corpus.supervise selects nothing of it": 1}
    assert summary["bytes"] == sum(s.length for record in records(parts) for s in record.segments)
    audited = json.loads((parts / "audit.json").read_text())["wide_covering"]
    assert audited["positions"] > 0


def test_the_audits_reference_of_a_part_is_that_of_the_whole_there(tmp_path: Path, model: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, model, TEXTS[:1]), [])
    text = b"the thing and the other thing in a river or another one, ran under the hills and the stone"
    with open_teacher(recipe, *load_tokenizer(recipe), branches=True) as teacher:
        segments = (Segment(50, 7, False), Segment(60, 30, True))
        whole, part = (
            audit.compute_reference(teacher, window)
            for of_text in (None, segments)
            for window in cut_document(Document("0", text, None, segments=of_text), teacher.tokenizer, 128, 0)
        )
    assert whole.probs_PV is not None
    assert part.probs_PV is not None
    held = [*range(50, 57), *range(60, 90)]
    assert len(part.probs_PV) == len(held)
    # Where branches leave the text before the part, they are not followed for it.
    np.testing.assert_allclose(part.probs_PV, whole.probs_PV[held], atol=0.02)


def test_a_dump_of_whole_documents_goes_on_and_refuses_a_selection_by_name(dumps: tuple[Path, Path]) -> None:
    whole, _ = dumps
    before = (whole / "manifest.json").read_bytes()
    assert b"supervise" not in before
    dump(whole.parent / "recipe.yaml")
    with pytest.raises(ValueError, match=r"corpus\.supervise\.pattern: None there, 'a' here"):
        dump(whole.parent / "recipe.yaml", "corpus.supervise={pattern: a}")
    assert (whole / "manifest.json").read_bytes() == before


def test_verify_finds_a_window_that_a_dump_in_parts_lacks(dumps: tuple[Path, Path], tmp_path: Path) -> None:
    from schemas.dump_files import Key
    from schemas.shard import commit_shard, to_table
    from stage1_teacher.verification.verify_records import faults_of_records

    manifest = Manifest.load(dumps[1])
    shard = max(manifest.shards, key=lambda s: len(list(read_shard(s.path(dumps[1])))))
    of_shard = list(read_shard(shard.path(dumps[1])))
    later = next(i for i, record in enumerate(of_shard) if record.window_start)
    identity = {"corpus": manifest.identity["corpus"]}
    metadata = {Key.IDENTITY: json.dumps(identity), Key.LEFT_OUT: "{}"}
    for kept, is_faulty in ((of_shard, False), ([*of_shard[:later], *of_shard[later + 1 :]], True)):
        path = tmp_path / f"{is_faulty}.parquet"
        commit_shard(to_table(kept, identity), path, 1)
        assert bool(list(faults_of_records(path, metadata, shard))) == is_faulty


@pytest.mark.parametrize("max_tokens", [None, 24])
def test_a_student_learns_the_parts_as_it_would_in_the_whole(
    dumps: tuple[Path, Path], model: Path, max_tokens: int | None
) -> None:
    tokenizer = ByteTokenizer.load(str(model))
    whole, parts = ({(record.doc_id, record.window_start): record for record in found} for found in map(records, dumps))
    for key, record in parts.items():
        [found] = encode_pieces([record], tokenizer, None, max_tokens)
        if not record.segments:
            assert isinstance(found, str)
            continue
        assert not isinstance(found, str)
        learned = [make_example(one, 268, 268, None, Masks(1.0, 1.0)) for one in found]
        [of_whole] = encode_pieces([whole[key]], tokenizer, None, None)
        everything = make_example(of_whole[0], 268, 268, None, Masks(1.0, 1.0))
        held = {i for s in record.segments for i in range(s.start, s.start + s.length)}
        ends = [s for s in record.segments if s.has_end]
        edges = list(pairwise([0, *of_whole[0].ends.tolist()]))
        inside = [all(i in held for i in range(start, end)) for start, end in edges]
        labels = [label for example in learned for label in example.labels_L if label != NO_LABEL]
        expected = [int(token) for token, is_in in zip(of_whole[0].tokens, inside, strict=True) if is_in]
        assert sorted(labels) == sorted(expected + [268] * len(ends))
        entries = [entry for example in learned for entry in rows(example)]
        assert sorted(entries) == sorted(
            entry
            for entry, (state, symbol) in zip(
                rows(everything), zip(everything.state_P, everything.symbols_P, strict=True), strict=True
            )
            if (ends if symbol == 255 else inside[state])
        )


def rows(example: Example) -> list[tuple[float, ...]]:
    """Return what is learned at each position: its symbol, and the sum of its entries, which tells it."""
    stored = np.where(example.entry_symbols_PE >= 0, np.exp(example.entry_logprobs_PE), 0).sum(1)
    return [(int(symbol), round(float(mass), 6)) for symbol, mass in zip(example.symbols_P, stored, strict=True)]
