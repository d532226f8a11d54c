"""The writer that a recipe names: its model, tokenizer, start and end tokens, and how it is sampled."""

from pathlib import Path
from typing import NamedTuple

from pipeline.config import Recipe, TeacherConfig, generate_config, student_config
from pipeline.dumps.licence import find_licence
from pipeline.runtime.huggingface import check_positions, load_config
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage1_teacher.generation.base import GeneratorRequest, Sampling
from stage1_teacher.generation.registry import check_generates
from stage1_teacher.targets.resolved import resolve_ids


class Writer(NamedTuple):
    """A model that writes, resolved.

    Attributes:
        section: as a recipe's teacher section, with windows that hold a prompt and its completion.
        model: a local folder or hub id; only a name for a served model whose tokenizer the recipe gives.
        chat: the tokenizer with its chat template, if prompts are chats.
        ids: its start token, and the tokens that are END.
        licence: as the model states it.
    """

    section: TeacherConfig
    model: str
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None
    ids: SpecialIds
    licence: str | None


def writer_section(recipe: Recipe) -> TeacherConfig:
    """Return the writer's section, before anything is looked up.

    Raises ValueError if the recipe has no student that could write, or its engine writes no text.
    """
    config, teacher = generate_config(recipe), recipe.teacher
    values = {key: getattr(teacher, key) for key in teacher.model_fields_set}
    if config.writer == "student":
        student = student_config(recipe)
        kept = {key: values[key] for key in ("dtype", "head_dtype", "engine") if key in values}
        values = kept | {
            "model": str(Path(student.path) / "export"),
            "start": student.start,
            "end": () if student.end is None else (student.end,),
            "trust_remote_code": student.trust_remote_code,
        }
    values |= {key: value for key in ("engine", "served_model") if (value := getattr(config, key)) is not None}
    values |= {"max_tokens": max(config.max_prompt_tokens + config.max_new_tokens, 8), "overlap_tokens": 0}
    section = TeacherConfig(**values)
    check_generates(section.engine)
    if section.engine_spec.needs_address and recipe.placement.base_url is None:
        raise ValueError(
            f"generate.engine: {section.engine} needs placement.base_url, e.g. "
            "placement.base_url=http://127.0.0.1:8000/v1"
        )
    return section


def resolve_writer(recipe: Recipe) -> Writer:
    """Find the model that writes and load its tokenizer.

    Raises ValueError if the student has not been exported, the model has too few positions, or prompts are chats and
    its tokenizer has no chat template.
    """
    config, section = generate_config(recipe), writer_section(recipe)
    if config.writer == "student" and not Path(section.model).is_dir():
        raise ValueError(
            f"generate.writer: student: {section.model} does not exist. Train it with `bld student`, or export a "
            f"checkpoint with `bld export {student_config(recipe).path}`"
        )
    model = section.source if section.is_mere_name else resolve_model(section.source)
    source = model
    if section.tokenizer:
        source = ModelSource(resolve_tokenizer(section.tokenizer), None, section.trust_remote_code)
    chat = ChatTokenizer.load(source) if config.prompts.has_chats else None
    tokenizer = ByteTokenizer.load(source) if chat is None else chat.tokenizer
    if not section.engine_spec.served:
        key = "generate.max_prompt_tokens + generate.max_new_tokens"
        check_positions(load_config(section.source.at(model.source)), section.max_tokens, key)
    ids = resolve_ids(recipe.with_values(teacher=section), tokenizer, chat)
    licence = section.license
    if licence is None and not section.is_mere_name:
        licence = find_licence(section.model, model.source, section.revision)
    return Writer(section, model.source, tokenizer, chat, ids, licence)


def generator_request(writer: Writer, recipe: Recipe) -> GeneratorRequest:
    """Return what a generator of this writer is opened with."""
    config = generate_config(recipe)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.stop, tuple(writer.ids.ends)
    )
    return GeneratorRequest(writer.model, writer.section, recipe.placement, writer.tokenizer, sampling)
