"""A teacher that is ready to be asked: its engine, its tokenizer, and what makes targets of the engine's output."""

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
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.reducer import Reducer
from stage1_teacher.targets.branch_expansion import BranchPoint, expand
from stage1_teacher.targets.engine_output import (
    BranchedOutput,
    CanonicalOutput,
    EngineOutput,
    TopKOutput,
    reduce_canonical,
    span_rows,
)


class Teacher:
    """An engine with what makes targets of its output. Leaving `with` closes it.

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

    def prompt(self, window: EncodedWindow) -> list[int]:
        """What the engine is given for a window: its start token first."""
        start = self.start if window.start is None else window.start
        return [*([] if start is None else [start]), *window.tokens]

    def run_engine(self, windows: Sequence[EncodedWindow]) -> EngineOutput:
        """Run the engine over some windows. Raises ValueError where branch rows are wanted of an engine that lists
        tokens.
        """
        prompts = [self.prompt(window) for window in windows]
        num_tokens = sum(map(len, prompts))
        if not prompts:
            return TopKOutput([], 0)
        if isinstance(self.engine, ListingEngine):
            return TopKOutput(span_rows(self.engine.listed_rows(prompts), windows), num_tokens)
        assert self.reducer is not None
        if not self._config.beam_width:
            return CanonicalOutput(span_rows(self.engine.hidden_states(prompts), windows), num_tokens, self.reducer)
        return self._branch(windows, self.engine.branches(prompts))

    def _branch(self, windows: Sequence[EncodedWindow], branches: Branches) -> BranchedOutput:
        assert self.reducer is not None
        coverings = self._coverings(windows)
        spans = [span for window in windows for span in window.spans]
        branchings = [
            Branching(covering, span.tokens, self._config) for covering, span in zip(coverings, spans, strict=True)
        ]
        canonical = reduce_canonical(self.reducer, coverings, span_rows(branches.hidden, windows))
        for branching, rows in zip(branchings, canonical, strict=True):
            branching.add_canonical(rows)
        before = [len(self.prompt(window)) - len(window.tokens) for window in windows]
        points = [
            BranchPoint(prompt, before[prompt] + span.first)
            for prompt, window in enumerate(windows)
            for span in window.spans
        ]
        expand(branchings, points, branches, self.reducer)
        return BranchedOutput(branchings, branches.num_tokens)

    def targets(self, windows: Sequence[EncodedWindow], output: EngineOutput) -> list[Targets]:
        """The targets of the windows' spans in turn, out of what the engine gave for them, the tokenizer's prefix
        included.
        """
        coverings = self._coverings(windows)
        if not coverings:
            return []
        found = output.targets(coverings)
        if self._config.spread_dropped:
            found = [spread(*of_one) for of_one in zip(found, coverings, output.off_boundaries(), strict=True)]
        return found

    def _coverings(self, windows: Sequence[EncodedWindow]) -> list[Covering]:
        spans = [span for window in windows for span in window.spans]
        return [Covering(self.vocabulary, span.tokens, span.covered_bytes, self._arithmetic) for span in spans]
