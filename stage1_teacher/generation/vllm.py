"""Generation with vLLM in this process, continuously batched; each completion has a seed of its own."""

from collections.abc import Sequence

from stage1_teacher.engines.vllm import engine_version, sampling_engine
from stage1_teacher.generation.base import Draw, Drawn, GeneratorRequest, drawn


def make_generator(request: GeneratorRequest) -> "VllmGenerator":
    """Open the generator, with its model loaded."""
    return VllmGenerator(request)


class VllmGenerator:
    """A model in this process; its workers may be elsewhere."""

    batch_prompts = 256

    def __init__(self, request: GeneratorRequest) -> None:
        sampling = request.sampling
        self.name = engine_version()
        self._ends = sampling.ends
        self._options = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,  # 0: all
            "stop": list(sampling.stop) or None,
            "detokenize": bool(sampling.stop),
            "stop_token_ids": list(sampling.ends),
            "ignore_eos": True,  # the ends are those of the recipe
        }
        model = (request.model, request.writer, request.placement, request.over_machines)
        self._sample, self._close = sampling_engine(*model)

    def generate(self, draws: Sequence[Draw]) -> list[Drawn]:
        written = self._sample([draw.prompt for draw in draws], [draw.seed for draw in draws], self._options)
        return [drawn(tokens, self._ends) for tokens in written]

    def close(self) -> None:
        self._close()
