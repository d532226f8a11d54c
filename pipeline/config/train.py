"""Train section: the training of the student (stage 2)."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.corpus import CorpusConfig
from pipeline.config.section import Section, added, plain_address
from pipeline.config.tasks import WatchedTasksConfig
from pipeline.config.training.deepspeed import DeepSpeedConfig
from pipeline.config.training.objectives import Objectives
from pipeline.runtime.dtypes import natural_dtype
from schemas.storage.locations import check_address


class WandbConfig(Section):
    """A copy of the metrics on Weights & Biases. The package has its own log-in: `wandb login`, or WANDB_API_KEY."""

    project: str = Field(description="Project on Weights & Biases.")
    name: str | None = Field(None, description="Name of the run; default: the last parts of student.path.")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="offline: kept in the run's folder, for `wandb sync`."
    )


class MlflowConfig(Section):
    """A copy of the metrics at MLflow. Its own variables name server and user: MLFLOW_TRACKING_URI and others."""

    experiment: str = Field(description="Experiment at MLflow; made if there is none.")
    name: str | None = Field(None, description="Name of the run; default: the last parts of student.path.")
    tracking_uri: Annotated[str, AfterValidator(plain_address)] | None = Field(
        None, description="Server or folder; default: MLflow's own (MLFLOW_TRACKING_URI)."
    )


class SamplesConfig(Section):
    """Texts that the student writes while it is trained, kept in RUN/samples.jsonl."""

    prompts: tuple[str, ...] = Field(
        min_length=1, description="Beginnings of texts, or a user's messages if the dump holds chats."
    )
    every: int = Field(100, ge=1, description="Steps between samples; there is one at the last step too.")
    max_new_tokens: int = Field(64, ge=1, description="Tokens to write after each prompt, the most probable each time.")


DEFAULT_MAX_TOKENS = 2048
DEFAULT_STEPS, DEFAULT_WARMUP_STEPS = 500, 10
_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """Training of the student."""

    steps: int = Field(DEFAULT_STEPS, ge=1, description="Optimizer steps. A finished run continues if this is raised.")
    change: tuple[Literal["dump", "objectives", "lr", "batch_tokens"], ...] = Field(
        (),
        description="What a run that began otherwise is trained on with, by name: dump (an extended or another one; a "
        "new epoch begins), objectives (with their settings, student.max_*), lr, batch_tokens. Recorded in "
        "identity.json; anything else that differs is refused.",
    )
    batch_tokens: int = Field(
        16384, ge=1, description="Approximate student tokens per optimizer step over all ranks: documents stay whole."
    )
    micro_batch_tokens: int = Field(
        4096, ge=1, description="Student tokens (including padding) per forward pass on a rank."
    )
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="Maximum tokens that the student reads at once; longer records are cut into pieces, with an eighth "
        f"of this as context. Default: {DEFAULT_MAX_TOKENS}, or the model's number of positions if smaller.",
    )
    lr: float = Field(1.0e-5, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(
        default_factory=lambda values: min(DEFAULT_WARMUP_STEPS, values.get("steps", DEFAULT_STEPS) // 2),
        ge=0,
        description="Steps of linear warm-up; cosine decay to lr * min_lr_ratio follows. Default: "
        f"{DEFAULT_WARMUP_STEPS}, or half of the steps if smaller.",
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="End of the cosine decay, as a share of each peak rate.")
    interface_lr: float = Field(
        1.0, gt=0, description="Learning rate of the interface's own parameters, as a multiple of lr."
    )
    embedding_lr: float = Field(
        1.0, gt=0, description="Learning rate of the embedding and the head, as a multiple of lr."
    )
    interface_warmup_steps: int = Field(
        0, ge=0, description="Steps in which the interface learns but passes no gradient to the model."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decoupled decay: each step shrinks a weight by this times the learning rate."
    )
    decay: Literal["matrices", "all"] = Field(
        "matrices",
        json_schema_extra=added("0.2.0", "all"),
        description="Weights that weight_decay shrinks: matrices (of layers; not embeddings, norms and biases), or all "
        "that learn. A run keeps what it was begun with.",
    )
    betas: tuple[_Beta, _Beta] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the mean gradient and of its mean square."
    )
    grad_clip: float = Field(1.0, gt=0, description="Maximum gradient norm.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the order of documents, dropout and new parameters.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default_factory=natural_dtype,
        description="Dtype of the forward pass; master weights are float32. float16 uses dynamic loss scaling. "
        "Default: bfloat16, or float32 on a CPU without instructions for it; a run keeps the dtype it was begun in.",
    )
    precision: Literal["autocast", "bf16_master"] = Field(
        "autocast",
        json_schema_extra=added("0.2.0", "autocast"),
        description="autocast: float32 weights, products in dtype. bf16_master: bfloat16 weights, and a float32 copy "
        "that the optimizer updates, dealt over the ranks; needs dtype bfloat16 and zero_stage 2 or 3.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only each block's input for the backward pass, and recompute the block there."
    )
    attention: Literal[
        "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = Field(
        "auto",
        description="Kernel of the student's attention, by its name in transformers; auto: what transformers chooses. "
        "flex and flash need a GPU, flash its package too.",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        json_schema_extra=added("0.2.0", "adamw"),
        description="adamw_8bit: AdamW with its moments in 8 bits, by the package bitsandbytes.",
    )
    fused_ce: Literal["none", "liger"] = Field(
        "none",
        description="liger: head and cross-entropy in one kernel of the package liger-kernel, on a GPU; for runs whose "
        "only objective is ce.",
    )
    marginal_kernel: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="Kernel of the interface token_marginal on a GPU. triton: one that reads each logit once forward "
        "and once backward; torch: torch's own operations; auto: triton where it is installed. A CPU has a compiled "
        "kernel.",
    )
    marginal_kept_gib: float = Field(
        2.0,
        ge=0,
        description="GiB of logits that marginal_kernel: triton keeps on a rank from forward to backward; those beyond "
        "are computed again.",
    )
    compile: bool = Field(
        False,
        description="Compile the student's blocks by torch.compile, for any batch shape: the first steps take longer. "
        "Not with zero_stage 3.",
    )
    save_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(3, ge=0, description="Newest checkpoints to keep, beside the best by evaluation; 0: all.")
    checkpoints: Annotated[str, AfterValidator(check_address)] | None = Field(
        None,
        description="Address of a store's folder (s3://, gs://, file://) that each checkpoint is copied to, in the "
        "background. Where student.path holds no newer one, as on another machine, the run resumes from there.",
    )
    log_every: int = Field(1, ge=1, description="Steps between log lines.")
    eval_every: int = Field(
        0,
        ge=0,
        description="Steps between evaluations: bits per byte of the student's own tokens on a part of the eval "
        "section's text. Each checkpoint is evaluated too. 0: none.",
    )
    eval_documents: int = Field(
        32, ge=1, description="Documents per evaluation: the first of the validation text, or else of the eval section."
    )
    validation: CorpusConfig | None = Field(
        None,
        description="Text to evaluate on instead of the eval section's, so that what chooses a checkpoint is another "
        "text than what `bld eval` reports.",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Evaluations in a row without a new lowest bits per byte after which training ends early, and the "
        "best checkpoint is exported; needs train.validation. 0: never.",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=added("0.2.0", 0.0),
        description="Decay of a moving average of the weights, as in 0.999; at most (1 + t) / (10 + t) in step t. The "
        "average is what is evaluated, sampled and exported; it takes 4 bytes a weight on each rank. 0: none.",
    )
    samples: SamplesConfig | None = Field(
        None, description="Texts to write while training, as in {prompts: [Once upon a time], every: 100}."
    )
    tasks: WatchedTasksConfig | None = Field(
        None,
        description="Tasks to ask the student while it is trained, as in {names: [bld_piqa], every: 200, limit: 100}; "
        "other keys as in eval.tasks. Needs the package lm_eval.",
    )
    wandb: WandbConfig | None = Field(
        None, description="Also log to Weights & Biases, as in {project: bytes}; needs the package wandb."
    )
    mlflow: MlflowConfig | None = Field(
        None, description="Also log to MLflow, as in {experiment: bytes}; needs the package mlflow-skinny or mlflow."
    )
    num_processes: int = Field(1, ge=1, description="Ranks on this machine.")
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: documents are packed into rows as long as the micro-batch's longest, with separate attention "
        "and positions; off: one document per row, similar lengths together; auto: packed on a CPU, in steps where "
        "that saves over a tenth of the tokens.",
    )
    prefetch: int = Field(
        2, ge=0, description="Optimizer steps whose batches are prepared ahead, in parallel with the model; 0: none."
    )
    hostfile: str | None = Field(
        None,
        description="File of machines that DeepSpeed's launcher reaches by pdsh and ssh, lines of NAME slots=RANKS; "
        "num_processes is then not used. Under SLURM start `bld student` with srun instead.",
    )
    objectives: Objectives = Objectives()
    kl_direction: Literal["forward", "reverse", "jensen_shannon"] = Field(
        "forward",
        description="KL(teacher || interface), KL(interface || teacher), or the Jensen-Shannon divergence; tokens too.",
    )
    kl_temperature: float = Field(
        1.0,
        gt=0,
        description="Both sides are raised to 1 / this over stored symbols and tail; the loss is multiplied by its "
        "square.",
    )
    alm_tau: float = Field(100.0, gt=0, description="Chunk likelihoods are raised to 1 / this before they are matched.")
    alm_debias: float = Field(
        0.1,
        ge=0,
        le=1,
        description="A chunk ends only where the teacher's probability of a space, line break or END is at least this; "
        "0: at any shared token end.",
    )
    alm_space: bool = Field(
        False,
        description="A chunk's likelihood includes that of a space, line break or END after it, as its authors have it "
        "(append_space).",
        json_schema_extra=added("0.2.0", False),
    )
    alm_end: bool = Field(
        False,
        description="END is a chunk of its own; needs dump.tokens.",
        json_schema_extra=added("0.2.0", False),
    )
    token_top_k: int | None = Field(
        None,
        ge=1,
        description="Alternatives used of each of the teacher's tokens, by objectives on tokens; default: all stored.",
        json_schema_extra=added("0.2.0", None),
    )
    token_tail: Literal["class", "drop"] = Field(
        "class",
        description="Tokens that are not stored, in divergences of tokens. class: one class, on both sides; drop: "
        "both sides are normalised without them, which is biased.",
        json_schema_extra=added("0.2.0", "class"),
    )
    cdm_candidates: int = Field(
        100,
        ge=1,
        description="Most probable tokens of the student's among which cdm looks for pairs.",
        json_schema_extra=added("0.2.0", 100),
    )
    cdm_max_distance: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Pairs of cdm are nearer than this: edits over the two tokens' lengths; 0: only equal tokens.",
        json_schema_extra=added("0.2.0", 0.1),
    )
    balance: Literal["none", "gradient", "loss"] = Field(
        "none",
        description="Weights of the objectives. gradient: each is divided by its gradient's norm, as ALM's authors do "
        "(at the last hidden states of a micro-batch), and all are normalised to a sum of 1; loss: each is scaled to "
        "the size of ce; none: as they are.",
        json_schema_extra=added("0.2.0", "none"),
    )
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def piece_tokens(self) -> int:
        """Return `max_tokens`, or its default if no model required fewer."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def attention_on_gpu(self) -> bool:
        """Return whether the attention's kernel computes on GPUs alone."""
        return self.attention.startswith(("flex", "flash"))

    @model_validator(mode="after")
    def _packed_rows_are_tested(self) -> "TrainConfig":
        if self.packing == "on" and self.attention_on_gpu:
            raise ValueError(
                f"train.packing is on, but whether a model keeps packed documents apart is tested on the CPU, where "
                f"train.attention: {self.attention} cannot compute: set packing to off, or attention to sdpa"
            )
        return self

    @model_validator(mode="after")
    def _master_weights_have_a_place(self) -> "TrainConfig":
        if self.precision == "bf16_master" and (self.dtype != "bfloat16" or self.deepspeed.zero_stage < 2):
            raise ValueError(
                "train.precision: bf16_master keeps bfloat16 weights and a float32 copy, which DeepSpeed does at "
                f"train.deepspeed.zero_stage 2 or 3 and here in train.dtype bfloat16; there are zero_stage "
                f"{self.deepspeed.zero_stage} and {self.dtype}. On one rank, stage 2 partitions nothing"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_is_where_its_moments_are(self) -> "TrainConfig":
        if self.optimizer != "adamw" and self.deepspeed.offload_optimizer != "none":
            raise ValueError(
                f"train.optimizer: {self.optimizer} keeps its moments beside the weights, and "
                f"train.deepspeed.offload_optimizer is {self.deepspeed.offload_optimizer}: give none, or adamw"
            )
        return self

    @model_validator(mode="after")
    def _only_ce_is_fused(self) -> "TrainConfig":
        if self.fused_ce == "none":
            return self
        others = [name for name, weight in self.objectives.weights.items() if weight and name != "ce"]
        if others or not self.objectives.ce:
            raise ValueError(
                f"train.fused_ce: {self.fused_ce} is for runs whose only objective is ce, and there "
                f"{'is' if len(others) == 1 else 'are'} {', '.join(others)}: set train.fused_ce=none"
            )
        if self.balance != "none":
            raise ValueError(f"train.fused_ce: {self.fused_ce} leaves one objective; set train.balance=none")
        if self.deepspeed.zero_stage == 3:
            raise ValueError(
                f"train.fused_ce: {self.fused_ce} reads the head's weight, which train.deepspeed.zero_stage 3 "
                "partitions: give zero_stage 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _compiled_blocks_have_weights(self) -> "TrainConfig":
        if self.compile and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "train.compile compiles blocks with their weights, which train.deepspeed.zero_stage 3 gathers block by "
                "block: set compile to false, or give zero_stage 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> "TrainConfig":
        for name, asked in (("ema", self.ema), ("samples", self.samples), ("tasks", self.tasks)):
            if asked and self.deepspeed.zero_stage == 3:
                raise ValueError(
                    f"train.{name} needs whole weights on each rank, and train.deepspeed.zero_stage 3 partitions them: "
                    f"give zero_stage 2 or less, or leave train.{name} out"
                )
        return self

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> "TrainConfig":
        if self.patience and not (self.eval_every and self.validation):
            lacking = "validation" if self.eval_every else "eval_every"
            raise ValueError(
                f"train.patience is {self.patience}, but there is no train.{lacking}: early stopping chooses a "
                "checkpoint by text of its own, measured every train.eval_every steps"
            )
        return self

    @model_validator(mode="after")
    def _balance_is_possible(self) -> "TrainConfig":
        if self.balance == "loss" and not self.objectives.ce:
            raise ValueError("train.balance: loss scales objectives to the size of ce; give train.objectives.ce")
        if self.balance == "gradient" and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "train.balance: gradient takes gradients of single objectives, for which train.deepspeed.zero_stage 3 "
                "has no weights; give zero_stage 2 or less"
            )
        return self

    @field_validator("packing", mode="before")
    @classmethod
    def _as_it_is_written(cls, value: object) -> object:
        """Undo YAML's reading of a bare `on` and `off` as true and false."""
        return ("on" if value else "off") if isinstance(value, bool) else value
