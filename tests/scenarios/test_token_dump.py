"""Dumps that also hold alternatives of the teacher's tokens, against the model's own softmax in float64."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.loading import load_recipe
from pipeline.dumps.completeness import dump_faults
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from schemas import dump_files
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.record_checks import record_faults
from schemas.shard import read_shard
from schemas.token_vocabulary import read_vocabulary
from stage1_teacher.dump.merge import merge_dumps
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.verification.verify import verify_dump
from stage1_teacher.verification.verify_tokens import token_faults
from tests.scenarios import test_chat_dump as chats
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.support.chats import chat_model
from tests.support.tiny import tiny_model

TOKENS = {"top_k": 6, "min_prob": 0.01}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@cache
def float64_model(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


def own_logprobs(model: Path, tokens: list[int]) -> np.ndarray:
    """Return the model's log-probabilities after each token, in float64."""
    with torch.no_grad():
        found: np.ndarray = float64_model(model)(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()
    return found


def check_row(record: Record, token: int, own_V: np.ndarray, top_k: int, min_prob: float, atol: float) -> None:
    """Hold the alternatives of one token against the model's log-probabilities there."""
    assert record.tokens is not None
    found = record.tokens
    alternatives = slice(int(found.offsets[token]), int(found.offsets[token + 1]))
    top = np.argsort(-own_V, kind="stable")[:top_k].tolist()
    expected = {one for one in top if np.exp(own_V[one]) >= min_prob} | {int(found.token_ids[token])}
    assert set(found.ids[alternatives].tolist()) == expected
    ids, log_probs = found.ids[alternatives], found.log_probs[alternatives].astype(np.float64)
    np.testing.assert_allclose(np.exp(log_probs / 2), np.exp(own_V[ids] / 2), rtol=0, atol=atol)
    np.testing.assert_allclose(np.exp(log_probs).sum() + found.tails[token], 1, atol=1e-6)


def has_supervised_byte(record: Record) -> list[bool]:
    """Tell of each token, a byte at a time, whether any of its bytes is supervised."""
    supervised = {s.start + i for s in record.segments for i in range(s.length)}
    ends = np.cumsum(record.teacher_token_lengths).tolist()
    return [bool(supervised & set(range(start, end))) for start, end in pairwise([0, *ends])]


def records_of(dump: Path) -> list[Record]:
    return [record for shard in Manifest.load(dump).shards for record in read_shard(shard.path(dump))]


@pytest.mark.parametrize("beam_width", [0, 3])
def test_every_token_of_every_window_has_its_alternatives_and_the_dump_verifies(
    beam_width: int, model: Path, tmp_path: Path
) -> None:
    texts = [TEXTS[0], " ".join(TEXTS[:4]), "é"]  # the second is cut into windows
    recipe = write_recipe(tmp_path, model, texts, tokens=TOKENS, covering={"beam_width": beam_width})
    folder = dump(recipe)
    tokenizer = ByteTokenizer.load(str(model))
    end = tokenizer.default_end
    assert end is not None
    records = records_of(folder)
    assert any(record.tokens is not None and (record.tokens.counts == 0).any() for record in records)  # of the overlap
    assert len(records) > len(texts) and Manifest.load(folder).schema_version == 3
    for record in records:
        assert record.tokens is not None and not record_faults(record)
        tokens = tokenizer.encode(record.document)
        own = own_logprobs(model, [end, *tokens])
        for token, is_supervised in enumerate(has_supervised_byte(record)):
            if is_supervised:
                check_row(record, token, own[token], 6, 0.01, atol=0.02)
            assert record.tokens.token_ids[token] == (tokens[token] if is_supervised else -1)
            assert bool(record.tokens.counts[token]) is is_supervised
        ends = record.tokens.end_log_probs.astype(np.float64)
        np.testing.assert_allclose(np.exp(ends / 2), np.exp(own[:, end] / 2), rtol=0, atol=0.01)
        np.testing.assert_allclose(ends, own[:, end], rtol=0.02, atol=0.02)
    assert read_vocabulary(folder) == list(tokenizer.token_bytes)
    assert not verify_dump(folder, against_teacher=2)


def test_tokens_of_supervised_parts_have_alternatives_and_a_record_of_context_alone_has_none(
    model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model, ["the other é", "in a " * 90 + "or the river"], tokens=TOKENS)
    folder = dump(recipe, "corpus.supervise={pattern: the}")
    tokenizer = ByteTokenizer.load(str(model))
    records = records_of(folder)
    unseen = [record for record in records if not record.segments]
    assert unseen and len(records) > len(unseen) > 0
    for record in unseen:
        assert record.tokens is not None and not len(record.tokens.ids) and np.isnan(record.tokens.end_log_probs).all()
    for record in (record for record in records if record.segments):
        assert record.tokens is not None and not record_faults(record)
        assert (record.tokens.counts > 0).tolist() == has_supervised_byte(record)
        own = own_logprobs(model, [tokenizer.default_end or 0, *tokenizer.encode(record.document)])
        for token in np.flatnonzero(record.tokens.counts).tolist():
            check_row(record, token, own[token], 6, 0.01, atol=0.02)
    assert not verify_dump(folder, against_teacher=2)


def test_a_dump_that_stores_everything_stores_alternatives_as_float32(model: Path, tmp_path: Path) -> None:
    every = {"top_k": 256, "min_prob": 0}
    folder = dump(write_recipe(tmp_path, model, TEXTS[:1], tokens=every, **every))
    [record] = records_of(folder)
    tokenizer = ByteTokenizer.load(str(model))
    own = own_logprobs(model, [tokenizer.default_end or 0, *tokenizer.encode(record.document)])
    assert record.tokens is not None and not record_faults(record)
    for token, own_V in enumerate(own[:-1]):
        check_row(record, token, own_V, 256, 0.0, atol=1e-5)
    np.testing.assert_allclose(record.tokens.end_log_probs, own[:, tokenizer.default_end], atol=1e-5)
    assert not verify_dump(folder)


def test_tokens_of_a_chat_have_alternatives_in_its_turns_alone(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "qwen", "qwen")
    recipe = chats.write_recipe(tmp_path, model, [{"messages": messages} for messages in chats.CHATS])
    records = chats.dump(recipe, "dump.top_k=16", "dump.tokens.top_k=6", "dump.tokens.min_prob=0.01")
    tokenizer = ChatTokenizer.load(str(model))
    end = tokenizer.end_of_turn()
    for record, messages in zip(records, chats.CHATS, strict=True):
        assert record.tokens is not None and not record_faults(record)
        encoded = tokenizer.encode(messages)
        own = own_logprobs(model, encoded.tokens)
        found, at = record.tokens, 0
        for turn in encoded.turns:
            at += 1  # what lies before the turn
            assert (found.token_ids[at - 1], found.counts[at - 1]) == (-1, 0)
            said = encoded.tokens[turn.first : turn.last]
            assert found.token_ids[at : at + len(said)].tolist() == said
            for token in range(len(said)):
                check_row(record, at + token, own[turn.first - 1 + token], 6, 0.01, atol=0.02)
            ends = found.end_log_probs[at : at + len(said) + 1].astype(np.float64)
            np.testing.assert_allclose(ends, own[turn.first - 1 : turn.last, end], rtol=0.02, atol=0.02)
            at += len(said)
        assert np.isnan(found.end_log_probs[0]) and np.isfinite(found.end_log_probs[1:]).all()
    assert not verify_dump(tmp_path / "dump", against_teacher=2)


def test_bytes_are_those_of_a_dump_without_tokens_which_a_later_one_resumes_merges_and_keeps(
    model: Path, tmp_path: Path
) -> None:
    plain = dump(write_recipe(tmp_path / "plain", model, TEXTS[:6]))
    both = write_recipe(tmp_path / "both", model, TEXTS[:6], tokens=TOKENS)
    folder = dump(both)
    for without, record in zip(records_of(plain), records_of(folder), strict=True):
        assert without.tokens is None and record.symbols.tolist() == without.symbols.tolist()
        assert record.logprobs.tolist() == without.logprobs.tolist()
    before = content(folder)
    Manifest.load(folder).shards[0].path(folder).unlink()
    (folder / dump_files.VOCABULARY).unlink()
    assert verify_dump(folder)
    dump(both)
    assert content(folder) == before and not verify_dump(folder) and not dump_faults(folder)
    other = dump(write_recipe(tmp_path / "other", model, TEXTS[6:9], tokens=TOKENS))
    merge_dumps(tmp_path / "merged", [folder, other])
    assert not verify_dump(tmp_path / "merged") and read_vocabulary(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"tokens.top_k: None there, 6 here"):
        merge_dumps(tmp_path / "mixed", [plain, folder])
    with pytest.raises(ValueError, match=r"tokens.min_prob: None there, 0.01 here; tokens.top_k: None there, 6 here"):
        dump(tmp_path / "plain" / "recipe.yaml", "dump.tokens.top_k=6", "dump.tokens.min_prob=0.01")


def test_an_old_manifest_is_that_of_a_dump_without_tokens(model: Path, tmp_path: Path) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:3]))
    values = json.loads((folder / "manifest.json").read_text())
    assert values["schema_version"] == 3 and "tokens" not in values["identity"]
    assert not (folder / dump_files.VOCABULARY).exists()
    run_teacher(load_recipe(tmp_path / "recipe.yaml", ["dump.tokens=null"]))
    assert json.loads((folder / "manifest.json").read_text()) == values


def test_an_engine_that_lists_tokens_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:1], tokens=TOKENS)
    address = ["teacher.engine=openai", "placement.base_url=http://127.0.0.1:9/v1"]
    with pytest.raises(ValueError, match=r"openai lists the most probable tokens only.*dump.tokens needs"):
        run_teacher(load_recipe(recipe, address))


def test_alternatives_that_contradict_the_text_are_found(model: Path, tmp_path: Path) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:1], tokens=TOKENS))
    [record] = records_of(folder)
    assert record.tokens is not None
    vocabulary, found = read_vocabulary(folder), record.tokens
    assert not token_faults(record, vocabulary, len(vocabulary))
    [fault] = token_faults(record, vocabulary, int(found.ids.max()))
    assert "the teacher has" in fault
    least = found.log_probs.copy()
    least[int(found.ranks[0])] -= 5
    [fault] = token_faults(replace(record, tokens=replace(found, log_probs=least)))
    assert "token 0 has another probability among its alternatives" in fault
    vocabulary[int(found.token_ids[1])] = b"?"
    [fault] = token_faults(record, vocabulary)
    assert "token 1 is" in fault and "spells b'?'" in fault
    cut, token_ids = int(found.offsets[1]), np.where(np.arange(len(found.counts)) == 0, -1, found.token_ids)
    offsets = np.maximum(found.offsets - cut, 0)
    none = replace(found, offsets=offsets, ids=found.ids[cut:], log_probs=found.log_probs[cut:], token_ids=token_ids)
    assert "token 0 is supervised and has no alternatives" in token_faults(replace(record, tokens=none))
