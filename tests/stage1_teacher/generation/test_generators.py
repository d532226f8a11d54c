"""Generators: greedy text is the model's own, each completion has its own seed, a server is asked for token ids."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.generation import huggingface, openai_server, vllm
from stage1_teacher.generation.base import Draw, Drawn, GeneratorRequest, Sampling
from stage1_teacher.generation.registry import check_generates
from tests.support.fake_server import FakeServer

END = 268
GREEDY = Sampling(10, 0.0, 1.0, None, (), (END,))
PROMPTS = [(END, 40), (END, 41, 42, 43), (END, 260, 50), (END, 261)]


def request(model: Path, tokenizer: ByteTokenizer, sampling: Sampling, **values: Any) -> GeneratorRequest:
    engine = values.pop("engine", "transformers")
    writer = TeacherConfig.model_validate({"model": str(model), "engine": engine, "dtype": "float32", "max_tokens": 48})
    placement = PlacementConfig.model_validate({"kv_cache": "64MiB", "engine_batch_tokens": 64} | values)
    return GeneratorRequest(str(model), writer, placement, tokenizer, sampling)


def own_greedy(model: Path, prompt: tuple[int, ...]) -> Drawn:
    """Return the model's most probable continuation, each token from a forward pass of its own."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            token = int(whole(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == END:
            return Drawn(tokens[len(prompt) :], True)
        tokens.append(token)
    return Drawn(tokens[len(prompt) :], False)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_engine_writes_what_the_model_would_and_samples_each_completion_by_its_own_seed(
    engine: str, model: Path, tokenizer: ByteTokenizer
) -> None:
    module = huggingface if engine == "transformers" else vllm
    generator: Any = module.make_generator(request(model, tokenizer, GREEDY, engine=engine))
    draws = [Draw(prompt, 5) for prompt in PROMPTS]
    assert generator.generate(draws) == [own_greedy(model, prompt) for prompt in PROMPTS]

    if engine == "transformers":
        generator._config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    else:
        generator._options |= {"temperature": 1.0}
    seeds = [Draw(PROMPTS[0], seed) for seed in range(12)]
    sampled = generator.generate(seeds)
    assert len({tuple(one.tokens) for one in sampled}) > 6
    assert generator.generate(seeds[3:5]) == sampled[3:5]
    assert generator.generate([*draws, seeds[7]])[-1] == sampled[7]
    more = [Draw(PROMPTS[1], seed) for seed in range(40)]  # more tokens than in one step
    assert generator.generate(more)[33] == generator.generate(more[33:34])[0]
    stopped = tokenizer.token_bytes[sampled[0].tokens[2]]
    assert stopped is not None
    if engine == "transformers" and stopped.isascii():
        generator._stop = (stopped,)
        [shorter] = generator.generate(seeds[:1])
        first = next(i for i, token in enumerate(sampled[0].tokens) if stopped in (tokenizer.token_bytes[token] or b""))
        assert shorter == Drawn(sampled[0].tokens[: first + 1], False)
    generator.close()


def test_a_temperature_near_zero_gives_greedy_text(model: Path, tokenizer: ByteTokenizer) -> None:
    generator = huggingface.make_generator(request(model, tokenizer, GREEDY._replace(temperature=1e-4)))
    assert generator.generate([Draw(PROMPTS[1], 3)]) == [own_greedy(model, PROMPTS[1])]


def served(fake: FakeServer, tokenizer: ByteTokenizer, sampling: Sampling) -> openai_server.ServedGenerator:
    made = request(Path("tiny"), tokenizer, sampling, engine="openai", base_url=fake.url, request_attempts=2)
    return openai_server.make_generator(made)


def test_a_server_gets_token_ids_a_seed_each_and_all_of_the_sampling(
    fake: FakeServer, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        tokens = [body["seed"], 6, END] if body["seed"] else [8, 9]
        return {"index": 0, "token_ids": tokens, "prompt_token_ids": body["prompt"]}

    monkeypatch.setattr(fake, "choice", answer)
    generator = served(fake, tokenizer, Sampling(7, 0.5, 0.9, 20, ("\n",), (END,)))
    assert generator.name == "openai-vllm-0.32.0"
    found = generator.generate([Draw((END, 1), 3), Draw((END, 2), 0)])
    assert found == [Drawn([3, 6], True), Drawn([8, 9], False)]
    bodies = [body for path, _, body in fake.requests if path.endswith("/completions")]
    assert sorted(body["prompt"] for body in bodies) == [[END, 1], [END, 2]]
    expected = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "stop": ["\n"], "stop_token_ids": [END]}
    assert all(body.items() >= {**expected, "repetition_penalty": 1.0}.items() for body in bodies)
    generator.close()


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"text": "and so"}, "without token_ids"),
        ({"token_ids": [5], "prompt_token_ids": [1]}, "has read 1 tokens as its prompt, and was sent 2"),
    ],
)
def test_a_server_that_tells_no_tokens_or_reads_others_is_refused(
    choice: dict[str, Any], fault: str, fake: FakeServer, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "choice", lambda _: choice)
    generator = served(fake, tokenizer, GREEDY)
    with pytest.raises(ValueError, match=fault):
        generator.generate([Draw((END, 1), 3)])
    generator.close()


def test_an_operators_own_engine_writes_no_text() -> None:
    with pytest.raises(ValueError, match=r"mine\.py writes no text; set generate\.engine"):
        check_generates("mine.py")
