"""Chats with reasoning and calls dumped: a turn's targets are the model's own at that turn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import Recipe
from pipeline.config.loading import load_recipe
from pipeline.corpus.digest import document_digest
from pipeline.corpus.documents import Document
from pipeline.dumps.view import find_document
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation, Excerpt, chat_of
from schemas.manifest import Manifest
from schemas.record_checks import record_faults
from schemas.shard import read_record_texts, read_shard
from stage1_teacher.dump.merge import merge_dumps
from stage1_teacher.inputs.turn_windows import cut_conversation
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.records import make_records
from stage1_teacher.targets.resolved import load_tokenizer, resolve_ids
from stage1_teacher.verification.verify import verify_dump
from tests.scenarios.test_chat_dump import dump, write_recipe
from tests.support import brute_force
from tests.support.chat_turns import CALLED, REASONED, answer, result, talk, turn_model, turn_tokenizer, user
from tests.support.chats import chat


def row(conversation: Conversation) -> dict[str, Any]:
    """Return the conversation in a data set's form."""
    messages = []
    for message in conversation.messages:
        made = {key: value for key, value in message.items() if key not in ("reasoning", "tool_calls")}
        if message.get("reasoning"):
            made["reasoning_content"] = message["reasoning"]
        if message.get("tool_calls"):
            made["content"] = message["content"] or None
            made["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
                }
                for call in message["tool_calls"]
            ]
        messages.append(made)
    return {"messages": messages, "tools": list(conversation.tools)}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return turn_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def expected_targets(model: Path, excerpt: Excerpt, text: bytes) -> np.ndarray:
    """Compute the targets of the excerpt's one turn by brute force in float64.

    They follow transformers' own rendering of the prompt.
    """
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    wrapped = turn_tokenizer("qwen3")
    messages = []
    for message in excerpt.conversation.messages:
        made = {key: value for key, value in message.items() if key != "tool_calls"}
        made |= {"reasoning_content": message["reasoning"]} if message.get("reasoning") else {}
        made["tool_calls"] = [{"function": call} for call in message.get("tool_calls", ())]
        messages.append(made)
    tools = [dict(tool) for tool in excerpt.conversation.tools] or None
    reasons = bool(messages[-1].get("reasoning"))
    prompt = wrapped.apply_chat_template(
        messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False, enable_thinking=reasons
    )
    rendered = wrapped.apply_chat_template(messages, tools=tools, tokenize=False)
    assert rendered == f"{prompt}{text.decode()}<|im_end|>\n"
    encoded = wrapped(rendered, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    context = [token for token, (_, end) in spans if end <= len(prompt)]
    tokens = [
        token for token, (start, end) in spans if start >= len(prompt) and end <= len(prompt) + len(text.decode())
    ]

    with torch.no_grad():
        probs_RV = whole(torch.tensor([[*context, *tokens]])).logits[0, len(context) - 1 :].softmax(-1).numpy()

    def probs(path: tuple[int, ...]) -> np.ndarray:
        assert path == tuple(tokens[: len(path)])
        found: np.ndarray = probs_RV[len(path)]
        return found

    tokenizer = ChatTokenizer.load(str(model)).tokenizer
    return brute_force.canonical_targets(probs, tokenizer.token_bytes, {tokenizer.token_id("<|im_end|>")}, tokens, text)


@pytest.mark.parametrize("conversation", [REASONED, CALLED], ids=["reasoned", "called"])
def test_targets_of_qwen3s_turns_equal_brute_force_on_the_prompt_that_the_model_had(
    conversation: Conversation, qwen3: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, qwen3, []), [])
    check_targets(recipe, conversation)


def check_targets(recipe: Recipe, conversation: Conversation) -> None:
    named = load_tokenizer(recipe)
    assert named.chat is not None
    _, ends = resolve_ids(recipe, named.tokenizer, named.chat)
    windows = cut_conversation("c", conversation, named.chat, ends, 1024)
    assert len(windows) == 3
    teacher = open_teacher(recipe, *named)
    output = teacher.run_engine(windows)
    found = [targets.probs_PV for targets in teacher.targets(windows, output)]
    for ours, window in zip(found, windows, strict=True):
        excerpt = Excerpt(Conversation.from_json(window.conversation), len(window.roles))
        [span] = window.spans
        theirs = expected_targets(Path(named.model), excerpt, span.covered_bytes)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    for record in make_records(windows, output, teacher, recipe.dump):
        assert record_faults(record) == []
    teacher.engine.close()


def test_a_dump_holds_each_turn_once_with_what_the_template_was_given(qwen3: Path, tmp_path: Path) -> None:
    plain = {"messages": chat("the?", "and")}
    inside = {"messages": chat("the?", "<think>\nin\n</think>\n\nand", "in?", "<think>so</think>no")}
    recipe = write_recipe(tmp_path, qwen3, [row(REASONED), plain, row(CALLED), inside])
    records = dump(recipe, "teacher.max_tokens=1024")
    texts = [record.document[s.start : s.start + s.length].decode() for record in records for s in record.segments]
    call = '<tool_call>\n{"name": "look", "arguments": {"where": "an \\"é\\"", "n": 3}}\n</tool_call>'
    reasoned = ["<think>\nin and\n</think>\n\nand yes é", "<think>\nso\n</think>\n\nno", "thing"]
    rest = ["and", call, "yes, 7", "no", "<think>\nin\n</think>\n\nand", "<think>\nso\n</think>\n\nno"]
    assert texts == reasoned + rest
    assert all(segment.has_end for record in records for segment in record.segments)
    assert [record.doc_id for record in records] == ["0"] * 3 + ["1"] + ["2"] * 3 + ["3"] * 2
    assert [bool(record.conversation) for record in records] == [True] * 3 + [False] + [True] * 5
    part = chat_of(records[2])
    assert isinstance(part, Excerpt) and part.conversation == REASONED and part.num_messages == 2
    assert verify_dump(tmp_path / "dump", against_teacher=4) == []
    manifest = Manifest.load(tmp_path / "dump")
    assert manifest.identity["corpus"]["turns"] == "rendered" and manifest.identity["corpus"]["reasoning"] == "keep"
    asked = [q for shard in manifest.shards for q in read_record_texts(shard.path(tmp_path / "dump"))]
    assert [q.conversation for q in asked] == [record.conversation for record in records]
    shown = find_document(tmp_path / "dump", "0")
    assert [m.role for m in shown.messages] == ["user", "assistant"] * 3 and shown.messages[
        1
    ].content.decode() == reasoned[0]


def test_reasoning_is_dropped_before_the_template_sees_it(qwen3: Path, tmp_path: Path) -> None:
    records = dump(write_recipe(tmp_path, qwen3, [row(REASONED)], reasoning="drop"))
    assert [record.messages for record in records] == [chat("the?", "and yes é", "in?", "no", "the", "thing")]
    assert records[0].conversation == ""


def test_what_the_template_does_not_write_is_left_out_with_the_way_out(tmp_path: Path) -> None:
    model = turn_model(tmp_path / "model", "llama3_1")
    broken = {
        "messages": [user("the"), {"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "{"}]}]
    }
    recipe = write_recipe(tmp_path, model, [row(CALLED), row(REASONED), broken])
    [record] = dump(recipe, "teacher.max_tokens=1024")
    assert b'{"name": "look", "parameters": {"where"' in record.document and len(record.segments) == 3
    summary = json.loads((tmp_path / "dump" / "summary.json").read_text(encoding="utf-8"))
    assert "drop it with corpus.reasoning: drop" in summary["left_out_unspellable"]["1"]
    assert summary["left_out_by_corpus"] == {"left out: a tool call's arguments are not JSON": 1}


def test_a_long_conversation_starts_later_with_its_tools_and_supervises_each_turn_once(
    qwen3: Path, tmp_path: Path
) -> None:
    turns = [m for i in range(8) for m in (user(f"the {i}?" + " and" * 9), answer(f"in {i}", "thing, " * i))]
    whole = talk({"role": "system", "content": "so"}, *turns)
    records = dump(write_recipe(tmp_path, qwen3, [row(whole)]), "teacher.max_tokens=200", "teacher.overlap_tokens=40")
    said = [record.document[s.start : s.start + s.length].decode() for record in records for s in record.segments]
    assert [text.split("\n\n")[-1] for text in said] == [f"in {i}" for i in range(8)]
    parts = [Conversation.from_json(record.conversation) for record in records]
    assert all(part.messages[0]["content"] == "so" for part in parts)
    assert len(parts[-1].messages) < len(whole.messages) and parts[-1].messages[1]["role"] == "user"
    at = 0
    for record in records:  # after one another, without a gap
        assert record.window_start == at and record_faults(record) == []
        at += len(record.document)
    assert verify_dump(tmp_path / "dump", against_teacher=1) == []


def test_a_dump_of_turns_in_windows_that_grows_has_the_very_files_of_one_made_at_once(
    qwen3: Path, tmp_path: Path
) -> None:
    turns = [m for i in range(6) for m in (user(f"the {i}?" + " and" * 9), answer(f"in {i}", "thing, " * i))]
    rows = [row(REASONED), {"messages": chat("the?", "and" * 9)}, row(talk(*turns)), row(CALLED), row(talk(*turns[:4]))]
    options = ("teacher.max_tokens=300", "teacher.overlap_tokens=40", "dump.audit_documents=0")
    dump(write_recipe(tmp_path / "once", qwen3, rows), *options)
    for size in (1, 3, 5):
        records = dump(write_recipe(tmp_path / "grown", qwen3, rows[:size]), *options)
    once, grown = tmp_path / "once" / "dump", tmp_path / "grown" / "dump"
    assert sum(record.window_start > 0 for record in records) > 6
    assert Manifest.load(grown) == Manifest.load(once) and verify_dump(grown) == []
    assert [f.read_bytes() for f in sorted((grown / "shards").iterdir())] == [
        f.read_bytes() for f in sorted((once / "shards").iterdir())
    ]


def test_a_dump_of_contents_alone_goes_on_as_it_was_begun(
    qwen3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": chat("the?", f"and {i}")} for i in range(4)]
    rows.insert(1, row(CALLED))
    recipe = write_recipe(tmp_path, qwen3, rows)
    dump(recipe, "corpus.turns=contents")  # writes what a release without `corpus.turns` wrote
    folder = tmp_path / "dump"
    manifest = Manifest.load(folder)
    assert set(manifest.identity["corpus"]) == {"sha256", "field"}
    assert manifest.corpus_counts["left out: a message has no role and content that are text"] == 1
    lost = manifest.shards[0].path(folder)
    before = lost.read_bytes()
    lost.unlink()
    caplog.clear()
    dump(recipe)
    assert lost.read_bytes() == before and "continues with contents alone, as it was begun" in caplog.text
    with pytest.raises(ValueError, match=r"corpus\.turns: None there, 'rendered' here"):
        dump(recipe, "corpus.turns=rendered")


def test_the_plan_knows_a_plain_chat_as_earlier_releases_did() -> None:
    document = Document("7", b"and", tuple(chat("the?", "and")))
    assert document_digest(document).hex() == "fbe3a81a7107d5ec75f0808200058f5d7ba53cb550bbf716ea330d394397f406"


def test_dumps_are_merged_only_where_their_turns_are_read_alike(qwen3: Path, tmp_path: Path) -> None:
    for name, rows in (("a", [row(CALLED)]), ("b", [row(REASONED)])):
        dump(write_recipe(tmp_path / name, qwen3, rows))
    dump(write_recipe(tmp_path / "c", qwen3, [{"messages": chat("the?", "in")}]), "corpus.turns=contents")
    folders = [tmp_path / name / "dump" for name in "abc"]
    merge_dumps(tmp_path / "merged", folders[:2])
    assert verify_dump(tmp_path / "merged") == []
    with pytest.raises(ValueError, match=r"corpus\.turns"):
        merge_dumps(tmp_path / "other", folders[1:])


def test_a_damaged_conversation_is_named(qwen3: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    [record, *_] = dump(write_recipe(tmp_path, qwen3, [row(talk(user("the?"), answer("and", n=1), result("7")))]))
    assert record_faults(record) == []
    for conversation in ("{", "[]", '{"messages":[{"role":"user","content":"x"}]}'):
        assert record_faults(replace(record, conversation=conversation)) == [
            "its conversation does not end with its messages"
        ]
    shard = Manifest.load(tmp_path / "dump").shards[0].path(tmp_path / "dump")
    assert len(list(read_shard(shard))) == 1


def test_of_a_conversation_in_several_windows_the_last_turn_alone_is_supervised(qwen3: Path, tmp_path: Path) -> None:
    rows = [row(talk(user("the?"), answer("and", reasoning="in"), user("or?"), answer("a thing", reasoning="an")))]
    whole = dump(write_recipe(tmp_path / "whole", qwen3, rows))
    last = dump(write_recipe(tmp_path / "last", qwen3, rows, supervise={"turns": "last"}))
    assert verify_dump(tmp_path / "last" / "dump") == []
    assert [record.document for record in last] == [record.document for record in whole]
    assert len(last) > 1, "a template that drops earlier reasoning takes a window for each turn"
    assert [len(record.segments) for record in last[:-1]] == [0] * (len(last) - 1)
    assert last[-1].segments == whole[-1].segments
    np.testing.assert_array_equal(last[-1].logprobs, whole[-1].logprobs)
