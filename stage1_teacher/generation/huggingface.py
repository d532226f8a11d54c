"""Generation with transformers, one completion at a time: for tests, and for machines without vLLM."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.runtime.devices import compute_device
from pipeline.runtime.huggingface import load_model
from stage1_teacher.engines.huggingface import engine_name
from stage1_teacher.generation.base import Draw, Drawn, GeneratorRequest, drawn, written_bytes


def make_generator(request: GeneratorRequest) -> "TransformersGenerator":
    """Open the generator, with its model loaded."""
    return TransformersGenerator(request)


class TransformersGenerator:
    """A model in this process, sampled by transformers' `generate`."""

    batch_prompts = 1

    def __init__(self, request: GeneratorRequest) -> None:
        writer, sampling = request.writer, request.sampling
        self.name = engine_name(writer, request.placement)
        self._device = torch.device(compute_device())
        self._model = load_model(writer.source.at(request.model), getattr(torch, writer.dtype)).to(self._device).eval()
        # Its own would fill in what is left open here: penalties, other ends, a length.
        self._model.generation_config = GenerationConfig()
        self._ends, self._tokenizer = sampling.ends, request.tokenizer
        self._stop = tuple(text.encode() for text in sampling.stop)
        samples: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            # top_k 0: all tokens; transformers' own default is 50.
            samples = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or 0,
            }
        self._config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.ends),
            pad_token_id=sampling.ends[0],
            **samples,
        )

    @torch.inference_mode()
    def generate(self, draws: Sequence[Draw]) -> list[Drawn]:
        return [self._generate(draw) for draw in draws]

    def _generate(self, draw: Draw) -> Drawn:
        ids_BT = torch.tensor([draw.prompt], device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(draw.seed)
            out_BT = self._model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                generation_config=self._config,
                stopping_criteria=[self._is_stopped(len(draw.prompt))] if self._stop else None,
            )
        return drawn(out_BT[0, len(draw.prompt) :].tolist(), self._ends)

    def _is_stopped(self, num_prompt: int) -> Any:
        """Return what ends a completion as soon as it holds a text to stop at."""

        def criterion(ids_BT: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            said = written_bytes(ids_BT[0, num_prompt:].tolist(), self._tokenizer)
            return torch.tensor([any(text in said for text in self._stop)], device=ids_BT.device)

        return criterion

    def close(self) -> None:
        del self._model
