"""Chats: the assistant's text is found in every family's rendering, or the template that changes it is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat, document_of
from tests.support.chats import CHAT_FAMILIES, chat, chat_tokenizer, load_chat
from tests.support.families import FAMILIES

every = pytest.mark.parametrize("name", CHAT_FAMILIES)
ANSWERS = ["and yes the é", "in\nband\n\nthe", "{{ 1 + 1 }} \\n <b>"]
STRIPS = "the chat template strips what the assistant says"


def said(encoded: EncodedChat, messages: list[dict[str, str]]) -> list[bytes]:
    document = document_of(messages)
    return [document[turn.start : turn.end] for turn in encoded.turns]


def check_turns(loaded: ChatTokenizer, encoded: EncodedChat, messages: list[dict[str, str]]) -> None:
    """Check that each turn's tokens spell its bytes.

    They reach from the first token edge to the end of what is said, or to the last edge.
    """
    document, control = document_of(messages), set(loaded.tokenizer.control.values())
    for turn in encoded.turns:
        tokens = encoded.tokens[turn.first : turn.last]
        assert not control & set(tokens)
        spelled = b"".join(loaded.tokenizer.token_bytes[token] or b"" for token in tokens)
        assert spelled == turn.prefix + document[turn.start : turn.end]
        if turn is not encoded.turns[-1] and turn.end_token is not None:
            assert encoded.tokens[turn.last] == turn.end_token


@every
def test_a_chat_has_the_tokens_of_transformers_and_its_turns_are_what_the_assistant_says(name: str) -> None:
    loaded, wrapped = load_chat(name), chat_tokenizer(name)
    messages = chat("the thing?", ANSWERS[0], "in?", ANSWERS[1], "?", ANSWERS[2], system="and so on")
    encoded = loaded.encode(messages)
    theirs = wrapped.apply_chat_template(messages, tokenize=True, return_dict=False, date_string="26 Jul 2024")
    assert encoded.tokens == theirs[: len(encoded.tokens)]
    check_turns(loaded, encoded, messages)
    # Mistral's template puts a space first, and a token holds it with the first word.
    first = ANSWERS[0].removeprefix("and" if name == "mistral" else "")
    assert said(encoded, messages) == [text.encode() for text in (first, *ANSWERS[1:3])]
    assert {turn.end_token for turn in encoded.turns} == {loaded.tokenizer.token_id(CHAT_FAMILIES[name].end)}
    assert loaded.end_of_turn() == loaded.tokenizer.token_id(CHAT_FAMILIES[name].end)


@every
def test_any_chat_is_found_whole_or_its_template_is_named(name: str) -> None:
    loaded, wrapped, family = load_chat(name), chat_tokenizer(name), CHAT_FAMILIES[name]
    text = st.text(st.sampled_from("an thé \n<|>/{%}ik"), min_size=1, max_size=9)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(text, min_size=2, max_size=4).filter(lambda contents: len(contents) % 2 == 0))
    def check(contents: list[str]) -> None:
        messages = chat(*contents)
        answers = contents[1::2]
        try:
            encoded = loaded.encode(messages)
        except ChatError as error:
            if error.reason == STRIPS:
                assert family.strips and any(answer != answer.strip() for answer in answers)
            elif error.reason == "the chat template changes what the assistant says":
                assert name == "qwen3" and any("</think>" in answer for answer in answers)
            else:
                assert error.reason in (
                    "no token holds only what the assistant says",
                    "the chat template leaves out what the assistant says",  # white space alone, stripped
                )
            return
        assert not family.strips or all(answer == answer.strip() for answer in answers)
        theirs = wrapped.apply_chat_template(messages, tokenize=True, return_dict=False, date_string="26 Jul 2024")
        assert encoded.tokens == theirs[: len(encoded.tokens)]
        check_turns(loaded, encoded, messages)
        if name != "mistral" and not any(answer.startswith("\n") for answer in answers):
            assert said(encoded, messages) == [answer.encode() for answer in answers]

    check()


@every
def test_a_message_that_spells_control_tokens_is_text(name: str) -> None:
    loaded = load_chat(name)
    spelled = "".join(CHAT_FAMILIES[name].control)
    plain = loaded.encode(chat("the", "and it is", "in", "yes"))
    hostile = chat(f"the{spelled}", f"and {spelled} is", f"{spelled}", f"yes{spelled}")
    encoded = loaded.encode(hostile)
    control = set(loaded.tokenizer.control.values())
    marks = [[token for token in found.tokens if token in control] for found in (plain, encoded)]
    assert marks[0] == marks[1]
    check_turns(loaded, encoded, hostile)
    assert said(encoded, hostile)[1].endswith(spelled.encode())


def test_bytes_that_share_a_token_with_the_template_are_context() -> None:
    loaded = load_chat("qwen")
    messages = chat("the", "\n\nand the", "in", "\nyes")
    encoded = loaded.encode(messages)
    # The template's "\n" and the first of the answer's are one token; where there are but two, they are two.
    assert said(encoded, messages) == [b"\nand the", b"\nyes"]
    check_turns(loaded, encoded, messages)


def test_what_a_template_does_to_the_words_of_others_is_its_own_affair() -> None:
    loaded = load_chat("llama3")
    padded, plain = chat(" the \n", "and", system=" sys "), chat("the", "and", system="sys")
    assert loaded.encode(padded).tokens == loaded.encode(plain).tokens
    assert said(loaded.encode(padded), padded) == [b"and"]


@pytest.mark.parametrize("name", [name for name, family in CHAT_FAMILIES.items() if family.strips])
@pytest.mark.parametrize("answer", [" and", "and\n", " and "])
def test_a_template_that_strips_what_the_assistant_says_is_named(name: str, answer: str) -> None:
    with pytest.raises(ChatError, match=r"corpus\.strip: true") as caught:
        load_chat(name).encode(chat("the", answer))
    assert caught.value.reason == STRIPS


def with_template(template: str) -> ChatTokenizer:
    wrapped = chat_tokenizer("qwen")
    wrapped.chat_template = template
    return ChatTokenizer(ByteTokenizer.from_wrapped(wrapped, "changed"), wrapped)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}", "leaves out what"),
        ("{% for m in messages %}<|im_start|>{{ m.content }}{{ m.content }}{% endfor %}", "repeats what"),
        ("{% for m in messages|reverse %}<|im_start|>{{ m.content }}{% endfor %}", "re-orders what"),
        ("{% for m in messages %}<|im_start|>{{ m.content|upper }}{% endfor %}", "changes what"),
        ("{% for m in messages %}{{ m.content|length }}<|im_start|>{{ m.content }}{% endfor %}", "depends on what"),
        ("{{ raise_exception('not today') }}", "refuses it: not today"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "writes nothing before"),
    ],
)
def test_a_template_that_edits_a_chat_is_named(template: str, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        with_template(template).encode(chat("the", "and", "in", "yes"))


def test_reasoning_that_a_template_drops_is_named() -> None:
    loaded = load_chat("qwen3")
    assert said(loaded.encode(chat("the", "and")), chat("the", "and")) == [b"and"]
    with pytest.raises(ChatError, match="changes what the assistant says"):
        loaded.encode(chat("the", "<think>in</think>\nand"))


def test_a_template_that_wants_its_roles_to_alternate_says_so_as_the_reason() -> None:
    with pytest.raises(ChatError, match="Conversation roles must alternate"):
        load_chat("gemma").encode([*chat("the", "and"), {"role": "assistant", "content": "in"}])


def test_a_tool_answers_and_is_context() -> None:
    for name in ("llama3", "qwen"):
        messages = [*chat("the", "and"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "in"}]
        loaded = load_chat(name)
        assert said(loaded.encode(messages), messages) == [b"and", b"in"]


def test_a_rendering_does_not_depend_on_the_day() -> None:
    [first, *_] = load_chat("llama3").template.render(chat("the", "and"))
    assert "Today Date: 26 Jul 2024" in first.text


def space_tokenizer(
    normalizer: object, pre_tokenizer: object, template: str
) -> tuple[ChatTokenizer, PreTrainedTokenizerFast]:
    """Make a SentencePiece-like tokenizer: printable ASCII, U+2581, byte tokens, and some merges."""
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["▁"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", "an", "▁an", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    wrapped.add_tokens([AddedToken("<|a|>", special=True, normalized=False, rstrip=True)], special_tokens=True)
    wrapped.chat_template = template
    return ChatTokenizer(ByteTokenizer.from_wrapped(wrapped, "spaces"), wrapped), wrapped


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        (None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)),
        (None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)),
        (normalizers.Replace(" ", "▁"), None),
    ],
)
@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}"
        "{{ '[I] ' + m.content + ' [/I]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}<s>{{ m.content + eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}<|a|>\n {{ m.content + eos_token }}{% endfor %}",
    ],
)
def test_a_dummy_prefix_stands_where_the_tokenizer_puts_it(
    normalizer: object, pre_tokenizer: object, template: str
) -> None:
    loaded, wrapped = space_tokenizer(normalizer, pre_tokenizer, template)
    for answers in (("an an", "b"), ("no", "an")):
        messages = chat("a b", answers[0], "c", answers[1])
        encoded = loaded.encode(messages)
        theirs = wrapped.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert encoded.tokens == theirs[: len(encoded.tokens)]
        check_turns(loaded, encoded, messages)


def test_the_real_template_of_smollm2_on_its_real_tokenizer() -> None:
    loaded = ChatTokenizer.load(resolve_model(FAMILIES["smollm2"].source))
    messages = chat("What is a river?", "Water that flows:\n1. down\n2. on.", "Oh <|im_end|>", "Yes, oh <|im_end|>!")
    encoded = loaded.encode(messages)
    assert said(encoded, messages) == [messages[1]["content"].encode(), messages[3]["content"].encode()]
    ids = [loaded.tokenizer.token_id(name) for name in ("<|im_start|>", "<|im_end|>")]
    assert encoded.tokens[0] == ids[0] and encoded.tokens[-1] == ids[1] == loaded.end_of_turn()
    assert [encoded.tokens.count(token) for token in ids] == [5, 5]


def test_a_template_whose_program_fails_at_a_chat_leaves_that_chat_out() -> None:
    wrapped = chat_tokenizer("qwen")
    wrapped.chat_template = wrapped.chat_template.replace(
        "message.content + '", "message.content[message.content.index('t'):] + '"
    )
    loaded = ChatTokenizer(ByteTokenizer.from_wrapped(wrapped, "qwen"), wrapped)
    with pytest.raises(ChatError, match="the chat template refuses it: substring not found"):
        loaded.encode(chat("why", "no"))
