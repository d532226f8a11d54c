"""The student before its first step: loaded, moved to its tokenizer, and kept in `<student.path>/start`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from pipeline.config import Recipe, StudentConfig, student_config
from pipeline.covering.vocabulary import check_head_rows
from pipeline.runtime import log
from pipeline.runtime.huggingface import check_finite, counts_from_padding, load_model, load_tokenizer
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import write_json
from schemas.storage.atomic import committed_folder
from stage2_student.model.chat_template import with_template
from stage2_student.model.drop_layers import drop_layers
from stage2_student.model.tokenizer_folder import save_tokenizer
from stage2_student.model.vocabulary_transfer import transfer


class StudentTokenizer(NamedTuple):
    """The tokenizer that the student will have: as bytes, with its chat template (None: it meets no chats), and as
    transformers has it.
    """

    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None
    wrapped: Any


def student_tokenizer(student: StudentConfig, chats: bool = False) -> StudentTokenizer:
    """The student's tokenizer; with `chats`, it has a chat template. Raises ValueError where there is none to be
    had.
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

    Raises ValueError where neither recipe nor tokenizer (with `chat`, the template, which says what ends a turn) names
    one.
    """
    start = tokenizer.token_id(student.start) if student.start else tokenizer.default_start
    default = tokenizer.default_end if chat is None else chat.end_of_turn()
    end = tokenizer.token_id(student.end) if student.end else default
    if start is None or end is None:
        raise ValueError(
            f"the student's tokenizer has no {'start' if start is None else 'end'} token of its own; name one of "
            f"{sorted(tokenizer.control)[:5]} as student.start and student.end"
        )
    if chat is not None and end != default:
        raise ValueError(
            f"student.end is {student.end}, which is not what the student's chat template puts after a turn of the assistant; leave "
            "student.end out, or give another student.chat_template"
        )
    return SpecialIds(start, (end,))


def export_start(recipe: Recipe, chats: bool = False) -> Path:
    """Write the student as it starts to `<student.path>/start`, absent or complete; one that is there is kept.

    Args:
        chats: it will learn from chats, and needs a chat template.
    """
    student = student_config(recipe)
    folder = Path(student.path) / "start"
    if folder.exists():
        return folder
    source = resolve_model(student.source)
    tokenizer, chat, wrapped = student_tokenizer(student, chats)
    model = load_model(source, "auto")
    check_finite(model, student.model)
    if student.drop_layers:
        model = drop_layers(model, student.drop_layers)
    ids = end_tokens(student, tokenizer, chat)
    old = ByteTokenizer.load(source)
    counts = _move(model, old, tokenizer, ids, student.averaged_scale)
    check_head_rows(model.get_output_embeddings().weight.shape[0], tokenizer.token_bytes)
    with committed_folder(folder) as partial:
        model.save_pretrained(partial)
        if counts:
            _check_readable(student, model.config)
        save_tokenizer(wrapped, partial, student.trust_remote_code)
        write_json(partial / "transfer.json", counts)
    return folder


def _check_readable(student: StudentConfig, config: Any) -> None:
    """Raise ValueError where transformers does not give back the moved model: some types (xglm) take the id that pads
    for a position, of which there are fewer than tokens.
    """
    if counts_from_padding(config):
        raise ValueError(
            f"{student.model} cannot move to {student.tokenizer}: a model of type {config.model_type} counts its positions from the id that "
            "pads, and another tokenizer has another token there. Take a student.model of another type, or leave student.tokenizer out"
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=student.trust_remote_code)
    except Exception as error:
        raise ValueError(
            f"{student.model} cannot move to {student.tokenizer}: transformers does not make a model of type {config.model_type} with the ids of "
            f"its control tokens ({type(error).__name__}: {error}). Take a student.model of another type, or leave student.tokenizer out"
        ) from error


def _move(model: Any, old: ByteTokenizer, new: ByteTokenizer, ids: SpecialIds, averaged_scale: float) -> dict[str, int]:
    """Move the model to its new tokenizer, if that is another; set its control ids. Returns the counts."""
    counts: dict[str, int] = {}
    if old.sha256 != new.sha256:
        rows = model.get_input_embeddings().weight.shape[0]
        moved = transfer(model, old, new, control_sources(old, new, ids, rows), averaged_scale)
        log.info(f"{len(new.token_bytes):,} rows of the new tokenizer: {moved}")
        counts = moved.as_dict()
        model.config.pad_token_id = model.generation_config.pad_token_id = ids.end
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = ids.document_start, ids.end
    return counts


def control_sources(old: ByteTokenizer, new: ByteTokenizer, ids: SpecialIds, old_rows: int) -> dict[int, int]:
    """New id -> old id of control tokens: the old token of the same name that has a row; for start and end else the one
    in the same role.
    """
    roles = (
        (ids.end, old.default_end),
        (ids.document_start, old.default_start),
    )  # where they are one token, start decides
    sources = {new_id: old_id for new_id, old_id in roles if old_id is not None}
    named = {new_id: old.control[name] for name, new_id in new.control.items() if name in old.control}
    return sources | {new_id: old_id for new_id, old_id in named.items() if old_id < old_rows}


def tokenizer_moved(folder: Path) -> bool:
    """Whether the start model in `folder` has another tokenizer than the model it comes from."""
    return bool(json.loads((folder / "transfer.json").read_text(encoding="utf-8")))


def load_start(folder: Path, trust_remote_code: bool) -> Any:
    """The start model with float32 weights, on the CPU. Raises ValueError where they are not finite."""
    model = load_model(ModelSource(str(folder), None, trust_remote_code), torch.float32)
    check_finite(model, str(folder))
    model.config.use_cache = False
    return model
