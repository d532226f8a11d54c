"""Student section: the model that learns, and the dumps it learns from."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.dump import DumpPath
from pipeline.config.section import Section, added, stored_as
from pipeline.config.transfer import TransferConfig
from pipeline.runtime.model_source import ModelSource
from pipeline.runtime.plugins import check_name

INTERFACES = ("token_marginal", "causal", "linear")


class DumpRef(Section):
    """A dump to learn from."""

    path: DumpPath = Field(description="Folder of the dump, or its address: s3://, gs:// or hf://.")
    weight: float = Field(
        1.0,
        gt=0,
        description="Its share of what is learned, relative to the other dumps' weights. Among dumps of one corpus: "
        "of the mixed target. Among corpora: of the supervised bytes of every step; the dumps of a corpus add up.",
    )
    corpus: str | None = Field(
        None,
        pattern=r"^[\w-]+$",
        description="Name of your choice for the corpus it is a dump of, if student.dumps has several corpora (a "
        "union). Dumps of one corpus are mixed. Each corpus starts a new epoch when all of it has been read.",
    )


class StudentConfig(Section):
    """The model that learns."""

    renamed: ClassVar[Mapping[str, str]] = {"averaged_scale": "averaged_row_scale"}

    model: str = Field(description="Local folder, hub name or pypi: source.")
    revision: str | None = Field(None, description="Hub revision of the model: branch, tag or commit.")
    tokenizer: str | None = Field(
        None,
        description="Move the student to this tokenizer first: a source, or a Python file of your own; default: keep "
        "its own.",
    )
    averaged_row_scale: float = Field(
        0.85,
        gt=0,
        json_schema_extra=stored_as("averaged_scale"),
        description="When the tokenizer changes, embedding and head rows of tokens that the old one spells in several "
        "pieces are the pieces' mean times this; 1: plain Fast Vocabulary Transfer.",
    )
    transfer: TransferConfig = Field(
        TransferConfig(),
        json_schema_extra=added("0.2.0", {}),
        description="How these rows are made.",
    )
    interface: str = Field(
        "token_marginal",
        description="How it yields byte distributions: token_marginal (its own token probabilities summed to bytes; no "
        "parameters), causal (a decoder over a token's bytes), linear (the paper's ten parallel maps), or a Python "
        "file of your own.",
    )
    path: str = Field(description="Folder of the run: checkpoints/, export/, metrics.jsonl.")
    chat_template: str | None = Field(
        None,
        description="Chat template for chats: a .jinja file, or the source of a model or tokenizer that has one; "
        "default: the template of its tokenizer, or else of its model.",
    )
    start: str | None = Field(
        None,
        description="Token put before a document; default: the tokenizer's own. A chat starts as its template says.",
    )
    end: str | None = Field(
        None,
        description="Token that ends a document; default: the tokenizer's end of text, or for chats the template's end "
        "of a turn.",
    )
    drop_layers: tuple[int, ...] = Field(
        (), description="Layers removed before training, counted from 0, as in [14, 15, 16, 17]."
    )
    trained: Literal["all", "rows"] = Field(
        "all",
        json_schema_extra=added("0.2.0", "all"),
        description="Weights that learn: all, or rows (embedding and head, with the byte interface; the blocks are "
        "frozen), to bring a moved student's rows closer before a run from its export trains all.",
    )
    lora_rank: int = Field(0, ge=0, description="LoRA rank; 0: full fine-tuning.")
    lora_alpha: float | None = Field(
        None, gt=0, description="An adapter's output is scaled by lora_alpha / lora_rank; default: lora_rank."
    )
    lora_targets: tuple[str, ...] = Field(
        (),
        description="Names of linear layers that get adapters, as in [q_proj, v_proj]; default: all in the blocks. The "
        "weights of a mixture's experts are not linear layers; name them as experts.down_proj.",
    )
    lora_base: Literal["full", "4bit"] = Field(
        "full",
        json_schema_extra=added("0.2.0", "full"),
        description="4bit: frozen layers that have adapters are held in 4 bits (QLoRA), by the package bitsandbytes; "
        "the export has their rounded weights, with the adapters merged.",
    )
    lora_embeddings: bool | None = Field(
        None,
        description="Train embedding and head in full beside the adapters; default: if the tokenizer changes, because "
        "new rows must be learnt. The byte interface always trains.",
    )
    max_doubt: float = Field(1.0, ge=0, le=1, description="Positions with more doubt contribute no KL.")
    max_token_end: float = Field(1.0, ge=0, le=1, description="Positions with more token_end contribute no KL.")
    max_dropped: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Interface token_marginal: positions contribute neither KL nor byte CE if more than this share of "
        "the student's own mass, since the current token began, lies on tokens that end off its canonical path.",
    )
    dumps: tuple[DumpRef, ...] = Field(
        (),
        description="Dumps to learn from: of one corpus, their targets mixed, or of several, each named by `corpus`; "
        "default: dump.path alone.",
    )
    mix: Literal["arithmetic", "geometric"] = Field(
        "arithmetic", description="Mean of several dumps' probabilities, or of their logarithms (renormalised)."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @property
    def source(self) -> ModelSource:
        """Return the model with the options to load it; `model` is not resolved yet."""
        return ModelSource(self.model, self.revision, self.trust_remote_code)

    @property
    def dumps_by_corpus(self) -> dict[str | None, tuple[DumpRef, ...]]:
        """Return `dumps` by the name of their corpus, in alphabetical order; the name is None if there is only one."""
        names = sorted({ref.corpus for ref in self.dumps}, key=str)
        by_name = {name: tuple(ref for ref in self.dumps if ref.corpus == name) for name in names}
        return {None: self.dumps} if len(by_name) == 1 else {**by_name}

    @model_validator(mode="after")
    def _rows_alone_have_no_adapters(self) -> "StudentConfig":
        if self.trained == "rows" and self.lora_rank:
            raise ValueError(
                f"student.trained is rows, which freezes the layers that student.lora_rank {self.lora_rank} adapts; "
                "set one of them, and see student.lora_embeddings"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_are_beside_adapters(self) -> "StudentConfig":
        if self.lora_base != "full" and not self.lora_rank:
            raise ValueError(
                f"student.lora_base is {self.lora_base}, and weights of 4 bits learn nothing without adapters: give "
                "student.lora_rank, as in 64, or set student.lora_base=full"
            )
        return self

    @field_validator("interface")
    @classmethod
    def _interface_is_known(cls, name: str) -> str:
        return check_name(name, INTERFACES, "interface")

    @field_validator("drop_layers")
    @classmethod
    def _layers_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        wrong = sorted({layer for layer in layers if layer < 0 or layers.count(layer) > 1})
        if wrong:
            raise ValueError(f"layers are counted from 0 and named once; {wrong} are not: name each layer once")
        return tuple(sorted(layers))

    @field_validator("dumps")
    @classmethod
    def _dumps_once(cls, dumps: tuple[DumpRef, ...]) -> tuple[DumpRef, ...]:
        paths = [ref.path.rstrip("/") for ref in dumps]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} named more than once; name it once, with the sum of the weights")
        unnamed = [ref.path for ref in dumps if ref.corpus is None]
        if 0 < len(unnamed) < len(dumps):
            raise ValueError(
                f"no `corpus` is named for {', '.join(unnamed)}, but for other dumps there is one; name the corpus of "
                "each dump, or of none if all are of one corpus"
            )
        return dumps
