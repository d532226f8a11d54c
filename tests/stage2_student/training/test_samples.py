"""Prompts of samples are what the student reads before a text, or before an assistant's turn."""

import pytest

from pipeline.config import SamplesConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.training.samples import Samples
from tests.support.chats import CHAT_FAMILIES, load_chat
from tests.support.tiny import tiny_tokenizer

CONFIG = SamplesConfig(prompts=("the thing?", "<|endoftext|> in"), every=10)


def test_a_prompt_is_text_after_the_start_token_also_where_it_spells_a_control_token() -> None:
    tokenizer = ByteTokenizer.from_wrapped(tiny_tokenizer(), "tiny")
    samples = Samples(CONFIG, tokenizer, None, SpecialIds(268, (268,)))
    assert [tokens[0] for tokens in samples.prompts] == [268, 268]
    for prompt, tokens in zip(CONFIG.prompts, samples.prompts, strict=True):
        assert 268 not in tokens[1:] and samples.text(tokens) == prompt
    assert samples.text([*samples.prompts[0][1:], 268]) == "the thing?"
    assert [step for step in range(1, 31) if samples.is_due(step, step == 25)] == [10, 20, 25, 30]


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_a_prompt_of_a_chat_is_what_the_template_writes_before_any_answer(name: str) -> None:
    chat = load_chat(name)
    samples = Samples(CONFIG, chat.tokenizer, chat, SpecialIds(0, (chat.end_of_turn() or 0,)))
    for prompt, tokens in zip(CONFIG.prompts, samples.prompts, strict=True):
        for answer in ("and yes", "in?", "7"):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            encoded = chat.encode(messages)
            assert encoded.tokens[: len(tokens)] == tokens
            assert len(tokens) <= encoded.turns[0].first <= len(tokens) + 1  # its first token may hold both
