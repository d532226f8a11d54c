"""Usable parts of a dump, as a plan and a run say it."""

import json
from pathlib import Path

import pytest

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.data import order as order_module
from stage2_student.data.encode import TurnsLeftOut
from stage2_student.data.reader import DumpReader
from stage2_student.data.token_counts import Counted, Lengths, count_records, keep_counts
from stage2_student.runs.identity import counts_key, run_identity
from stage2_student.training.usable import counted_lines, remarks, usable_lines
from tests.support.micro_batches import count_all
from tests.support.small_dumps import make_recipe, make_work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(work / "model"))


def test_what_is_cut_and_left_out_is_said_with_its_share_of_the_bytes(work: Path, tokenizer: ByteTokenizer) -> None:
    train = make_recipe(work / "dump", work / "model", work / "run", {"max_tokens": 20}).train
    shard = [Counted((19, 15), num_bytes=60), Counted((7,), num_bytes=20), Counted((), "cannot be spelled", 20)]
    lines = list(remarks(Lengths.of([shard]), train, order_module.VERSION))
    assert lines[0] == "an epoch: 2 records, 41 tokens, 0.3 steps; 1 record cannot be used"
    assert lines[1].startswith("1 record of more than 20 tokens (train.max_tokens) is cut into 2 pieces")
    assert lines[2:] == ["left out: 1 record, 20.0 % of the supervised bytes: cannot be spelled"]
    whole = [Counted((30,), num_bytes=60), Counted((10,), num_bytes=20)]
    lines = list(remarks(Lengths.of([whole]), train, order_module.WHOLE_RECORDS))
    assert "left out: 1 record, 75.0 % of the tokens: longer than train.max_tokens" in lines
    assert "continues in the order that it began in" in lines[-1]


def test_a_plan_tells_what_can_be_used_of_a_sample_and_of_what_a_run_has_counted(
    work: Path, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    reader = DumpReader(work / "dump", 0)
    recipe = make_recipe(work / "dump", work / "model", tmp_path, {"max_tokens": 20})
    records = [record for shard in range(5) for record in reader.record_texts(shard)]
    [(_, told)] = usable_lines(recipe, records)
    assert told.startswith("of 60 sampled, ") and told.endswith("100.0 % of the supervised bytes can be used")
    identity = run_identity(recipe, reader.manifest, tokenizer.sha256, SpecialIds(268, (268,)))
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    assert not list(counted_lines(recipe))
    keep_counts(
        tmp_path / "lengths",
        counts_key(identity),
        range(5),
        lambda shard: count_records(reader.record_texts(shard), tokenizer, None, 20),
    )
    lines = [text for _, text in counted_lines(recipe)]
    assert lines == list(remarks(count_all(reader, tokenizer, 20), recipe.train, order_module.VERSION))
    (tmp_path / "identity.json").write_text(json.dumps(identity | {"data_order": order_module.WHOLE_RECORDS}))
    assert not list(counted_lines(recipe))  # that were counts of pieces


def test_turns_that_are_left_out_are_said_beside_records_and_are_no_part_of_what_can_be_used(
    work: Path, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    train = make_recipe(work / "dump", work / "model", work / "run", {"max_tokens": 20}).train
    reasons = (TurnsLeftOut("strips", 2, 30), TurnsLeftOut("calls", 1, 5))
    shard = [Counted((19, 15), None, 60, False, 2, reasons), Counted((18, 9), None, 20), Counted((), "strips", 20)]
    lengths = Lengths.of([shard, [Counted((19,), None, 100, False, 1, reasons[:1])]])
    lines = list(remarks(lengths, train, order_module.VERSION, has_chats=True))
    assert lines[1].startswith("1 chat is read 2 times, each time with other turns supervised")
    assert lines[2].startswith("1 record of more than 20 tokens (train.max_tokens) is cut into 2 pieces")
    assert lines[3:] == [
        "left out: 1 record, 10.0 % of the supervised bytes: strips",
        "left out: 4 turns of chats used without them, 30.0 % of the supervised bytes: strips",
        "left out: 1 turn of chats used without them, 2.5 % of the supervised bytes: calls",
    ]
    assert lengths.num_unused_bytes == 20 + 60 + 5
    assert "a chat is left out if" in list(remarks(lengths, train, order_module.WHOLE_CHATS, True))[-1]
    assert "a chat is left out if" not in list(remarks(lengths, train, order_module.WHOLE_CHATS))[-1]
