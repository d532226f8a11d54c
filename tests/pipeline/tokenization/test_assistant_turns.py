"""Turns with reasoning and calls: what each model's own template writes for them, found exactly, or named."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tokenization.chat_template import TODAY, ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat
from pipeline.tokenization.conversation import Conversation, Excerpt
from tests.support.chat_turns import CALLED, REASONED, answer, load_turns, result, talk, turn_tokenizer, user

QWEN_CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "an \\"é\\"", "n": 3}}\n</tool_call>'
LLAMA_CALL = '{"name": "look", "parameters": {"where": "an \\"é\\"", "n": 3}}'
CALLS = {  # what each writes for the call of CALLED, control tokens taken out, and how many records its turns take
    "qwen2_5": (QWEN_CALL, 1),
    "qwen3": (QWEN_CALL, 3),  # the last turn alone has an empty reasoning before it
    "qwen3_instruct_2507": (QWEN_CALL, 1),
    "llama3_1": (LLAMA_CALL, 1),
    "llama3_2": (LLAMA_CALL, 1),
    "mistral": (' [{"name": "look", "arguments": {"where": "an \\"é\\"", "n": 3}, "id": "call00000"}]', 2),
    "lfm2_2_5": ("[look(where='an \"é\"', n=3)]", 1),
    "gptoss": (' to=functions.lookcommentary json{"where": "an \\"é\\"", "n": 3}', 2),
    "nemotron_3_nano": (
        '\n<tool_call>\n<function=look>\n<parameter=where>\nan "é"\n</parameter>\n'
        "<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>\n",
        1,
    ),
    "smollm3": ('<tool_call>{"name": "look", "arguments": {"where": "an \\"é\\"", "n": 3}}</tool_call>', 1),
}
REASONS = {  # and for the first turn of REASONED, and its record's number of turns
    "qwen3": "<think>\nin and\n</think>\n\nand yes é",
    "smollm3": "<think>\nin and\n</think>\n\nand yes é",
    "lfm2_2_5": "<think>in and</think>and yes é",
    "nemotron_3_nano": "in and\n</think>\nand yes é",  # its prompt for a turn ends with <think>
    "gptoss": "analysisin andassistantfinaland yes é",  # with control tokens between
}


def spoken(chat: ChatTokenizer, conversation: Conversation) -> list[list[str]]:
    """Return what is supervised of each record, for each message of the assistant."""
    found = []
    for excerpt in chat.excerpts(conversation):
        encoded = chat.encode(excerpt)
        check_tokens(chat, excerpt, encoded)
        said = zip(excerpt.messages, encoded.contents, strict=True)
        found.append([content.decode() for message, content in said if message["role"] == "assistant"])
    return found


def check_tokens(chat: ChatTokenizer, excerpt: Excerpt, encoded: EncodedChat) -> None:
    """Check that each turn's tokens spell its bytes, without control tokens.

    Together they are everything that the assistant says.
    """
    document, control = b"".join(encoded.contents), set(chat.tokenizer.control.values())
    covered = []
    for turn in encoded.turns:
        tokens = encoded.tokens[turn.first : turn.last]
        assert not control & set(tokens)
        spelled = b"".join(chat.tokenizer.token_bytes[token] or b"" for token in tokens)
        assert spelled == turn.prefix + document[turn.start : turn.end]
        covered += range(turn.start, turn.end)
    starts = [sum(map(len, encoded.contents[:i])) for i in range(len(encoded.contents) + 1)]
    said = [
        at
        for index, message in enumerate(excerpt.messages)
        if message["role"] == "assistant"
        for at in range(starts[index], starts[index + 1])
    ]
    assert covered == said  # with this tokenizer no token holds bytes of both a turn and its surroundings


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_supervised_as_the_models_own_template_writes_it(name: str) -> None:
    text, num_records = CALLS[name]
    found = spoken(load_turns(name), CALLED)
    assert found[0][0] == text and len(found) == num_records
    final = "final" if name == "gptoss" else " " if name == "mistral" else ""
    assert [said for record in found for said in record][1:] == [f"{final}yes, 7", f"{final}no"]


@pytest.mark.parametrize("name", REASONS)
def test_reasoning_is_supervised_as_the_models_own_template_writes_it(name: str) -> None:
    found = [said for record in spoken(load_turns(name), REASONED) for said in record]
    assert found[0] == REASONS[name]
    assert found[1] == REASONS[name].replace("in and", "so").replace("and yes é", "no")
    assert found[2] == (
        "finalthing" if name == "gptoss" else "thing"
    )  # an empty reasoning, where one is written, is the prompt's


def test_each_turn_of_qwen3_is_seen_as_the_model_saw_it_and_none_twice() -> None:
    chat = load_turns("qwen3")
    excerpts = chat.excerpts(REASONED)
    assert [len(excerpt.conversation.messages) for excerpt in excerpts] == [2, 4, 6]
    assert [excerpt.num_messages for excerpt in excerpts] == [2, 2, 2]
    for excerpt in excerpts:
        tokens = chat.encode(excerpt).tokens
        text = "".join(chat.tokenizer._encoder.decode([token], skip_special_tokens=False) for token in tokens)
        assert text.count("<think>") == 1  # its own; those before are dropped
    tools = talk(
        user("the?"),
        answer("", "in", n=1),
        result("7"),
        answer("yes", "and"),
        user("in?"),
        answer("no", "so"),
        tools=True,
    )
    # Within one question earlier reasoning stays, so that one rendering serves both steps.
    assert [excerpt.num_messages for excerpt in chat.excerpts(tools)] == [4, 2]


@pytest.mark.parametrize("name", CALLS)
def test_a_record_has_the_tokens_of_transformers(name: str) -> None:
    chat, wrapped = load_turns(name), turn_tokenizer(name)
    for conversation in (CALLED, REASONED) if name in REASONS else (CALLED,):
        for excerpt in chat.excerpts(conversation):
            asked = excerpt.conversation
            reasons = bool(asked.messages[-1].get("reasoning"))
            messages: list[Any] = chat.beyond_contents(asked) and chat.turn_template.forms.messages(asked)
            theirs = wrapped.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in asked.tools] or None,
                return_dict=False,
                enable_thinking=reasons,
                thinking=reasons,
                strftime_now=TODAY.strftime,
            )
            tokens = chat.encode(excerpt).tokens
            assert tokens == theirs[: len(tokens)]


@pytest.mark.parametrize(
    ("name", "conversation", "reason"),
    [
        ("llama3_1", REASONED, "leaves out the reasoning"),
        ("deepseek_r1_distill", REASONED, "leaves out the reasoning"),
        ("qwen2_5", REASONED, "leaves out the reasoning"),
        ("gemma3", CALLED, "leaves out calls of tools"),
        ("deepseekv3", CALLED, "leaves out the tools"),
        ("llama3_1", talk(user("the"), answer("and", n=1), tools=True), "leaves out what the assistant says"),
        ("glm4moe", CALLED, "no control token after"),
        (
            "gptoss",  # it drops the call's reasoning once there is an answer, but not in the prompt for it
            talk(user("the"), answer("", "in", n=1), result("7"), answer("yes"), tools=True),
            "begins a turn otherwise",
        ),
    ],
)
def test_what_a_template_does_not_write_is_named(name: str, conversation: Conversation, reason: str) -> None:
    with pytest.raises(ChatError, match=reason) as caught:
        load_turns(name).excerpts(conversation)
    assert len(caught.value.reason) < 90 and "'" not in caught.value.reason


def test_a_prompt_that_begins_a_reasoning_which_the_turn_lacks_is_no_part_of_the_turn() -> None:
    chat = load_turns("deepseek_r1_distill")
    found = spoken(chat, talk(user("the"), answer("", n=1), user("in"), answer("and")))
    assert found[0] == ['functionlook\n```json\n{"n": 1}\n```', "and"]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "mistral", "smollm3", "gptoss"])
def test_text_that_spells_control_tokens_is_text_wherever_it_stands(name: str) -> None:
    chat = load_turns(name)
    control = chat.tokenizer.control
    marks = "".join(control)
    reasoning = f"{marks} so" if name in REASONS else ""
    plain = talk(
        user("the?"), answer("", where="x"), result("7"), user("a"), answer("no", "so" if reasoning else ""), tools=True
    )
    hostile = talk(
        user(f"the {marks}?"),
        answer("", where=f"x{marks}"),
        result(f"7{marks}"),
        user("a"),
        answer(f"no{marks}", reasoning),
        tools=True,
    )
    hostile = replace(
        hostile, tools=({**hostile.tools[0], "function": {**hostile.tools[0]["function"], "description": marks}},)
    )

    def written(conversation: Conversation) -> list[list[int]]:
        encodings = [chat.encode(excerpt) for excerpt in chat.excerpts(conversation)]
        return [[token for token in encoded.tokens if token in set(control.values())] for encoded in encodings]

    assert written(hostile) == written(plain)
    said = [text for record in spoken(chat, hostile) for text in record]
    assert (f"x{marks}" in said[0]) and said[-1].endswith(f"no{marks}") and (reasoning in said[-1])


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "llama3_1"])
def test_any_call_is_found_whole_or_named(name: str) -> None:
    chat = load_turns(name)
    text = st.text(st.sampled_from('an thé \n<|>/{%}ik"\\'), max_size=9)
    values = st.recursive(
        text | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=4
    )

    @settings(max_examples=40, deadline=None)
    @given(st.dictionaries(text, values, min_size=1, max_size=3), text)
    def check(arguments: dict[str, Any], content: str) -> None:
        call = {"id": "call_number_0", "name": "look", "arguments": arguments}
        called = {"role": "assistant", "content": "" if name == "llama3_1" else content, "tool_calls": [call]}
        conversation = talk(user("the?"), called, result("7"), answer("no"), tools=True)
        try:
            found = spoken(chat, conversation)
        except ChatError as error:
            assert error.reason == "the chat template changes what the assistant says" and "</think>" in content
            return
        key = "parameters" if name == "llama3_1" else "arguments"
        assert f'"{key}": {json.dumps(arguments, ensure_ascii=False)}' in found[0][0] and content.strip() in (
            content if name == "llama3_1" else found[0][0]
        )

    check()


def test_students_of_another_template_find_the_same_turns_or_name_the_difference() -> None:
    qwen2, qwen3, llama = (load_turns(name) for name in ("qwen2_5", "qwen3", "llama3_1"))
    [record] = qwen2.excerpts(CALLED)
    assert qwen3.encode(record).contents == qwen2.encode(record).contents  # in one rendering, as the record is one
    check_tokens(qwen3, record, qwen3.encode(record))
    assert llama.encode(record).contents != qwen2.encode(record).contents
    whole = Excerpt(REASONED, 6)
    with pytest.raises(ChatError, match="writes an earlier turn otherwise once the chat goes on"):
        qwen3.encode(whole)
