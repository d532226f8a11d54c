"""The student before its first step: loaded, moved to its tokenizer, and kept in `<student.path>/start`."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import Recipe, StudentConfig
from pipeline.source import resolve_model, resolve_tokenizer
from pipeline.tokenizer_bytes import ByteTokenizer
from schemas.manifest import write_json
from stage2_student.layers import drop_layers
from stage2_student.transfer import transfer


@dataclass(frozen=True)
class Ends:
    """The student's control tokens, by id: put before a document, and after it."""

    start: int
    end: int


def student_config(recipe: Recipe) -> StudentConfig:
    """The recipe's student section. Raises ValueError where there is none."""
    if recipe.student is None:
        raise ValueError("the recipe has no student section; add one (student: {model: ..., path: ...}) to train")
    return recipe.student


def student_tokenizer(student: StudentConfig) -> tuple[ByteTokenizer, str]:
    """The tokenizer that the student will have, and the folder or hub name it comes from."""
    source = (
        resolve_tokenizer(student.tokenizer) if student.tokenizer else resolve_model(student.model, student.revision)
    )
    return ByteTokenizer.load(source, student.trust_remote_code), source


def end_tokens(student: StudentConfig, tokenizer: ByteTokenizer) -> Ends:
    """Ids of `student.start` and `student.end`. Raises ValueError where neither recipe nor tokenizer names one."""
    start = tokenizer.token_id(student.start) if student.start else tokenizer.default_start
    end = tokenizer.token_id(student.end) if student.end else tokenizer.default_end
    if start is None or end is None:
        raise ValueError(
            f"the student's tokenizer has no {'start' if start is None else 'end'} token of its own; name one of "
            f"{sorted(tokenizer.control)[:5]} as student.start and student.end"
        )
    return Ends(start, end)


def export_start(recipe: Recipe) -> Path:
    """Write the student as it starts to `<student.path>/start`, absent or complete; one that is there is kept."""
    student = student_config(recipe)
    folder = Path(student.path) / "start"
    if folder.exists():
        return folder
    model_source = resolve_model(student.model, student.revision)
    tokenizer, tokenizer_source = student_tokenizer(student)
    trust = {"trust_remote_code": student.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(model_source, revision=student.revision, dtype="auto", **trust)
    if student.drop_layers:
        model = drop_layers(model, student.drop_layers)
    counts = _move(model, ByteTokenizer.load(model_source, student.trust_remote_code), tokenizer, student)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was interrupted
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(tokenizer_source, **trust).save_pretrained(partial)
    write_json(partial / "transfer.json", counts)
    partial.replace(folder)
    return folder


def _move(model: Any, old: ByteTokenizer, new: ByteTokenizer, student: StudentConfig) -> dict[str, int]:
    """Move the model to its new tokenizer, if that is another; set its control ids. Returns the counts."""
    ends = end_tokens(student, new)
    counts: dict[str, int] = {}
    if old.sha256 != new.sha256:
        counts = transfer(model, old, new, control_sources(old, new, ends)).as_dict()
        model.config.pad_token_id = model.generation_config.pad_token_id = ends.end
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = ends.start, ends.end
    return counts


def control_sources(old: ByteTokenizer, new: ByteTokenizer, ends: Ends) -> dict[int, int]:
    """New id -> old id of the start and end tokens: the old token of the same name, else the one in the same role."""
    names = {token_id: name for name, token_id in new.control.items()}
    roles = ((ends.end, old.default_end), (ends.start, old.default_start))  # where they are one token, start decides
    sources = {new_id: old.control.get(names.get(new_id, ""), fallback) for new_id, fallback in roles}
    return {new_id: old_id for new_id, old_id in sources.items() if old_id is not None}


def tokenizer_moved(folder: Path) -> bool:
    """Whether the start model in `folder` has another tokenizer than the model it comes from."""
    return bool(json.loads((folder / "transfer.json").read_text(encoding="utf-8")))


def load_start(folder: Path, trust_remote_code: bool) -> Any:
    """The start model with float32 weights, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    return model
