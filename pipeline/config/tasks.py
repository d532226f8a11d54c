"""Tasks of lm-evaluation-harness."""

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class TasksConfig(Section):
    """Tasks of lm-evaluation-harness that are asked in one way."""

    names: tuple[str, ...] = Field(
        min_length=1,
        description="Tasks or groups, by the harness' names; without a hub: bld_piqa, bld_siqa, bld_openbookqa, bld_boolq, bld_mmlu_sample.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples before a question; default: each task's own.")
    apply_chat_template: bool = Field(False, description="Ask in the model's chat template.")
    limit: int | None = Field(None, ge=1, description="Questions of each task, the first ones; default: all.")
    seed: int | None = Field(
        None, description="Seed of few-shot examples and of sampling; default: the harness' own seeds."
    )
    max_gen_toks: int | None = Field(
        None, ge=1, description="Tokens of a generated answer; default: each task's own, or 256."
    )
    start: str | None = Field(
        None, description="Token put before a question, by name; default: what the tokenizer itself puts there."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of the model; auto: what its weights are saved in, or float32 on a CPU "
        "without instructions for bfloat16. In bfloat16 options can tie; the first then counts.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Requests in a forward pass; default: what fits into a GPU's memory; on a CPU, 2,048 tokens.",
    )
    include_path: str | None = Field(
        None, description="Folder of task files (YAML) of your own; Python functions that they name are run."
    )
    metrics: dict[str, str] = Field(
        {},
        description="A task's figure in tables, as in {gsm8k: 'exact_match,flexible-extract'}; default: acc_norm, or else its first one.",
    )
