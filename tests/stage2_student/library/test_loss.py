"""The loss of the library is that of a run on the same documents, from logits or from hidden states."""

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GraniteConfig

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.data.order import Position
from stage2_student.data.reader import DumpReader
from stage2_student.data.union import Member
from stage2_student.library import (
    DistillationCollator,
    DumpDataset,
    StreamedRecord,
    byte_distillation_loss,
    token_head,
)
from stage2_student.library.collator import STUDENT_OPTIONS, TRAIN_OPTIONS
from stage2_student.training.building.student import build_student
from stage2_student.training.rank_batches import BatchBuilder, Sources
from tests.support.micro_batches import count_all
from tests.support.small_dumps import make_dump, make_recipe, make_record

EVERY = {"ce": 1.0, "byte_ce": 0.5, "kl": 0.1, "alm": 10.0}
OPTIONS = {"kl_direction": "reverse", "kl_temperature": 2.0, "max_token_end": 0.1}
CASES: list[tuple[dict[str, float], dict[str, Any]]] = [
    ({"ce": 0.3, "kl": 1.0}, {}),
    (EVERY, OPTIONS),
    ({"alm": 1.0}, {"alm_space": True}),
]


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dump(tmp_path_factory.mktemp("dump") / "dump", num_records=12, num_shards=1)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize(("objectives", "options"), CASES, ids=["default", "every", "alm"])
def test_loss_and_gradient_are_those_of_a_run_on_the_same_documents(
    objectives: dict[str, float], options: dict[str, Any], model: Path, dump: Path, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "start").symlink_to(model)
    train: dict[str, Any] = {key: options[key] for key in options if key in TRAIN_OPTIONS}
    train |= {"objectives": dict.fromkeys(EVERY, 0.0) | objectives, "micro_batch_tokens": 4000, "batch_tokens": 90}
    of_student = {key: options[key] for key in options if key in STUDENT_OPTIONS}
    recipe = make_recipe(dump, model, tmp_path, train, interface="token_marginal", **of_student)
    byte_tokenizer, ids = ByteTokenizer.load(str(model)), SpecialIds(268, (268,))
    student, reader = build_student(recipe, byte_tokenizer, ids), DumpReader(dump, 0)
    builder = BatchBuilder(recipe, Sources([Member(reader)], byte_tokenizer, None, ids), student.interface, "off", 0, 1)
    _, [micro] = next(builder.steps([count_all(reader, byte_tokenizer, 512)]))
    expected, sums = student(micro)
    expected.backward()
    gradient = [weight.grad.clone() for weight in student.lm.parameters()]

    records = {record.doc_id: record for record in map(DumpDataset(dump).__getitem__, range(12))}
    collator = DistillationCollator(tokenizer, objectives, max_tokens=512, options=options)
    batch = collator([records[name] for name in micro.doc_ids])
    assert torch.equal(batch["input_ids"], micro.tokens_BL) and len(micro.doc_ids) == 3
    for head in (None, token_head(student.lm)):
        student.lm.zero_grad()
        states = student.lm.base_model(input_ids=batch["input_ids"]).last_hidden_state
        loss = byte_distillation_loss(student.lm.lm_head(states) if head is None else states, batch, head)
        assert loss.nats.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, value in zip(student.sums_names, sums.tolist(), strict=True):
            assert name not in loss.sums or loss.sums[name].item() == pytest.approx(value, rel=1e-6)
        assert loss.per_byte.item() == pytest.approx(loss.nats.item() / micro.num_bytes)
        loss.nats.backward()
        for ours, theirs in zip(student.lm.parameters(), gradient, strict=True):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_a_head_includes_what_its_family_does_to_logits(family: str) -> None:
    kinds = {
        "granite": GraniteConfig(logits_scaling=3.0, vocab_size=64, hidden_size=32, intermediate_size=32),
        "gemma2": Gemma2Config(final_logit_softcapping=5.0, vocab_size=64, hidden_size=32, intermediate_size=32),
    }
    config = kinds[family]
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 2
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).train()
    tokens_BL = torch.randint(3, 64, (2, 7))
    head = token_head(lm)
    assert lm.training
    states_BLD = lm.base_model(input_ids=tokens_BL).last_hidden_state
    torch.testing.assert_close(head(states_BLD), lm(input_ids=tokens_BL).logits, rtol=1e-5, atol=1e-6)


def test_a_long_record_is_several_rows_and_an_unusable_one_is_named(dump: Path, tokenizer: Any) -> None:
    records = [DumpDataset(dump)[index] for index in range(12)]
    alien = make_record("alien", "\ufdd0".encode(), np.random.default_rng(0))
    broken = replace(alien, segments=())
    collator = DistillationCollator(tokenizer, max_tokens=12)
    batch = collator([*(StreamedRecord(record, Position(0, 12)) for record in records), broken])
    targets = batch["targets"]
    assert batch["input_ids"].shape[0] > 12 and batch["input_ids"].shape[1] <= 12
    assert targets.num_bytes == sum(len(record.document) for record in records)
    assert set(targets.doc_ids) == {record.doc_id for record in records} and targets.after == Position(0, 12)
    assert dict(targets.left_out) == {"alien": "no token of the student's lies in what the dump supervises"}
    nothing = collator([broken])
    logits_BLV = torch.zeros(*nothing["input_ids"].shape, len(tokenizer), requires_grad=True)
    loss = byte_distillation_loss(logits_BLV, nothing)
    loss.per_byte.backward()
    assert loss.num_bytes == 0 and loss.nats.item() == 0 and not logits_BLV.grad.any()  # type: ignore[union-attr]


def test_a_collator_and_its_batches_go_to_workers_and_back(dump: Path, tokenizer: Any) -> None:
    collator, record = DistillationCollator(tokenizer, options={"max_doubt": 0.5}), DumpDataset(dump)[0]
    batch, again = (pickle.loads(pickle.dumps(one))([record]) for one in (collator, collator))
    logits_BLV = torch.randn(*batch["input_ids"].shape, len(tokenizer))
    losses = [byte_distillation_loss(logits_BLV, one).nats.item() for one in (batch, pickle.loads(pickle.dumps(again)))]
    assert losses[0] == losses[1] > 0 and math.isfinite(losses[0])


def test_what_does_not_fit_is_refused_with_a_way_out(dump: Path, tokenizer: Any) -> None:
    record = DumpDataset(dump)[0]
    batch = DistillationCollator(tokenizer)([record])
    rows, length = batch["input_ids"].shape
    with pytest.raises(
        ValueError, match=r"head has 300 rows, .* made for 269: give DistillationCollator\(vocab_size=300"
    ):
        byte_distillation_loss(torch.zeros(rows, length, 300), batch)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 269\), but input_ids"):
        byte_distillation_loss(torch.zeros(1, 2, 269), batch)
    with pytest.raises(ValueError, match="'uld' is not one of ce, byte_ce, kl, alm"):
        DistillationCollator(tokenizer, {"uld": 1.0})
    with pytest.raises(
        ValueError, match="'kl_temprature' is no option of DistillationCollator; there are kl_direction, kl_temperature"
    ):
        DistillationCollator(tokenizer, options={"kl_temprature": 2.0})
    with pytest.raises(ValueError, match="kl_temperature"):
        DistillationCollator(tokenizer, options={"kl_temperature": 0.0})
    with pytest.raises(ValueError, match="max_tokens is 7"):
        DistillationCollator(tokenizer, max_tokens=7)
    with pytest.raises(ValueError, match=r"chats: give DistillationCollator\(chats=True\)"):
        DistillationCollator(tokenizer)([replace(record, message_roles=("user",), message_lengths=(1,))])


def test_a_padded_head_scores_as_one_without_padding_where_its_padding_is_impossible(
    dump: Path, tokenizer: Any
) -> None:
    records = [DumpDataset(dump)[index] for index in range(3)]
    plain, padded = (DistillationCollator(tokenizer, vocab_size=size)(records) for size in (None, 300))
    logits_BLV = torch.randn(*plain["input_ids"].shape, 269)
    wide_BLV = torch.cat([logits_BLV, torch.full((*logits_BLV.shape[:2], 31), -torch.inf)], dim=-1)
    losses = [byte_distillation_loss(*one).nats.item() for one in ((logits_BLV, plain), (wide_BLV, padded))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
