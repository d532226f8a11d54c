"""An opened teacher: its engine, its tokenizer, and the code that makes targets from the engine's output."""

from collections.abc import Callable, Sequence
from types import TracebackType

from pipeline.config import DumpConfig, Recipe
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering
from pipeline.covering.dropped_mass import redistribute
from pipeline.covering.targets import Targets
from pipeline.covering.vocabulary import Vocabulary
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage1_teacher.engines.base import Engine, ListingEngine, SparseEngine, close_failed, free_memory
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.types import RowsAlong
from stage1_teacher.targets.branch_expansion import BranchPoint, expand
from stage1_teacher.targets.engine_output import (
    BranchedOutput,
    CanonicalOutput,
    EngineOutput,
    SparseOutput,
    TopKOutput,
    canonical_requests,
    listed_spans,
    span_requests,
    sparsity_of,
)


class Teacher:
    """An engine, and what makes targets from its output. Leaving `with` closes it.

    Args:
        reopen: opens a new engine; None for an engine that recovers by itself.
        chat: the tokenizer with its chat template, if the corpus holds chats.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine | ListingEngine,
        vocabulary: Vocabulary,
        tokenizer: ByteTokenizer,
        start: int | None,
        reopen: Callable[[], Engine | ListingEngine] | None = None,
        chat: ChatTokenizer | None = None,
    ) -> None:
        self.tokenizer, self.start, self.chat = tokenizer, start, chat
        self.ends = vocabulary.end_ids
        self._engine: Engine | ListingEngine | None = engine
        self._reopen = reopen
        self.max_tokens, self.overlap_tokens = recipe.teacher.max_tokens, recipe.teacher.overlap_tokens
        self.vocabulary, self._config = vocabulary, recipe.dump.covering
        self._arithmetic = recipe.dump.arithmetic_used
        self._num_top = 0 if recipe.dump.tokens is None else recipe.dump.tokens.top_k

    @property
    def engine(self) -> Engine | ListingEngine:
        assert self._engine is not None, "the engine failed to restart"
        return self._engine

    @property
    def can_restart(self) -> bool:
        return self._reopen is not None

    def restart(self) -> None:
        """Replace a failed engine by a new one; the failed engine's memory is freed first."""
        assert self._reopen is not None
        failed, self._engine = self._engine, None
        if failed is not None:
            close_failed(failed)
            del failed
        free_memory()
        self._engine = self._reopen()

    def close(self) -> None:
        """Release what the engine holds. One that failed and could not be restarted holds nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine. An error in progress takes precedence: a failed engine may also fail to close."""
        if error is None:
            self.close()
        elif self._engine is not None:
            engine, self._engine = self._engine, None
            close_failed(engine)

    def prompt(self, window: EncodedWindow) -> list[int]:
        """Return the engine's input for a window: its start token, if any, and its tokens."""
        start = self.start if window.start is None else window.start
        return [*([] if start is None else [start]), *window.tokens]

    def run_engine(self, windows: Sequence[EncodedWindow]) -> EngineOutput:
        """Run the engine over some windows; not over those of context alone, which have no span.

        Raises ValueError if branch rows are needed and the engine cannot branch.
        """
        windows = [window for window in windows if window.spans]
        prompts = [self.prompt(window) for window in windows]
        num_tokens = sum(map(len, prompts))
        if not prompts:
            return TopKOutput([], 0)
        if isinstance(self.engine, ListingEngine):
            return TopKOutput(listed_spans(self.engine.listed_rows(prompts), windows), num_tokens)
        coverings = self._coverings(windows)
        requests = canonical_requests(windows, coverings, self._num_top)
        if not self._config.beam_width:
            rows = self.engine.reduced_rows(prompts, requests)
            return CanonicalOutput([of_span for of_prompt in rows for of_span in of_prompt], num_tokens)
        return self._run_with_branches(windows, coverings, requests)

    def _run_with_branches(
        self, windows: Sequence[EncodedWindow], coverings: Sequence[Covering], requests: Sequence[Sequence[RowsAlong]]
    ) -> BranchedOutput:
        """Run the engine over windows and their branches: over as many windows at once as the engine can hold."""
        assert not isinstance(self.engine, ListingEngine)
        prompts = [self.prompt(window) for window in windows]
        found: list[Branching] = []
        num_tokens = first = 0
        while first < len(windows):
            branches = self.engine.branches(prompts[first:], requests[first:])
            held = windows[first : first + len(branches.rows)]
            points = [
                BranchPoint(number, len(prompts[first + number]) - len(window.tokens) + span.first)
                for number, window in enumerate(held)
                for span in window.spans
            ]
            spans = [span for window in held for span in window.spans]
            branchings = [
                Branching(covering, span.tokens, self._config)
                for covering, span in zip(coverings[len(found) : len(found) + len(spans)], spans, strict=True)
            ]
            canonical = [of_span for of_prompt in branches.rows for of_span in of_prompt]
            for branching, of_span in zip(branchings, canonical, strict=True):
                branching.add_canonical(of_span)
            expand(branchings, points, branches)
            found += branchings
            num_tokens += branches.num_tokens
            first += len(held)
        return BranchedOutput(found, num_tokens)

    def run_for_dump(self, windows: Sequence[EncodedWindow], dump: DumpConfig) -> EngineOutput | SparseOutput:
        """Run the engine over some windows for what a dump keeps of them; the engine makes that itself, if it can."""
        windows = [window for window in windows if window.spans]
        if not windows or self._config.beam_width or not isinstance(self.engine, SparseEngine):
            return self.run_engine(windows)
        prompts = [self.prompt(window) for window in windows]
        spans = self.engine.sparse_targets(prompts, span_requests(windows), sparsity_of(dump))
        return SparseOutput([of_span for of_prompt in spans for of_span in of_prompt], sum(map(len, prompts)))

    def targets(self, windows: Sequence[EncodedWindow], output: EngineOutput) -> list[Targets]:
        """Compute the targets of the windows' spans, in order, from the engine's output; they include the prefix."""
        coverings = self._coverings(windows)
        if not coverings:
            return []
        targets = output.targets(coverings)
        if self._config.redistribute_dropped:
            targets = [
                redistribute(*of_span) for of_span in zip(targets, coverings, output.off_boundaries(), strict=True)
            ]
        return targets

    def _coverings(self, windows: Sequence[EncodedWindow]) -> list[Covering]:
        spans = [span for window in windows for span in window.spans]
        return [Covering(self.vocabulary, span.tokens, span.covered_bytes, self._arithmetic) for span in spans]
