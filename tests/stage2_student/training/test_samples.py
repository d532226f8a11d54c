"""Prompts of samples are what the student reads before a text, or before an assistant's turn."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import SamplesConfig, TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_template import TODAY
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.model.student import Student
from stage2_student.training.samples import FILE, Samples
from tests.support.chat_turns import load_turns, turn_tokenizer, user
from tests.support.chats import load_chat
from tests.support.tiny import tiny_model, tiny_tokenizer

IDS = SpecialIds(268, (268,))
CONFIG = SamplesConfig(prompts=("the thing?", "<|endoftext|> in"), every=10)


def test_a_prompt_is_text_after_the_start_token_also_where_it_spells_a_control_token() -> None:
    tokenizer = ByteTokenizer.from_wrapped(tiny_tokenizer(), "tiny")
    samples = Samples(CONFIG, tokenizer, None, IDS)
    assert [tokens[0] for tokens in samples.prompts] == [268, 268]
    for prompt, tokens in zip(CONFIG.prompts, samples.prompts, strict=True):
        assert 268 not in tokens[1:] and samples.text(tokens) == prompt
    assert samples.text([*samples.prompts[0][1:], 268]) == "the thing?"
    assert [step for step in range(1, 31) if samples.is_due(step, step == 25)] == [10, 20, 25, 30]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "mistral", "smollm3"])
def test_a_prompt_of_a_chat_is_what_the_template_itself_writes_before_an_answer(name: str) -> None:
    chat, wrapped = load_turns(name), turn_tokenizer(name)
    samples = Samples(CONFIG.model_copy(update={"prompts": ("the thing?",)}), chat.tokenizer, chat, IDS)
    options = {"add_generation_prompt": True, "enable_thinking": False, "date_string": TODAY.strftime("%d %b %Y")}
    text = wrapped.apply_chat_template([user("the thing?")], tokenize=False, **options)
    assert samples.prompts == [wrapped(text, add_special_tokens=False)["input_ids"]]


def test_a_template_that_writes_no_prompt_is_refused_by_name() -> None:
    chat = load_chat("gemma")
    with pytest.raises(ValueError, match=r"train\.samples: 'the thing\?' as a user's message: .* writes no prompt"):
        Samples(CONFIG, chat.tokenizer, chat, IDS)


def test_a_sample_is_the_most_probable_token_each_time_whatever_penalty_came_with_the_model(tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path))
    lm.generation_config.repetition_penalty = 8.0
    student = Student(lm, None, TrainConfig.model_validate({"dtype": "float32", "objectives": {"ce": 1.0, "kl": 0.0}}))
    samples = Samples(
        CONFIG.model_copy(update={"max_new_tokens": 12}),
        ByteTokenizer.from_wrapped(tiny_tokenizer(), "tiny"),
        None,
        IDS,
    )
    samples.write(student, 3, tmp_path)
    written = [json.loads(line)["text"] for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines()]
    for tokens, text in zip(samples.prompts, written, strict=True):
        path = list(tokens)
        while (len(path) < len(tokens) + 12 and path[-1] not in IDS.ends) or len(path) == len(tokens):
            path.append(int(lm(torch.tensor([path]), use_cache=False).logits[0, -1].argmax()))
        assert text == samples.text(path[len(tokens) :])
    assert lm.generation_config.repetition_penalty == 8.0 and student.training
