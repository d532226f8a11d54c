"""Opening of the generator that a recipe names; it is restarted after a failure."""

from collections.abc import Sequence
from importlib import import_module

from pipeline.runtime import log
from stage1_teacher.engines.base import free_memory
from stage1_teacher.generation.base import Draw, Drawn, Generator, GeneratorRequest

_MODULES = {  # each defines `make_generator(request) -> Generator`; imported when needed, as that takes seconds
    "vllm": "stage1_teacher.generation.vllm",
    "transformers": "stage1_teacher.generation.huggingface",
    "openai": "stage1_teacher.generation.openai_server",
}


def check_generates(engine: str) -> None:
    """Raise ValueError for an engine that writes no text."""
    if engine not in _MODULES:
        raise ValueError(
            f"teacher.engine: {engine} writes no text; set generate.engine to one of {', '.join(_MODULES)}"
        )


class OpenGenerator:
    """An opened generator."""

    def __init__(self, request: GeneratorRequest) -> None:
        self._request = request
        self._generator: Generator | None = self._open()

    def _open(self) -> Generator:
        generator: Generator = import_module(_MODULES[self._request.writer.engine]).make_generator(self._request)
        return generator

    @property
    def generator(self) -> Generator:
        assert self._generator is not None, "the engine failed to restart"
        return self._generator

    @property
    def can_restart(self) -> bool:
        return not self._request.writer.engine_spec.needs_address  # a connection retries each request by itself

    def restart(self) -> None:
        """Replace a failed engine by a new one; the failed engine's memory is freed first."""
        failed, self._generator = self._generator, None
        if failed is not None:
            try:
                failed.close()
            except Exception as error:  # it is broken; what matters is whether the new one starts
                log.warning(f"closing the failed engine: {type(error).__name__}: {error}")
            del failed
        free_memory()
        self._generator = self._open()

    def generate(self, draws: Sequence[Draw]) -> list[Drawn]:
        """Return a completion for each request."""
        return self.generator.generate(draws)

    def close(self) -> None:
        """Release what the engine holds. One that failed and could not be restarted holds nothing."""
        generator, self._generator = self._generator, None
        if generator is not None:
            generator.close()
