"""A teacher that is ready to be asked: its engine, its tokenizer, and what makes targets of the engine's answers."""

from collections.abc import Callable, Sequence
from types import TracebackType

from pipeline.config import Recipe
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering
from pipeline.covering.dropped_mass import spread
from pipeline.covering.targets import Targets
from pipeline.covering.vocabulary import Vocabulary
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage1_teacher.engines.base import Branches, Engine, ListingEngine, close_failed, free_memory
from stage1_teacher.inputs.encoded_windows import Piece
from stage1_teacher.reduction.reducer import Reducer
from stage1_teacher.targets.answers import Answers, Branched, Canonical, TopK, cut_stretches, reduce_canonical
from stage1_teacher.targets.branch_expansion import Place, expand


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
        """Close the engine. Where an error is on its way, that is what is said: an engine that has failed may fail to
        close too.
        """
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
        """Run the engine over some pieces. Raises ValueError where branch rows are wanted of an engine that lists
        tokens.
        """
        prompts = [self.prompt(piece) for piece in pieces]
        num_tokens = sum(map(len, prompts))
        if not prompts:
            return TopK([], 0)
        if isinstance(self.engine, ListingEngine):
            return TopK(cut_stretches(self.engine.listed_rows(prompts), pieces), num_tokens)
        assert self.reducer is not None
        if not self._config.beam_width:
            return Canonical(cut_stretches(self.engine.hidden_states(prompts), pieces), num_tokens, self.reducer)
        return self._branch(pieces, self.engine.branches(prompts))

    def _branch(self, pieces: Sequence[Piece], branches: Branches) -> Branched:
        assert self.reducer is not None
        coverings = self._coverings(pieces)
        stretches = [stretch for piece in pieces for stretch in piece.stretches]
        branchings = [
            Branching(covering, stretch.tokens, self._config)
            for covering, stretch in zip(coverings, stretches, strict=True)
        ]
        canonical = reduce_canonical(self.reducer, coverings, cut_stretches(branches.hidden, pieces))
        for branching, rows in zip(branchings, canonical, strict=True):
            branching.add_canonical(rows)
        before = [len(self.prompt(piece)) - len(piece.tokens) for piece in pieces]
        places = [
            Place(prompt, before[prompt] + stretch.first)
            for prompt, piece in enumerate(pieces)
            for stretch in piece.stretches
        ]
        expand(branchings, places, branches, self.reducer)
        return Branched(branchings, branches.num_tokens)

    def targets(self, pieces: Sequence[Piece], answers: Answers) -> list[Targets]:
        """The targets of the pieces' stretches in turn, out of what the engine gave for them, the tokenizer's prefix
        included.
        """
        coverings = self._coverings(pieces)
        if not coverings:
            return []
        found = answers.targets(coverings)
        if self._config.spread_dropped:
            found = [spread(*of_one) for of_one in zip(found, coverings, answers.off_boundaries(), strict=True)]
        return found

    def _coverings(self, pieces: Sequence[Piece]) -> list[Covering]:
        stretches = [stretch for piece in pieces for stretch in piece.stretches]
        return [Covering(self.vocabulary, stretch.tokens, stretch.spelled, self._arithmetic) for stretch in stretches]
