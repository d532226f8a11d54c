"""A teacher that is ready to be asked: its engine, its tokenizer, and what makes targets of the engine's answers."""

from collections.abc import Callable, Sequence
from traceback import walk_tb
from types import TracebackType
from typing import NamedTuple, TypeVar, cast

import torch

from pipeline.config import Recipe, check_engine_gives
from pipeline.config.engines import other_engine
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.covering.dropped_mass import spread
from pipeline.covering.targets import Targets
from pipeline.covering.truncated_rows import ListedRows, listed_targets
from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime.dtypes import slow_dtype
from pipeline.runtime.huggingface import load_config
from pipeline.runtime.log import say, warn
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage1_teacher.engines.base import Branches, Engine, EngineRequest, ListingEngine, close_failed, free_memory
from stage1_teacher.engines.branch_check import branching_fault, with_branches
from stage1_teacher.engines.registry import open_engine
from stage1_teacher.engines.self_check import check_engine
from stage1_teacher.inputs.encoded_windows import Piece
from stage1_teacher.reduction.reducer import Reducer
from stage1_teacher.reduction.types import Rows
from stage1_teacher.targets.branch_expansion import Place, expand


class Answers(NamedTuple):
    """What the engine gave for some pieces' stretches: hidden states, listed tokens, or coverings with their branch rows."""

    items: (
        Sequence[torch.Tensor] | Sequence[ListedRows] | Sequence[Branching]
    )  # for each of the pieces' stretches in turn
    num_tokens: int  # really computed


class Teacher:
    """An engine with what makes targets of its answers. Leaving `with` closes it.

    Args:
        reducer: None where the engine lists tokens itself.
        reopen: opens the engine anew; None for one that looks after itself.
        chat: the tokenizer with its chat template, where it is asked about chats.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine | ListingEngine,
        vocabulary: Vocabulary,
        tokenizer: ByteTokenizer,
        start: int | None,
        reducer: Reducer | None,
        reopen: Callable[[], Engine | ListingEngine] | None = None,
        chat: ChatTokenizer | None = None,
    ) -> None:
        self.tokenizer, self.start, self.chat = tokenizer, start, chat
        self.ends = vocabulary.end_ids
        self._engine: Engine | ListingEngine | None = engine
        self._reopen = reopen
        self.max_tokens, self.overlap_tokens = recipe.teacher.max_tokens, recipe.teacher.overlap_tokens
        self.vocabulary, self.reducer, self._config = vocabulary, reducer, recipe.dump.covering
        self._arithmetic = recipe.dump.arithmetic_used

    @property
    def engine(self) -> Engine | ListingEngine:
        assert self._engine is not None, "it failed to start again"
        return self._engine

    @property
    def can_restart(self) -> bool:
        return self._reopen is not None

    def restart(self) -> None:
        """A new engine in place of one that failed, whose memory is given back first."""
        assert self._reopen is not None
        failed, self._engine = self._engine, None
        if failed is not None:
            close_failed(failed)
            del failed
        free_memory()
        self._engine = self._reopen()

    def close(self) -> None:
        """Give back what the engine holds. One that failed and could not be started again holds nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine. Where an error is on its way, that is what is said: an engine that has failed may fail to close too."""
        if error is None:
            self.close()
        elif self._engine is not None:
            engine, self._engine = self._engine, None
            close_failed(engine)

    def prompt(self, piece: Piece) -> list[int]:
        """What the engine is given for a piece: its start token first."""
        start = self.start if piece.start is None else piece.start
        return [*([] if start is None else [start]), *piece.tokens]

    def ask(self, pieces: Sequence[Piece]) -> Answers:
        """Run the engine over some pieces. Raises ValueError where branch rows are wanted of an engine that lists tokens."""
        prompts = [self.prompt(piece) for piece in pieces]
        num_tokens = sum(map(len, prompts))
        if not prompts:
            return Answers([], 0)
        if isinstance(self.engine, ListingEngine):
            return Answers(_cut(self.engine.listed_rows(prompts), pieces), num_tokens)
        if not self._config.beam_width:
            return Answers(_cut(self.engine.hidden_states(prompts), pieces), num_tokens)
        return self._branch(pieces, self.engine.branches(prompts))

    def _branch(self, pieces: Sequence[Piece], branches: Branches) -> Answers:
        assert self.reducer is not None
        coverings = self._coverings(pieces)
        stretches = [stretch for piece in pieces for stretch in piece.stretches]
        branchings = [
            Branching(covering, stretch.tokens, self._config)
            for covering, stretch in zip(coverings, stretches, strict=True)
        ]
        for branching, rows in zip(branchings, self._canonical(coverings, _cut(branches.hidden, pieces)), strict=True):
            branching.add_canonical(rows)
        before = [len(self.prompt(piece)) - len(piece.tokens) for piece in pieces]
        places = [
            Place(prompt, before[prompt] + stretch.first)
            for prompt, piece in enumerate(pieces)
            for stretch in piece.stretches
        ]
        expand(branchings, places, branches, self.reducer)
        return Answers(branchings, branches.num_tokens)

    def targets(self, pieces: Sequence[Piece], answers: Answers) -> list[Targets]:
        """The targets of the pieces' stretches in turn, out of what the engine gave for them, the tokenizer's prefix included."""
        coverings = self._coverings(pieces)
        found = self._covered(coverings, answers)
        if self._config.spread_dropped:
            rows = [item.off_boundaries() if isinstance(item, Branching) else [] for item in answers.items]
            found = [spread(*of_one) for of_one in zip(found, coverings, rows, strict=True)]
        return found

    def _covered(self, coverings: Sequence[Covering], answers: Answers) -> list[Targets]:
        if not coverings:
            return []
        if isinstance(answers.items[0], Branching):
            return [branching.targets() for branching in cast(Sequence[Branching], answers.items)]
        if isinstance(answers.items[0], ListedRows):
            listed = cast(Sequence[ListedRows], answers.items)
            return [listed_targets(covering, rows) for covering, rows in zip(coverings, listed, strict=True)]
        reduced = self._canonical(coverings, cast(Sequence[torch.Tensor], answers.items))
        return [covering.targets(rows) for covering, rows in zip(coverings, reduced, strict=True)]

    def _coverings(self, pieces: Sequence[Piece]) -> list[Covering]:
        stretches = [stretch for piece in pieces for stretch in piece.stretches]
        return [Covering(self.vocabulary, stretch.tokens, stretch.spelled, self._arithmetic) for stretch in stretches]

    def _canonical(self, coverings: Sequence[Covering], hidden: Sequence[torch.Tensor]) -> list[list[ReducedRow]]:
        assert self.reducer is not None
        return self.reducer.reduce(
            [Rows(covering, covering.offsets, states_RD) for covering, states_RD in zip(coverings, hidden, strict=True)]
        )


Sliceable = TypeVar("Sliceable", torch.Tensor, ListedRows)


def _cut(rows: Sequence[Sliceable], pieces: Sequence[Piece]) -> list[Sliceable]:
    """The rows of each piece's stretches in turn: that before their first token, and that after each."""
    return [
        answered[stretch.first : stretch.first + len(stretch.tokens) + 1]
        for answered, piece in zip(rows, pieces, strict=True)
        for stretch in piece.stretches
    ]


class Named(NamedTuple):
    """The teacher that a recipe names: its model, resolved (a served one that has a tokenizer of its own is a mere name), and
    its tokenizer; where the corpus holds chats, with its chat template."""

    model: str
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None


def load_tokenizer(recipe: Recipe) -> Named:
    """Raises ValueError for a corpus of chats where the tokenizer has no chat template, and for what the engine does not give."""
    teacher = recipe.teacher
    check_engine_gives(recipe)
    model = teacher.model if teacher.is_mere_name else resolve_model(teacher.model, teacher.revision)
    source, revision = (resolve_tokenizer(teacher.tokenizer), None) if teacher.tokenizer else (model, teacher.revision)
    if recipe.corpus.has_chats:
        chat = ChatTokenizer.load(source, teacher.trust_remote_code, revision)
        return Named(model, chat.tokenizer, chat)
    return Named(model, ByteTokenizer.load(source, teacher.trust_remote_code, revision), None)


def resolve_ids(
    recipe: Recipe, tokenizer: ByteTokenizer, chat: ChatTokenizer | None = None
) -> tuple[int | None, tuple[int, ...]]:
    """The start token and the tokens that mean END, as the recipe or else the tokenizer has them.

    Of chats: None, as the template writes the start, and what ends a turn of the assistant.
    """
    teacher = recipe.teacher
    ends = tuple(tokenizer.token_id(name) for name in teacher.end)
    default = tokenizer.default_end if chat is None else chat.end_of_turn()
    if ends and chat is not None and default not in (None, *ends):
        name = next(name for name, token in tokenizer.control.items() if token == default)
        raise ValueError(
            f"teacher.end names {', '.join(teacher.end)}, but the chat template ends the assistant's turn with {name}: add that to "
            "teacher.end, or leave teacher.end out"
        )
    if not ends and default is not None:
        ends = (default,)
    if not ends:
        raise ValueError(
            "the teacher's tokenizer names no end token; give teacher.end, e.g. teacher.end=[<|endoftext|>]"
            if chat is None
            else "the teacher's chat template writes no control token after what the assistant says, so that a turn has no END; "
            "give another tokenizer or template"
        )
    if chat is not None:
        return None, ends
    start = tokenizer.token_id(teacher.start) if teacher.start else tokenizer.default_start
    if start is None:
        raise ValueError(
            "the teacher's tokenizer names no start token; give teacher.start, e.g. teacher.start=<|endoftext|>"
        )
    return start, ends


def open_teacher(
    recipe: Recipe,
    model: str,
    tokenizer: ByteTokenizer,
    chat: ChatTokenizer | None = None,
    branches: bool = False,
    over_machines: bool = False,
) -> Teacher:
    """Load engine and head. The head is read first, so that a wrong tokenizer fails before the engine starts.

    An engine is used only after `check_engine` has found that head and engine together say what the model says itself.

    Args:
        chat: the tokenizer with its chat template, where it is asked about chats.
        branches: it will be asked for branch rows even where the recipe's covering has none.
        over_machines: see `EngineRequest`.
    """
    teacher, placement = recipe.teacher, recipe.placement
    start, ends = resolve_ids(recipe, tokenizer, chat)
    request = EngineRequest(model, teacher, placement, tokenizer, start, ends[0], False, over_machines)
    if not teacher.engine_spec.hidden_states:
        return _open_listing(recipe, request, chat, ends)
    from stage1_teacher.reduction.head_weights import load_head  # seconds to import

    if slow := slow_dtype("teacher.dtype", teacher.dtype):
        warn(slow)
    head, vocabulary = load_head(
        model,
        teacher.revision,
        getattr(torch, teacher.dtype),
        tokenizer.token_bytes,
        ends,
        teacher.trust_remote_code,
        alone=not placement.overlap,  # else the engine computes in another thread
    )
    if torch.cuda.is_available():
        head = head.to("cuda")
    reducer = Reducer(head, vocabulary, placement.reduce_rows)
    config = load_config(model, teacher.revision, teacher.trust_remote_code)
    named = f"{teacher.model} ({', '.join(config.architectures or [config.model_type])})"

    def open_checked(branching: bool) -> Engine:
        engine = open_engine(request._replace(branches=branching))
        assert not isinstance(engine, ListingEngine)
        try:
            head.follow(engine.logit_rule())
            check_engine(engine, reducer, tokenizer, start, teacher, named)
        except BaseException:
            engine.close()
            raise
        return engine

    def reopen() -> Engine:
        if not teacher.engine_spec.branches:
            engine = open_checked(False)
            engine.cannot_branch = f"{engine.name} computes no branches"
            return engine
        if recipe.dump.covering.beam_width == 0 and not branches:
            return open_checked(False)
        return with_branches(
            open_checked,
            lambda engine: branching_fault(engine, reducer, tokenizer, start, teacher, config),
            recipe.dump.covering.beam_width > 0,
            named,
        )

    return Teacher(recipe, _started(reopen, named, teacher.engine), vocabulary, tokenizer, start, reducer, reopen, chat)


def _started(open_it: Callable[[], Engine], named: str, engine: str) -> Engine:
    """The engine's first start. What an engine says of a model that it cannot run is of every kind; ValueError here says whose it is."""
    try:
        return open_it()
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _raised_by(error) in ("stage1_teacher", "pipeline"):
            raise
        said = f"{type(error).__name__}: {error}".strip().removesuffix(":").splitlines()[0]
        raise ValueError(
            f"{named}: {engine} does not start with it ({said}). Where memory ran out, lower placement.gpu_memory or "
            "placement.engine_batch_tokens; else try the other local engine (teacher.engine: "
            f"{other_engine(engine)}). --debug shows where it failed"
        ) from error


def _raised_by(error: Exception) -> str:
    """The package whose code raised it; "" where that cannot be told."""
    name = ""
    for frame, _ in walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0]


def _open_listing(recipe: Recipe, request: EngineRequest, chat: ChatTokenizer | None, ends: tuple[int, ...]) -> Teacher:
    """A teacher that lists probable tokens, as a server does: no head here, and the vocabulary is as wide as the tokenizer's."""
    teacher, placement, tokenizer = recipe.teacher, recipe.placement, request.tokenizer

    def reopen() -> ListingEngine:
        engine = open_engine(request)
        assert isinstance(engine, ListingEngine)
        return engine

    engine = reopen()
    say(
        f"{placement.base_url if teacher.engine_spec.needs_address else teacher.engine}: {teacher.name_at_server}, {engine.name}. "
        f"Targets come from the {teacher.prompt_logprobs} "
        "most probable tokens of each row (teacher.prompt_logprobs), not from the whole softmax; what lies on other "
        "tokens is counted in dropped and doubt."
    )
    vocabulary = Vocabulary(tokenizer.token_bytes, ends, len(tokenizer.token_bytes))
    # A connection tries each request again by itself.
    again = None if teacher.engine_spec.needs_address else reopen
    return Teacher(recipe, engine, vocabulary, tokenizer, request.start, None, again, chat)
