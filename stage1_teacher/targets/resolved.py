"""Resolution of the teacher that a recipe names: its model, its tokenizer, and its start and END tokens."""

from typing import NamedTuple

from pipeline.config import Recipe, check_engine_gives
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.special_ids import SpecialIds


class ResolvedTeacher(NamedTuple):
    """The teacher that a recipe names, resolved.

    Attributes:
        model: a local folder or hub id; only a name for a served model whose tokenizer the recipe gives.
        chat: the tokenizer with its chat template, if the corpus holds chats.
    """

    model: str
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None


def load_tokenizer(recipe: Recipe) -> ResolvedTeacher:
    """Find the model and load the tokenizer that the recipe names.

    Raises ValueError if the corpus holds chats and the tokenizer has no chat template, or if the engine cannot give
    what the recipe asks for.
    """
    teacher = recipe.teacher
    check_engine_gives(recipe)
    model = teacher.source if teacher.is_mere_name else resolve_model(teacher.source)
    source = model
    if teacher.tokenizer:
        source = ModelSource(resolve_tokenizer(teacher.tokenizer), None, teacher.trust_remote_code)
    if recipe.corpus.has_chats:
        chat = ChatTokenizer.load(source)
        return ResolvedTeacher(model.source, chat.tokenizer, chat)
    return ResolvedTeacher(model.source, ByteTokenizer.load(source), None)


def resolve_ids(recipe: Recipe, tokenizer: ByteTokenizer, chat: ChatTokenizer | None = None) -> SpecialIds:
    """Find the start token and the tokens that mean END: the recipe's, or else the tokenizer's.

    For chats there is no start token, because the template writes it, and END is what ends a turn of the assistant.
    """
    teacher = recipe.teacher
    ends = tuple(tokenizer.token_id(name) for name in teacher.end)
    default = tokenizer.default_end if chat is None else chat.end_of_turn()
    if ends and chat is not None and default not in (None, *ends):
        name = next(name for name, token in tokenizer.control.items() if token == default)
        raise ValueError(
            f"teacher.end names {', '.join(teacher.end)}, but the chat template ends the assistant's turn with {name}: "
            "add that to teacher.end, or leave teacher.end out"
        )
    if not ends and default is not None:
        ends = (default,)
    if not ends:
        raise ValueError(
            "the teacher's tokenizer names no end token; give teacher.end, e.g. teacher.end=[<|endoftext|>]"
            if chat is None
            else "the teacher's chat template writes no control token after what the assistant says, so that a turn "
            "has no END; give another tokenizer or template"
        )
    if chat is not None:
        return SpecialIds(None, ends)
    start = tokenizer.token_id(teacher.start) if teacher.start else tokenizer.default_start
    if start is None:
        raise ValueError(
            "the teacher's tokenizer names no start token; give teacher.start, e.g. teacher.start=<|endoftext|>"
        )
    return SpecialIds(start, ends)
