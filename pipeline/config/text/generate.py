"""Generation section: prompts, the model that continues them, and how it is sampled."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.corpus import CorpusConfig
from pipeline.config.section import Section
from schemas.storage.locations import check_address


class PromptsConfig(CorpusConfig):
    """Prompts: texts to continue, or chats whose next turn is the assistant's."""

    answered: ClassVar[bool] = False

    max_bytes: int | None = Field(
        None,
        ge=1,
        description="Bytes of each text that are its prompt, from its first on, cut between characters; the rest is "
        "not read. Default: all. Not for chats.",
    )

    @model_validator(mode="after")
    def _prompts_are_whole(self) -> "PromptsConfig":
        if self.supervise is not None:
            raise ValueError("generate.prompts.supervise: a prompt is context as a whole; leave it out")
        if self.max_bytes is not None and self.has_chats:
            raise ValueError("generate.prompts.max_bytes cuts texts, and these prompts are chats; leave it out")
        return self


class GenerateConfig(Section):
    """Text that a model writes, as a corpus."""

    path: Annotated[str, AfterValidator(check_address)] = Field(
        description="Folder of the corpus that is written (its shards, its card), or its address in an object store "
        "(s3:// or gs://)."
    )
    prompts: PromptsConfig = Field(description="Where prompts are read from, as a corpus is.")
    writer: Literal["teacher", "student"] = Field(
        "teacher", description="Who writes: the teacher, or the student as exported (student.path/export)."
    )
    engine: Literal["vllm", "transformers", "openai"] | None = Field(
        None,
        description="What runs the writer: vllm, transformers, or openai (a `vllm serve` process at "
        "placement.base_url). Default: teacher.engine.",
    )
    served_model: str | None = Field(
        None, description="The writer's name on the server (engine openai). Default: teacher.served_model or its path."
    )
    completions: int = Field(1, ge=1, description="Completions of each prompt.")
    max_new_tokens: int = Field(512, ge=1, description="Maximum length of a completion, in the writer's tokens.")
    max_prompt_tokens: int = Field(
        1024,
        ge=1,
        description="Maximum length of a prompt, in the writer's tokens, with its start token and chat template; "
        "longer ones are counted and left out.",
    )
    temperature: float = Field(1.0, ge=0, description="Divides the logits; 1: the model's own distribution, 0: greedy.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most probable tokens that hold this share of the mass; 1: all."
    )
    top_k: int | None = Field(None, ge=1, description="Sample from this many most probable tokens. Default: all.")
    stop: tuple[str, ...] = Field(
        (),
        description="Texts at which a completion is cut; neither they nor what follows is kept, and no END follows.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Of the sampling: each completion has its own, made from this one, its prompt's id and its number.",
    )
    reasoning: Literal["keep", "drop", "none"] = Field(
        "keep",
        description="Of a chat's completions: keep what the model reasons, drop it, or ask the template for none "
        "(`none`, where it knows enable_thinking).",
    )
    unfinished: Literal["keep", "drop"] = Field(
        "keep",
        description="Completions that reach max_new_tokens: keep them, without END, or drop them. Those that repeat "
        "themselves to the limit are dropped in any case.",
    )
    shard_prompts: int = Field(
        256,
        ge=1,
        description="Prompts per shard. One engine writes a shard as a whole, so no more engines work at once than "
        "there are shards.",
    )

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("a stop text is empty: every completion would end at once; leave it out")
        return stop

    @model_validator(mode="after")
    def _greedy_text_is_one(self) -> "GenerateConfig":
        if not self.temperature and self.completions > 1:
            raise ValueError(
                f"completions is {self.completions}, and temperature 0 always gives the same one; set completions: 1 "
                "or a temperature above 0"
            )
        return self
