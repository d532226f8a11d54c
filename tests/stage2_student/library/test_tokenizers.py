"""A collator makes batches for tokenizers of several families, and of chats by their templates."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipeline.sources.resolve import resolve_tokenizer
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import NO_LABEL, Encoded, Masks, make_example
from stage2_student.library import DistillationCollator, DumpDataset, DumpStream, byte_distillation_loss, read_document
from tests.scenarios.test_chat_student import chat_record
from tests.support.chats import CHAT_FAMILIES, chat, chat_tokenizer, load_chat
from tests.support.families import SMALL
from tests.support.object_store import ObjectStore
from tests.support.small_dumps import make_dump, make_record

TEXTS = [
    "The café is open, naïve or not:\n\tdef f(x): return x**2  # 12345\n",
    "日本語とEnglish, \U0001f642 and  two spaces; Привет мир!",
]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral-v3"])
def test_rows_spell_the_records_and_their_labels_are_the_tokens_that_follow(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer(SMALL[name].source))
    records = [make_record(str(n), text.encode(), np.random.default_rng(n)) for n, text in enumerate(TEXTS)]
    missing = {key: tokenizer.convert_ids_to_tokens(2) for key in ("start", "end") if not tokenizer.bos_token}
    batch = DistillationCollator(tokenizer, {"ce": 1.0}, options=missing)(records)
    targets = batch["targets"]
    assert targets.num_bytes == sum(len(text.encode()) for text in TEXTS) and not targets.left_out
    for row, text in enumerate(TEXTS):
        labels = targets.micro_batch.labels_BL[row]
        count = int((labels != NO_LABEL).sum()) - 1  # the last one is END
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert batch["input_ids"][row, 1 : count + 1].tolist() == labels[:count].tolist() == own
        assert tokenizer.decode(own) == text
    logits_BLV = torch.randn(*batch["input_ids"].shape, len(tokenizer))
    labels_BL = targets.micro_batch.labels_BL
    expected = torch.nn.functional.cross_entropy(
        logits_BLV.double().flatten(0, 1), labels_BL.flatten(), reduction="sum"
    )
    assert byte_distillation_loss(logits_BLV, batch).nats.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name, family in CHAT_FAMILIES.items() if family.bos is not None])
def test_chats_are_written_by_the_tokenizers_own_template(name: str) -> None:
    record = chat_record(chat("the thing?", "and yes é", "in?", "an\nand"))
    loaded = load_chat(name)
    collator = DistillationCollator(chat_tokenizer(name), chats=True)
    batch = collator([record])
    encoded = loaded.encode(record.messages)
    assert batch["input_ids"][0].tolist() == encoded.tokens
    micro = batch["targets"].micro_batch
    [again] = encode_records([record], loaded.tokenizer, 512, loaded)
    assert isinstance(again, Encoded) and loaded.end_of_turn() is not None
    expected = make_example(again, 77, loaded.end_of_turn() or 0, None, Masks(1.0, 1.0))
    assert micro.labels_BL[0].tolist() == expected.labels_L.tolist() and len(expected.symbols_P) > 8
    assert micro.symbols_P.tolist() == expected.symbols_P.tolist()
    logits_BLV = torch.randn(*batch["input_ids"].shape, len(collator.tokenizer))
    assert byte_distillation_loss(logits_BLV, batch).nats.isfinite()


def test_a_dump_in_an_object_store_is_read_as_a_local_one(tmp_path: Path, store: ObjectStore) -> None:
    dump = make_dump(tmp_path / "dump", num_records=6, num_shards=2)
    address = store.put(dump, "library")
    streams = [list(islice(DumpStream(one), 12)) for one in (address, dump)]
    for ours, theirs in zip(*streams, strict=True):
        assert ours.record.doc_id == theirs.record.doc_id and ours.after == theirs.after
    assert DumpDataset(address)[5].document == DumpDataset(dump)[5].document
    found: Any = read_document(address, "d3")
    np.testing.assert_array_equal(found.logprobs_PE, read_document(dump, "d3").logprobs_PE)
