"""The engines that a teacher can run on: what the rest of the package has to know of each, without opening one.

An engine of one's own is a Python file, named as `teacher.engine`. It says the same of itself in `ENGINE =
EngineSpec(...)`, which is read, not run: to open a dump that was made with such a file runs nothing of it.
stage1_teacher/README.md has an example.
"""

from pydantic import Field, ValidationError, model_validator

from pipeline.config.section import Section
from pipeline.runtime.plugins import is_own, read_call

EXAMPLE = "stage1_teacher/README.md"  # has one of a file


class EngineSpec(Section):
    """Capabilities of an engine, and the module that opens it."""

    module: str | None = Field(
        None, description="Dotted name of what opens it (`make_engine`); of a file of one's own: that file."
    )
    served: bool = Field(
        False,
        description="The weights are out of reach: they have no hash, `teacher.dtype` says nothing, and with a `teacher.tokenizer` "
        "`teacher.model` is a mere name.",
    )
    needs_address: bool = Field(False, description="It is asked over HTTP, at `placement.base_url`.")
    hidden_states: bool = Field(
        True, description="It gives what the head is applied to; else it lists probable tokens."
    )
    branches: bool = Field(False, description="It computes branch rows (`dump.covering.beam_width`).")
    quantizes: bool = Field(False, description="It takes `teacher.quantization`.")
    over_machines: bool = Field(False, description="One engine can lie on several machines of a Ray cluster.")
    packages: tuple[str, ...] = Field(
        (), description="Distributions whose versions are part of the name that a dump knows an engine of one's own by."
    )

    @model_validator(mode="after")
    def _heads_are_within_reach(self) -> "EngineSpec":
        if self.served and self.hidden_states:
            raise ValueError("a served engine has no head within reach: hidden_states=False, and it lists tokens")
        if self.branches and not self.hidden_states:
            raise ValueError("branches are computed from hidden states; an engine that lists tokens has none")
        return self


ENGINES = {
    "vllm": EngineSpec(module="stage1_teacher.engines.vllm", branches=True, quantizes=True, over_machines=True),
    "transformers": EngineSpec(module="stage1_teacher.engines.huggingface", branches=True),
    "openai": EngineSpec(
        module="stage1_teacher.engines.openai_server", served=True, needs_address=True, hidden_states=False
    ),
}


def engine_spec(engine: str) -> EngineSpec:
    """Look up a recipe's `teacher.engine`. Raises ValueError for a file that is not there, or does not say it
    plainly.
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
    """Another engine that loads weights here, to try in place of this one. `engine`: its name, with or without a
    version.
    """
    return next(name for name, spec in ENGINES.items() if spec.hidden_states and not engine.startswith(name))
