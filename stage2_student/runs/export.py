"""Export of a checkpoint as a plain Hugging Face folder, without the byte interface."""

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
from stage2_student.acceleration.four_bit import round_base
from stage2_student.model.initial_student import load_start, tokenizer_moved
from stage2_student.model.lora import add_adapters
from stage2_student.model.rows_alone import freeze_body
from stage2_student.model.tokenizer_folder import read_tokenizer, save_tokenizer
from stage2_student.runs import folder
from stage2_student.runs.checkpoint_files import AVERAGE, find_damage
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps
from stage2_student.runs.retention import best_step


def export(run: Path | str, out: Path | str | None = None, step: int | None = None, best: bool = False) -> Path:
    """Write a complete checkpoint as safetensors, config, tokenizer and generation config; returns the folder.

    The weights have the training dtype, with adapters merged into them.

    Args:
        out: folder to write (default: RUN/export); it is absent or complete at any time, and replaced if it exists.
        step: the checkpoint to export; by default the newest.
        best: export the checkpoint with the lowest bits per byte on held-out text instead.
    Raises:
        ValueError: there is no such checkpoint, it is damaged, or `out` holds something other than a model.
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
        round_base(model, student)
        _fill(model, _language_model(run, step, model))
        model = adapted.merge_and_unload()
    else:
        if student.trained == "rows":
            freeze_body(model)
        _fill(model, _language_model(run, step, model))
    model.config.use_cache = True
    with committed_folder(out) as partial:
        model.to(getattr(torch, recipe.train.dtype)).save_pretrained(partial)
        save_tokenizer(read_tokenizer(run / "start", folder.tokenizer_sha256(run), trust), partial, trust)
        origin = {"step": step, "newest": checkpoint_steps(run)[-1]}
        (partial / dump_files.DISTILLED).write_text(json.dumps(origin) + "\n", encoding="utf-8")
    return out


def exported(run: Path) -> Path:
    """Return the run's export, made from the newest checkpoint if there is none.

    An existing one is kept: it may be of a checkpoint that the operator has chosen.
    """
    return run / "export" if (run / "export" / "config.json").exists() else export(run)


def is_due(run: Path) -> bool:
    """Tell whether RUN/export of a finished run is absent, or older than the run's newest checkpoint.

    The checkpoint that it was made from does not matter: an operator may have exported an earlier one.
    """
    path = run / "export" / dump_files.DISTILLED
    if not (run / "export").exists():
        return True
    if not path.exists():
        return False
    values = read_json(path, "step", remedy="Delete it, and run `bld export` again")
    newest = checkpoint_steps(run)[-1]
    if "newest" in values:
        return bool(values["newest"] != newest)
    return bool(values["step"] != newest and folder.was_passed(run, values["step"]))  # by an earlier release


def _chosen_step(run: Path, step: int | None, best: bool) -> int:
    """Return the step to export. Raises ValueError if there is no such checkpoint, or it is damaged."""
    steps = checkpoint_steps(run)
    if not steps:
        raise ValueError(f"{run / 'checkpoints'} holds no complete checkpoint; run `bld student` first")
    if best and step is not None:
        raise ValueError(f"--best and --step {step} cannot be combined: give one of them")
    chosen = best_step(run) if best else (steps[-1] if step is None else step)
    if chosen is None:
        raise ValueError(
            f"{run / 'checkpoints'}: none of {steps} was evaluated, so none is the best; train with train.eval_every"
        )
    if chosen not in steps:
        raise ValueError(f"{run / 'checkpoints'} holds no complete checkpoint of step {chosen}; there are {steps}")
    if (damage := find_damage(run / "checkpoints" / checkpoint_name(chosen))) is not None:
        raise ValueError(
            f"the checkpoint of step {chosen} in {run / 'checkpoints'} cannot be loaded: {damage}. "
            f"Give another step; there are {steps}"
        )
    return chosen


def _language_model(run: Path, step: int, model: Any) -> dict[str, Tensor]:
    """Return the checkpoint's weights without the interface's, under the model's own names.

    Those are the averaged ones, if the run keeps an average.
    """
    from stage2_student.distributed.deepspeed_engine import checkpoint_weights  # seconds to import

    weights = checkpoint_weights(run / "checkpoints", checkpoint_name(step))
    own = {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}
    average = run / "checkpoints" / checkpoint_name(step) / AVERAGE
    if not average.exists():
        return own
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # a tied head under both its names
    buffers = {name: value for name, value in own.items() if name not in trained}
    return buffers | torch.load(average, map_location="cpu", weights_only=True)


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Load all trained weights into a model.

    A tied head may be absent, because it is the embedding; ValueError for any other missing or unknown weight.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    named = list(model.named_parameters(remove_duplicate=False))
    tied = {name for name, value in named if value is model.get_input_embeddings().weight}
    frozen = {name for name, value in named if not value.requires_grad}
    lacking = set(missing) - tied - frozen
    if lacking or unexpected:
        raise ValueError(
            f"the checkpoint does not match the start model: missing {sorted(lacking)}, unknown {unexpected}"
        )
