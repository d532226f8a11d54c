"""The initial student: loaded, moved to its tokenizer, and kept in `<student.path>/start`."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from pipeline.config import Recipe, StudentConfig, student_config
from pipeline.covering.vocabulary import check_head_rows
from pipeline.runtime import log
from pipeline.runtime.huggingface import check_finite, counts_from_padding, load_model, load_tokenizer
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.file_hash import weights_sha256
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas import dump_files
from schemas.manifest import write_json
from schemas.storage.atomic import committed_folder
from stage2_student.model.chat_template import with_template
from stage2_student.model.drop_layers import drop_layers
from stage2_student.model.old_model import OldModel
from stage2_student.model.start_identity import MADE_FROM, start_identity
from stage2_student.model.tokenizer_folder import save_tokenizer
from stage2_student.model.vocabulary_transfer import plan_move, transfer


class StudentTokenizer(NamedTuple):
    """The student's future tokenizer.

    Attributes:
        tokenizer: its view as bytes.
        chat: it with its chat template; None if the student meets no chats.
        wrapped: the transformers tokenizer.
    """

    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None
    wrapped: Any


def student_tokenizer(student: StudentConfig, chats: bool = False) -> StudentTokenizer:
    """Load the student's tokenizer; with `chats`, with a chat template.

    Raises:
        ValueError: there is no chat template.
    """
    if student.tokenizer is None:
        source = resolve_model(student.source)
    else:
        source = ModelSource(resolve_tokenizer(student.tokenizer, own=True), None, student.trust_remote_code)
    wrapped = load_tokenizer(source)
    if not chats:
        return StudentTokenizer(ByteTokenizer.from_wrapped(wrapped, source.source), None, wrapped)
    wrapped = with_template(wrapped, student)
    tokenizer = ByteTokenizer.from_wrapped(wrapped, source.source)
    return StudentTokenizer(tokenizer, ChatTokenizer(tokenizer, wrapped), wrapped)


def end_tokens(student: StudentConfig, tokenizer: ByteTokenizer, chat: ChatTokenizer | None = None) -> SpecialIds:
    """Find the ids of `student.start` and `student.end`.

    With `chat`, the template decides what ends a turn.

    Raises:
        ValueError: neither the recipe nor the tokenizer (with `chat`: the template) names one.
    """
    start = tokenizer.token_id(student.start) if student.start else tokenizer.default_start
    default = tokenizer.default_end if chat is None else chat.end_of_turn()
    end = tokenizer.token_id(student.end) if student.end else default
    if start is None or end is None:
        raise ValueError(
            f"the student's tokenizer names no {'start' if start is None else 'end'} token; give "
            f"student.{'start' if start is None else 'end'}, e.g. one of {sorted(tokenizer.control)[:5]}"
        )
    if chat is not None and end != default:
        raise ValueError(
            f"student.end is {student.end}, but the student's chat template ends an assistant turn with another token; "
            "leave student.end out, or give another student.chat_template"
        )
    return SpecialIds(start, (end,))


def export_start(recipe: Recipe, chats: bool = False) -> Path:
    """Write the initial student to `<student.path>/start`, which is absent or complete; an existing one is kept.

    Args:
        chats: it will learn from chats, and needs a chat template.
    """
    student = student_config(recipe)
    folder = Path(student.path) / dump_files.START
    if folder.exists():
        return folder
    began = time.monotonic()
    source = resolve_model(student.source)
    tokenizer, chat, wrapped = student_tokenizer(student, chats)
    model = load_model(source, "auto")
    check_finite(model, student.model)
    if student.drop_layers:
        model = drop_layers(model, student.drop_layers)
    ids = end_tokens(student, tokenizer, chat)
    how = _move(recipe, model, ByteTokenizer.load(source), tokenizer, ids)
    check_head_rows(model.get_output_embeddings().weight.shape[0], tokenizer.token_bytes)
    with committed_folder(folder) as partial:
        model.save_pretrained(partial)
        if how:
            _check_readable(student, model.config)
            how["seconds"] = round(time.monotonic() - began, 1)
        save_tokenizer(wrapped, partial, student.trust_remote_code)
        write_json(partial / dump_files.TRANSFER, how)
        template_sha256 = None if chat is None else chat.template.sha256
        write_json(partial / MADE_FROM, start_identity(student, tokenizer.sha256, ids, template_sha256))
    return folder


def _check_readable(student: StudentConfig, config: Any) -> None:
    """Check that transformers can load the moved model.

    Some model types (xglm) use the padding id as a position, and there are fewer positions than tokens.

    Raises:
        ValueError: it cannot.
    """
    if counts_from_padding(config):
        raise ValueError(
            f"{student.model} cannot move to {student.tokenizer}: a model of type {config.model_type} counts its "
            "positions from the padding id, which is another token in another tokenizer. "
            "Use a student.model of another type, or leave student.tokenizer out"
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=student.trust_remote_code)
    except Exception as error:
        raise ValueError(
            f"{student.model} cannot move to {student.tokenizer}: transformers cannot make a model of type "
            f"{config.model_type} with the ids of its control tokens ({type(error).__name__}: {error}). "
            "Use a student.model of another type, or leave student.tokenizer out"
        ) from error


def _move(recipe: Recipe, model: Any, old: ByteTokenizer, new: ByteTokenizer, ids: SpecialIds) -> dict[str, Any]:
    """Move the model to its new tokenizer, if that is another one, and set its control ids.

    Returns how: rows by kind, and how they were made; empty if it did not move.
    """
    how: dict[str, Any] = {}
    if old.sha256 != new.sha256:
        student = student_config(recipe)
        num_rows = model.get_input_embeddings().weight.shape[0]
        controls = control_sources(old, new, ids, num_rows)
        start_id = controls.get(ids.document_start, old.default_start)
        source = resolve_model(student.source)
        # Code that comes with a model decides what it computes, and is no part of the hash.
        weights = None if student.trust_remote_code else weights_sha256(source.source, source.revision)
        old_model = OldModel(lambda: load_model(source, torch.float32), student.model, num_rows, start_id, weights)
        moved = transfer(model, plan_move(recipe, (old, new), controls, ids.document_start, old_model))
        log.info(f"{len(new.token_bytes):,} rows of the new tokenizer: {moved.counts}")
        inputs, outputs = moved.row_kinds
        made = {"input": inputs, "output": outputs, "tie": student.transfer.tie, "tied": moved.tied}
        how = {**moved.counts.as_dict(), **made, **moved.facts}
        if moved.folding is not None:
            how["folded_bias"] = moved.folding._asdict()
        model.config.pad_token_id = model.generation_config.pad_token_id = ids.end
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = ids.document_start, ids.end
    return how


def control_sources(old: ByteTokenizer, new: ByteTokenizer, ids: SpecialIds, old_rows: int) -> dict[int, int]:
    """Return new id -> old id of control tokens.

    The old token is the one of the same name, if it has a row; for start and end, otherwise the one in the same role.
    """
    # If start and end are one token, start decides.
    roles = ((ids.end, old.default_end), (ids.document_start, old.default_start))
    sources = {new_id: old_id for new_id, old_id in roles if old_id is not None}
    named = {new_id: old.control[name] for name, new_id in new.control.items() if name in old.control}
    return sources | {new_id: old_id for new_id, old_id in named.items() if old_id < old_rows}


def tokenizer_moved(folder: Path) -> bool:
    """Return whether the start model in `folder` has another tokenizer than the model it comes from."""
    return bool(json.loads((folder / dump_files.TRANSFER).read_text(encoding="utf-8")))


def load_start(folder: Path, trust_remote_code: bool) -> Any:
    """Load the start model with float32 weights, on the CPU.

    Raises:
        ValueError: the weights are not finite.
    """
    model = load_model(ModelSource(str(folder), None, trust_remote_code), torch.float32)
    check_finite(model, str(folder))
    model.config.use_cache = False
    return model
