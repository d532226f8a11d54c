"""From a checkpoint to a plain Hugging Face folder; the byte interface stays behind."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import student_config
from pipeline.config.loading import load_recipe
from schemas import dump_files
from schemas.manifest import read_json
from schemas.storage.atomic import committed_folder
from stage2_student.model.initial_student import load_start, tokenizer_moved
from stage2_student.model.lora import add_adapters
from stage2_student.model.tokenizer_folder import read_tokenizer, save_tokenizer
from stage2_student.runs import folder
from stage2_student.runs.checkpoint_files import find_damage
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps
from stage2_student.runs.retention import best_step

_STEP_FILE = "distilled.json"


def export(run: Path | str, out: Path | str | None = None, step: int | None = None, best: bool = False) -> Path:
    """Write a complete checkpoint as safetensors, config, tokenizer and generation config; returns the folder.

    The weights have the dtype that was trained with; adapters are merged into them. `out` (default: RUN/export) is
    absent or complete, and replaced. `step`: which checkpoint; the newest by default, with `best` the one of the fewest
    bits per byte on held-out text. Raises ValueError where there is no such checkpoint, it is damaged, or `out` holds
    something else.
    """
    run = Path(run)
    out = Path(out) if out is not None else run / "export"
    step = _chosen_step(run, step, best)
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise ValueError(f"{out} exists and is not a model; give another folder")
    recipe = load_recipe(run / dump_files.RECIPE)
    student = student_config(recipe)
    trust = student.trust_remote_code
    model = load_start(run / "start", trust)
    if student.lora_rank:
        adapted = add_adapters(model, student, tokenizer_moved(run / "start"), folder.adapters_by_peft(run))
        _fill(model, _language_model(run, step))
        model = adapted.merge_and_unload()
    else:
        _fill(model, _language_model(run, step))
    model.config.use_cache = True
    with committed_folder(out) as partial:
        model.to(getattr(torch, recipe.train.dtype)).save_pretrained(partial)
        save_tokenizer(read_tokenizer(run / "start", folder.tokenizer_sha256(run), trust), partial, trust)
        said = {"step": step, "newest": checkpoint_steps(run)[-1]}
        (partial / _STEP_FILE).write_text(json.dumps(said) + "\n", encoding="utf-8")
    return out


def is_due(run: Path) -> bool:
    """Whether RUN/export is not there, or was made before the run had gone as far as it has; of a run that has ended.

    Which checkpoint is in it does not matter: an operator may have chosen another than the newest.
    """
    said = run / "export" / _STEP_FILE
    if not (run / "export").exists():
        return True
    if not said.exists():
        return False
    values, newest = (
        read_json(said, "step", remedy="Delete it, and run `bld export` again"),
        checkpoint_steps(run)[-1],
    )
    if "newest" in values:
        return bool(values["newest"] != newest)
    return bool(values["step"] != newest and folder.was_passed(run, values["step"]))  # by an earlier release


def _chosen_step(run: Path, step: int | None, best: bool) -> int:
    """Raises ValueError where there is no such checkpoint, or it is damaged."""
    steps = checkpoint_steps(run)
    if not steps:
        raise ValueError(f"{run / 'checkpoints'} holds no complete checkpoint; run `bld student` first")
    if best and step is not None:
        raise ValueError(f"--best and --step {step} do not go together: give one of them")
    chosen = best_step(run) if best else (steps[-1] if step is None else step)
    if chosen is None:
        raise ValueError(
            f"{run / 'checkpoints'}: none of {steps} was evaluated, so none is best; train with train.eval_every"
        )
    if chosen not in steps:
        raise ValueError(f"{run / 'checkpoints'} holds no complete checkpoint of step {chosen}; there are {steps}")
    if (damage := find_damage(run / "checkpoints" / checkpoint_name(chosen))) is not None:
        raise ValueError(
            f"the checkpoint of step {chosen} in {run / 'checkpoints'} cannot be loaded: {damage}. Name another one; there are {steps}"
        )
    return chosen


def _language_model(run: Path, step: int) -> dict[str, Tensor]:
    """The checkpoint's weights without the interface's, under the model's own names."""
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights  # seconds to import

    weights = checkpoint_weights(run / "checkpoints", checkpoint_name(step))
    return {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Load every weight that was trained. A tied head may be absent, since it is the embedding; anything else is an
    error.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    named = list(model.named_parameters(remove_duplicate=False))
    tied = {name for name, value in named if value is model.get_input_embeddings().weight}
    frozen = {name for name, value in named if not value.requires_grad}
    lacking = set(missing) - tied - frozen
    if lacking or unexpected:
        raise ValueError(
            f"the checkpoint does not fit the start model: lacking {sorted(lacking)}, unknown {unexpected}"
        )
