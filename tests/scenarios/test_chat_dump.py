"""Chats dumped: a turn's targets are the covering's, with the rendered chat before it as context."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.dumps.view import find_document
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, document_of
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.record_checks import record_faults
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.inputs.chat_windows import Learned, cut_chat
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.records import make_records
from stage1_teacher.targets.resolved import load_tokenizer, resolve_ids
from stage1_teacher.verification.verify import verify_dump
from tests.support import brute_force
from tests.support.chats import CHAT_FAMILIES, chat, chat_model

EXACT = {"beam_width": 1000, "branch_threshold": 0, "rejoin_after_tokens": None}
CHATS = [
    chat("the thing?", "and yes é", "in?", "an\nand"),
    chat("the", "ing", system="and so"),
    chat("in <|im_end|>", "the"),
]


def write_recipe(folder: Path, model: Path, rows: list[Any], **corpus: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    teacher = {"model": str(model), "engine": "transformers", "dtype": "float32", "max_tokens": 256}
    recipe = {
        "corpus": {"source": str(source), "field": "messages"} | corpus,
        "teacher": teacher | {"overlap_tokens": 8},
        "dump": {"path": str(folder / "dump"), "shard_bytes": 30, "top_k": 256, "min_prob": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def dump(recipe: Path, *overrides: str) -> list[Record]:
    run_teacher(load_recipe(recipe, list(overrides)))
    folder = recipe.parent / "dump"
    return [record for shard in Manifest.load(folder).shards for record in read_shard(shard.path(folder))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("qwen"), "qwen")


def expected_targets(model: Path, chat_tokenizer: ChatTokenizer, messages: Any, exact: bool) -> list[np.ndarray]:
    """Compute each turn's targets by brute force in float64: its tokens' paths after the tokens before it."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    encoded, tokenizer = chat_tokenizer.encode(messages), chat_tokenizer.tokenizer
    end = chat_tokenizer.end_of_turn()
    assert end is not None
    found = []
    for turn in encoded.turns:

        def probs(path: tuple[int, ...], context: list[int] = encoded.tokens[: turn.first]) -> np.ndarray:
            with torch.no_grad():
                return whole(torch.tensor([[*context, *path]])).logits[0, -1].softmax(-1).numpy()

        said = document_of(messages)[turn.start : turn.end]
        tokens = encoded.tokens[turn.first : turn.last]
        found.append(
            brute_force.all_targets(probs, tokenizer.token_bytes, {end}, said)
            if exact
            else brute_force.canonical_targets(probs, tokenizer.token_bytes, {end}, tokens, said)
        )
    return found


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_targets_of_a_turn_equal_brute_force_with_the_rendered_chat_as_context(name: str, tmp_path: Path) -> None:
    model = chat_model(tmp_path / name, name)
    recipe = load_recipe(write_recipe(tmp_path, model, []), [])
    check_targets(recipe, [CHATS[0], CHATS[2]], exact=False)


def test_branch_rows_of_a_turn_give_its_exact_distribution(model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, model, []), [])
    recipe = Recipe.model_validate(recipe.model_dump() | {"dump": recipe.dump.model_dump() | {"covering": EXACT}})
    check_targets(recipe, [chat("the", "the", "in", " and"), chat("?", "in")], exact=True)


def check_targets(recipe: Recipe, chats: list[Any], exact: bool) -> None:
    named = load_tokenizer(recipe)
    assert named.chat is not None
    _, ends = resolve_ids(recipe, named.tokenizer, named.chat)
    windows = [cut_chat(str(i), messages, named.chat, ends, 256)[0] for i, messages in enumerate(chats)]
    teacher = open_teacher(recipe, *named)
    output = teacher.run_engine(windows)
    found = [targets.probs_PV for targets in teacher.targets(windows, output)]
    expected = [
        targets for messages in chats for targets in expected_targets(Path(named.model), named.chat, messages, exact)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    for record, messages in zip(make_records(windows, output, teacher, recipe.dump), chats, strict=True):
        assert record_faults(record) == [] and record.messages == messages and record.document == document_of(messages)
    teacher.engine.close()


def test_a_dump_of_chats_holds_every_turn_and_verifies(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, [{"messages": messages} for messages in CHATS])
    records = dump(recipe)
    assert [record.messages for record in records] == CHATS
    for record in records:
        said = [m["content"].encode() for m in record.messages if m["role"] == "assistant"]
        assert [record.document[s.start : s.start + s.length] for s in record.segments] == said
        assert all(segment.has_end for segment in record.segments)
        assert sum(record.teacher_token_lengths) == len(record.document)
        edges = [0, *np.cumsum(record.teacher_token_lengths).tolist()]
        inside = [any(s.start <= at < s.start + s.length for s in record.segments) for at in edges[:-1]]
        assert [value < 0 for value in record.teacher_token_logprobs] == inside
    assert verify_dump(tmp_path / "dump", against_teacher=2) == []
    manifest = Manifest.load(tmp_path / "dump")
    assert manifest.has_chats and manifest.identity["teacher"]["start_id"] is None
    audit = json.loads((tmp_path / "dump" / "audit.json").read_text(encoding="utf-8"))
    assert audit["documents"] == 1 and audit["wide_covering"]["positions"] > 0


def test_a_dump_with_another_template_is_refused_by_name(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model", "qwen")
    recipe = write_recipe(tmp_path, model, [{"messages": CHATS[1]}])
    dump(recipe)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("helpful", "useful"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds another dump: teacher\.template_sha256"):
        dump(recipe)


def test_a_change_in_what_the_user_says_is_another_corpus(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, [{"messages": chat("the", "and")}])
    dump(recipe)
    write_recipe(tmp_path, model, [{"messages": chat("in", "and")}])
    with pytest.raises(ValueError, match=r"corpus\.sha256"):
        dump(recipe)


def test_chats_made_of_columns_are_dumped_like_messages(model: Path, tmp_path: Path) -> None:
    rows = [{"problem": "the thing?", "generated_solution": "and"}, {"problem": 7, "generated_solution": "in"}]
    columns = {"user": "problem", "assistant": "generated_solution"}
    [record] = dump(write_recipe(tmp_path, model, rows, field="text", messages=columns))
    assert record.messages == chat("the thing?", "and")


def test_chats_that_a_template_changes_are_left_out_by_name_unless_the_corpus_is_stripped(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model", "gemma")
    rows = [{"messages": chat("the", answer)} for answer in ("and", " and\n", "in")]
    rows.append({"messages": chat("the" * 300, "and")})
    records = dump(write_recipe(tmp_path / "as-it-is", model, rows))
    summary = json.loads((tmp_path / "as-it-is" / "dump" / "summary.json").read_text(encoding="utf-8"))
    assert [record.doc_id for record in records] == ["0", "2"]
    assert "strips what the assistant says" in summary["left_out_unspellable"]["1"]
    assert summary["left_out_unspellable"]["3"] == "a turn and what it answers are longer than teacher.max_tokens"
    assert verify_dump(tmp_path / "as-it-is" / "dump") == []
    records = dump(write_recipe(tmp_path / "stripped", model, rows, strip=True))
    assert [record.doc_id for record in records] == ["0", "1", "2"]
    assert records[1].messages == chat("the", "and")


def test_an_end_that_is_not_the_templates_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, [{"messages": CHATS[1]}])
    with pytest.raises(ValueError, match=r"ends the assistant's turn with <\|im_end\|>"):
        dump(recipe, 'teacher.end=["<|endoftext|>"]')


def test_a_teacher_without_a_template_is_refused(tmp_path: Path) -> None:
    from tests.support.tiny import tiny_model

    recipe = write_recipe(tmp_path, tiny_model(tmp_path / "plain"), [{"messages": CHATS[1]}])
    with pytest.raises(ValueError, match="has no chat template"):
        dump(recipe)


def test_a_long_chat_is_cut_between_messages_and_each_turn_is_supervised_once(model: Path, tmp_path: Path) -> None:
    contents = [
        text for i in range(9) for text in (f"the {i}? " + "and " * 5 * (i % 3), f"in {i}: " + "thing, " * (i + 1))
    ]
    messages = chat(*contents, system="and so")
    recipe = write_recipe(tmp_path, model, [{"messages": messages}, {"messages": CHATS[0]}])
    records = dump(recipe, "teacher.max_tokens=160", "teacher.overlap_tokens=40")
    windows = [record for record in records if record.doc_id == "0"]
    assert len(windows) > 2 and [record.doc_id for record in records] == ["0"] * len(windows) + ["1"]
    said = [record.document[s.start : s.start + s.length].decode() for record in windows for s in record.segments]
    assert said == contents[1::2] and all(s.has_end for record in windows for s in record.segments)
    whole = document_of(messages)
    for record in windows:
        assert whole[record.window_start :].startswith(record.document) and record_faults(record) == []
        assert record.messages == [m for m in messages if m in record.messages]
        assert record.message_roles[0] == ("user" if record.window_start else "system")
        assert record.message_roles[-1] == "assistant"
    later = [record.segments[0].start > record.message_lengths[0] for record in windows[1:]]
    assert any(later)  # with a turn of context
    assert verify_dump(tmp_path / "dump", against_teacher=2) == []
    shown = find_document(tmp_path / "dump", "0")
    assert [(m.role, m.content.decode()) for m in shown.messages] == [(m["role"], m["content"]) for m in messages]
    assert shown.text == whole


def test_of_a_chat_supervised_in_its_last_turn_the_dump_holds_what_that_of_the_whole_chat_holds_there(
    model: Path, tmp_path: Path
) -> None:
    rows = [{"messages": messages} for messages in CHATS]
    whole = dump(write_recipe(tmp_path / "whole", model, rows))
    last = dump(write_recipe(tmp_path / "last", model, rows, supervise={"turns": "last"}))
    assert verify_dump(tmp_path / "last" / "dump", against_teacher=3) == []
    assert [record.document for record in last] == [record.document for record in whole]
    assert sum(len(record.segments) for record in whole) > len(last)
    for of_whole, of_last in zip(whole, last, strict=True):
        assert of_last.segments == of_whole.segments[-1:]
        num_positions = of_last.num_positions
        np.testing.assert_array_equal(of_last.entry_counts, of_whole.entry_counts[-num_positions:])
        np.testing.assert_array_equal(of_last.logprobs, of_whole.logprobs[-len(of_last.logprobs) :])
        np.testing.assert_array_equal(of_last.doubt, of_whole.doubt[-num_positions:])


def test_a_turn_that_was_cut_off_has_no_end(model: Path, tmp_path: Path) -> None:
    named = load_tokenizer(load_recipe(write_recipe(tmp_path, model, []), []))
    assert named.chat is not None
    ends = (named.chat.end_of_turn(),)
    for max_tokens in (256, 65):  # in one window, and in several
        for learned, expected in (
            (None, [True, True]),
            (Learned(frozenset([1, 3]), False), [True, False]),
            (Learned(frozenset([3]), True), [True]),
        ):
            windows = cut_chat("0", CHATS[0], named.chat, ends, max_tokens, learned=learned)
            assert (len(windows) > 1) == (max_tokens == 65)
            assert [segment.has_end for window in windows for segment in window.segments] == expected
