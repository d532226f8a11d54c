"""Task section: tasks of lm-evaluation-harness, and how they are prompted."""

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class TasksConfig(Section):
    """Tasks of lm-evaluation-harness that share one way of prompting."""

    names: tuple[str, ...] = Field(
        min_length=1,
        description="Tasks or groups, by the harness' names; without a hub: bld_piqa, bld_siqa, bld_openbookqa, "
        "bld_boolq, bld_mmlu_sample.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples before a question; default: each task's own.")
    apply_chat_template: bool = Field(False, description="Prompt through the model's chat template.")
    limit: int | None = Field(None, ge=1, description="Use only the first questions of each task; default: all.")
    seed: int | None = Field(
        None, description="Seed of few-shot examples and of sampling; default: the harness' own seeds."
    )
    max_gen_toks: int | None = Field(
        None, ge=1, description="Maximum tokens of a generated answer; default: each task's own, or 256."
    )
    start: str | None = Field(
        None, description="Name of the token put before a question; default: what the tokenizer itself puts there."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the model; auto: the dtype its weights are saved in, or float32 on a CPU without "
        "instructions for bfloat16. In bfloat16 options can tie; the first then counts.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Requests per forward pass; default: as many as fit in the GPU's memory; on a CPU, 2,048 tokens.",
    )
    include_path: str | None = Field(
        None, description="Folder with your own task files (YAML); Python functions that they name are run."
    )
    metrics: dict[str, str] = Field(
        {},
        description="Figure of a task to show in tables, as in {gsm8k: 'exact_match,flexible-extract'}; default: "
        "acc_norm, or else the task's first figure.",
    )


class WatchedTasksConfig(TasksConfig):
    """Tasks that the student is asked while it is trained, on a few questions."""

    every: int = Field(200, ge=1, description="Steps between askings; there is one at the last step too.")
    limit: int | None = Field(100, ge=1, description="Use only the first questions of each task; null: all.")
