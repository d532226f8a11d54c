"""A student's start made alone, and where it stands before its first step."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import Recipe, StudentConfig, corpora_of, student_config
from pipeline.runtime import log
from pipeline.runtime.devices import compute_device
from pipeline.runtime.huggingface import load_model
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.special_ids import SpecialIds
from schemas import dump_files
from schemas.manifest import read_json, write_json
from stage2_student.evaluation.scored_text import Reader
from stage2_student.evaluation.start_figures import Asked, start_figures
from stage2_student.evaluation.token_windows import window_size
from stage2_student.model.initial_student import (
    StudentTokenizer,
    control_sources,
    end_tokens,
    export_start,
    student_tokenizer,
)
from stage2_student.model.row_sources import row_sources
from stage2_student.model.row_starts import IN_PIECES
from stage2_student.model.start_identity import is_made, start_identity
from stage2_student.runs import folder
from stage2_student.runs.begun import as_begun
from stage2_student.runs.checkpoints import checkpoint_steps

FIGURES = "start.json"
BEFORE, AFTER = "before the move", "after the move"


def make_start(recipe: Recipe, limit: int | None = None) -> dict[str, Any]:
    """Make the start of a recipe's run, unless it is there, and measure it on the recipe's `eval` text.

    Args:
        limit: documents of each text.
    Returns:
        What RUN/start.json then holds: `rows`, how they were made (`transfer.json`), and `text`, the `start_figures` by
        corpus.
    Raises:
        ValueError: the run has checkpoints, and began from another start.
    """
    recipe, remarks = as_begun(recipe)
    student = student_config(recipe)
    run = Path(student.path)
    corpora = corpora_of(recipe)
    with folder.lock(run):
        for remark in remarks:
            log.info(f"{run}: {remark}")
        made = student_tokenizer(student, recipe.corpus.has_chats)
        ids = end_tokens(student, made.tokenizer, made.chat)
        _remove_another(run, student, made, ids)
        start = export_start(recipe, recipe.corpus.has_chats)
        chats = any(corpus.has_chats for corpus in corpora.values())
        max_tokens = None if recipe.eval is None else recipe.eval.max_tokens
        before, after, is_made_V = asked_models(student, start, ids, chats, max_tokens)
        figures = {
            "rows": read_json(start / dump_files.TRANSFER, remedy="Delete that folder to make it anew"),
            "text": {name: start_figures(after, before, is_made_V, corpus, limit) for name, corpus in corpora.items()},
        }
        write_json(run / FIGURES, figures)
    return figures


def _remove_another(run: Path, student: StudentConfig, made: StudentTokenizer, ids: SpecialIds) -> None:
    """Remove a start that the recipe would make otherwise, unless a run has begun from it."""
    start = run / dump_files.START
    template_sha256 = None if made.chat is None else made.chat.template.sha256
    if not start.exists() or is_made(start, start_identity(student, made.tokenizer.sha256, ids, template_sha256)):
        return
    if checkpoint_steps(run):
        raise ValueError(
            f"{run} holds checkpoints of a run that began from another start, or one by an earlier release; give a new "
            "student.path to see where this recipe's start stands"
        )
    log.info(f"{start}: another recipe's; it is made anew")
    shutil.rmtree(start)


def asked_models(
    student: StudentConfig, start: Path, ids: SpecialIds, chats: bool, max_tokens: int | None
) -> tuple[Asked, Asked, np.ndarray]:
    """Load the model before and after the move, and tell which of its tokens' rows were made (bool).

    Args:
        student: whose model is moved.
        start: folder of the moved model, or of one trained from it.
        ids: of the new tokenizer's start and end.
        chats: with chat templates.
        max_tokens: of a window; None for the models' own limit.
    Raises:
        ValueError: the old tokenizer has no start token.
    """
    source = resolve_model(student.source)
    moved = ModelSource(str(start), None, student.trust_remote_code)
    before, after = (load_model(where, torch.float32).eval().to(compute_device()) for where in (source, moved))
    new, new_chat, _ = student_tokenizer(student, chats)
    old, old_chat, _ = student_tokenizer(student.model_copy(update={"tokenizer": None}), chats)
    num_rows = before.get_input_embeddings().weight.shape[0]
    controls = control_sources(old, new, ids, num_rows)
    is_made_V = np.zeros(len(new.token_bytes), dtype=bool)
    if old.sha256 != new.sha256:
        is_made_V = np.isin(row_sources(old, new, controls, num_rows)[1], IN_PIECES)
    start_id = controls.get(ids.document_start, old.default_start)
    if start_id is None:
        raise ValueError(f"{student.model}: its tokenizer has no start token, nor one called as student.start")
    return (
        Asked(before, Reader(BEFORE, old, old_chat, start_id), window_size(before.config, max_tokens, BEFORE)),
        Asked(after, Reader(AFTER, new, new_chat, ids.document_start), window_size(after.config, max_tokens, AFTER)),
        is_made_V,
    )
