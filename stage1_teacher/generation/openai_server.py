"""Generation by a `vllm serve` process, over HTTP: prompts go as token ids, and completions come back as such."""

from collections.abc import Sequence
from typing import Any

from stage1_teacher.engines.http_client import Server
from stage1_teacher.engines.openai_server import engine_name
from stage1_teacher.generation.base import Draw, Drawn, GeneratorRequest, drawn


def make_generator(request: GeneratorRequest) -> "ServedGenerator":
    """Connect to the server and check that it serves the model with enough positions."""
    return ServedGenerator(request)


class ServedGenerator:
    """A model behind a server.

    Raises ValueError if the server is not vLLM's, has no such model, or answers with less than token ids.
    """

    def __init__(self, request: GeneratorRequest) -> None:
        sampling = request.sampling
        self.name = engine_name(request.writer, request.placement)
        self.batch_prompts = 4 * request.placement.requests
        self._ends = sampling.ends
        self._server = Server(request.placement)
        self._url = f"{self._server.base_url}/completions"
        self._common: dict[str, Any] = {
            "model": request.writer.name_at_server,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            # Else the server takes those of the model's generation_config.json.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(sampling.ends),
            "ignore_eos": True,
            "return_token_ids": True,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }

    def generate(self, draws: Sequence[Draw]) -> list[Drawn]:
        bodies = [self._common | {"prompt": list(draw.prompt), "seed": draw.seed} for draw in draws]
        return self._server.post_all(self._url, bodies, lambda index, answer: self._read(draws[index], answer))

    def _read(self, draw: Draw, answer: Any) -> Drawn:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ValueError(
                f"{self._url} answers without token_ids, from which the exact bytes of a completion follow. The writer "
                "must be served by vLLM (`vllm serve`, 0.10.2 or later), and any proxy in between must pass through "
                "vLLM's extra fields"
            )
        read = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        if read is not None and list(read) != list(draw.prompt):
            raise ValueError(f"{self._url} has read {len(read)} tokens as its prompt, and was sent {len(draw.prompt)}")
        return drawn(tokens, self._ends)

    def close(self) -> None:
        self._server.close()
