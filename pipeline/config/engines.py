"""Engines that a teacher can run on, and what the rest of the package must know about each without opening it.

A custom engine is a Python file named as `teacher.engine`. It describes itself in `ENGINE = EngineSpec(...)`, which is
read, not run: opening a dump made with such a file runs none of its code. stage1_teacher/README.md has an example.
"""

from pydantic import Field, ValidationError, model_validator

from pipeline.config.section import Section
from pipeline.runtime.plugins import is_own, read_call

EXAMPLE = "stage1_teacher/README.md"  # the page with an example of such a file


class EngineSpec(Section):
    """Capabilities of an engine, and the module that opens it."""

    module: str | None = Field(
        None, description="Dotted name of the module that opens it (`make_engine`); None for a file: the file itself."
    )
    served: bool = Field(
        False,
        description="The weights are out of reach: they have no hash, `teacher.dtype` has no effect, and with a "
        "`teacher.tokenizer`, `teacher.model` is only a name.",
    )
    needs_address: bool = Field(False, description="It is reached over HTTP, at `placement.base_url`.")
    whole_softmax: bool = Field(
        True, description="It sums each row's whole softmax; otherwise it lists probable tokens."
    )
    branches: bool = Field(False, description="It computes branch rows (`dump.covering.beam_width`).")
    recomputes_blocks: bool = Field(
        False, description="A branch recomputes its path's last, unfinished block of a prefix cache."
    )
    quantizes: bool = Field(False, description="It accepts `teacher.quantization`.")
    over_machines: bool = Field(False, description="One engine can span several machines of a Ray cluster.")
    packages: tuple[str, ...] = Field(
        (), description="Distributions whose versions are part of the name under which a dump records a custom engine."
    )

    @model_validator(mode="after")
    def _heads_are_within_reach(self) -> "EngineSpec":
        if self.served and self.whole_softmax:
            raise ValueError("a served engine gives no whole softmax: whole_softmax=False, and it lists tokens")
        if self.branches and not self.whole_softmax:
            raise ValueError("branch rows are summed from the whole softmax; an engine that lists tokens has none")
        return self


ENGINES = {
    "vllm": EngineSpec(
        module="stage1_teacher.engines.vllm",
        branches=True,
        quantizes=True,
        over_machines=True,
    ),
    "transformers": EngineSpec(module="stage1_teacher.engines.huggingface", branches=True),
    "openai": EngineSpec(
        module="stage1_teacher.engines.openai_server", served=True, needs_address=True, whole_softmax=False
    ),
}


def engine_spec(engine: str) -> EngineSpec:
    """Look up a recipe's `teacher.engine`.

    Raises ValueError for a file that does not exist, or whose `ENGINE` is not written in plain values.
    """
    if not is_own(engine):
        return ENGINES[engine]
    values = read_call(engine, "ENGINE", "EngineSpec", EXAMPLE)
    if "module" in values:
        raise ValueError(f"{engine}: ENGINE.module: leave it out; `make_engine` of this file opens the engine")
    try:
        return EngineSpec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("ENGINE", *first["loc"])))
        raise ValueError(f"{engine}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def other_engine(engine: str) -> str:
    """Name another engine that loads weights locally, to try in place of `engine` (a name with or without version)."""
    return next(name for name, spec in ENGINES.items() if spec.whole_softmax and not engine.startswith(name))
