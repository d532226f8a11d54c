"""Opening of a teacher: its engine is started, and its rows are checked against the model's own output."""

from collections.abc import Callable
from traceback import walk_tb

from pipeline.config import Recipe
from pipeline.config.engines import other_engine
from pipeline.covering.vocabulary import Vocabulary, check_head_rows
from pipeline.runtime import log
from pipeline.runtime.dtypes import slow_dtype
from pipeline.runtime.huggingface import load_config
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage1_teacher.engines.base import Engine, EngineRequest, ListingEngine
from stage1_teacher.engines.branch_check import branching_fault, with_branches
from stage1_teacher.engines.registry import open_engine
from stage1_teacher.engines.self_check import check_engine
from stage1_teacher.targets.resolved import resolve_ids
from stage1_teacher.targets.teacher import Teacher


def open_teacher(
    recipe: Recipe,
    model: str,
    tokenizer: ByteTokenizer,
    chat: ChatTokenizer | None = None,
    branches: bool = False,
    over_machines: bool = False,
) -> Teacher:
    """Start the engine, which is used only after `check_engine` has found that its rows are the model's own.

    Args:
        chat: the tokenizer with its chat template, if the corpus holds chats.
        branches: branch rows will be requested even if the recipe's covering has none. The engine is the same; whether
            it can compute them is checked.
        over_machines: see `EngineRequest`.
    """
    teacher, placement = recipe.teacher, recipe.placement
    source = teacher.source.at(model)
    ids = resolve_ids(recipe, tokenizer, chat)
    required = recipe.dump.covering.beam_width > 0
    request = EngineRequest(model, teacher, placement, tokenizer, ids.start, ids.ends, required, over_machines)
    if not teacher.engine_spec.whole_softmax:
        return _open_listing(recipe, request, chat, ids.ends)
    if slow := slow_dtype("teacher.dtype", teacher.dtype):
        log.warning(slow)
    config = load_config(source)
    if (width := getattr(config.get_text_config(), "vocab_size", None)) is not None:
        check_head_rows(width, tokenizer.token_bytes)  # before an engine starts, which may take minutes
    named = f"{teacher.model} ({', '.join(config.architectures or [config.model_type])})"

    def open_checked() -> Engine:
        engine = open_engine(request)
        assert not isinstance(engine, ListingEngine)
        try:
            check_engine(engine, tokenizer, ids.start, teacher, named)
        except BaseException:
            engine.close()
            raise
        return engine

    def reopen() -> Engine:
        if not teacher.engine_spec.branches:
            engine = open_checked()
            engine.cannot_branch = f"{engine.name} computes no branches"
            return engine
        if not required and not branches:
            return open_checked()
        return with_branches(
            open_checked,
            lambda engine: branching_fault(engine, tokenizer, ids.start, teacher, config),
            required,
            named,
        )

    engine = _started(reopen, named, teacher.engine)
    return Teacher(recipe, engine, engine.vocabulary, tokenizer, ids.start, reopen, chat)


def _started(open_it: Callable[[], Engine], named: str, engine: str) -> Engine:
    """Start the engine for the first time.

    An engine may raise any exception for a model that it cannot run; the ValueError raised here names model and engine.
    """
    try:
        return open_it()
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _raised_by(error) in ("stage1_teacher", "pipeline"):
            raise
        message = f"{type(error).__name__}: {error}".strip().removesuffix(":").splitlines()[0]
        way_out = (
            "Its head is quantized: set teacher.head_dtype: model"
            if "head_dtype" in message
            else "If memory ran out, lower placement.gpu_memory or placement.engine_batch_tokens; otherwise try the "
            f"other local engine (teacher.engine: {other_engine(engine)})"
        )
        raise ValueError(
            f"{named}: {engine} does not start with it ({message}). {way_out}. --debug shows where it failed"
        ) from error


def _raised_by(error: Exception) -> str:
    """Return the package whose code raised the error; "" if that cannot be determined."""
    name = ""
    for frame, _ in walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0]


def _open_listing(recipe: Recipe, request: EngineRequest, chat: ChatTokenizer | None, ends: tuple[int, ...]) -> Teacher:
    """Open a teacher that lists probable tokens, as a server does.

    There is no head here, and the vocabulary is as large as the tokenizer's.
    """
    teacher, placement, tokenizer = recipe.teacher, recipe.placement, request.tokenizer

    def reopen() -> ListingEngine:
        engine = open_engine(request)
        assert isinstance(engine, ListingEngine)
        return engine

    engine = reopen()
    where = placement.base_url if teacher.engine_spec.needs_address else teacher.engine
    log.info(
        f"{where}: {teacher.name_at_server}, {engine.name}. Targets come from the {teacher.prompt_logprobs} most "
        "probable tokens of each row (teacher.prompt_logprobs), not from the full softmax; the mass of other tokens is "
        "counted in dropped and doubt."
    )
    vocabulary = Vocabulary(tokenizer.token_bytes, ends, len(tokenizer.token_bytes))
    # A connection retries each request by itself.
    restart = None if teacher.engine_spec.needs_address else reopen
    return Teacher(recipe, engine, vocabulary, tokenizer, request.start, restart, chat)
