"""From a checkpoint to a plain Hugging Face folder; the byte interface stays behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.recipe import load_recipe
from stage2_student import run_folder
from stage2_student.start import load_start, student_config


def export(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the newest complete checkpoint as safetensors, config, tokenizer and generation config; returns the folder.

    The weights have the dtype that was trained with. `out` (default: RUN/export) is absent or complete, and replaced.
    Raises ValueError where there is no checkpoint, or `out` holds something else.
    """
    run = Path(run)
    out = Path(out) if out is not None else run / "export"
    steps = run_folder.checkpoint_steps(run)
    if not steps:
        raise ValueError(f"{run / 'checkpoints'} holds no complete checkpoint; run `bld student` first")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise ValueError(f"{out} exists and is not a model; give another folder")
    recipe = load_recipe(run / "recipe.yaml")
    trust = student_config(recipe).trust_remote_code
    model = load_start(run / "start", trust)
    _fill(model, _language_model(run, steps[-1]))
    model.config.use_cache = True
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(getattr(torch, recipe.train.dtype)).save_pretrained(partial)
    AutoTokenizer.from_pretrained(run / "start", trust_remote_code=trust).save_pretrained(partial)
    (partial / "distilled.json").write_text(json.dumps({"step": steps[-1]}) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    return partial.replace(out)


def _language_model(run: Path, step: int) -> dict[str, Tensor]:
    """The checkpoint's weights without the interface's, under the model's own names."""
    from stage2_student.deepspeed_engine import checkpoint_weights  # seconds to import

    weights = checkpoint_weights(run / "checkpoints", run_folder.checkpoint_name(step))
    return {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Load every weight. A tied head may be absent, since it is the embedding; anything else is an error."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {
        name
        for name, value in model.named_parameters(remove_duplicate=False)
        if value is model.get_input_embeddings().weight
    }
    lacking = set(missing) - tied
    if lacking or unexpected:
        raise ValueError(
            f"the checkpoint does not fit the start model: lacking {sorted(lacking)}, unknown {unexpected}"
        )
