"""Protocols of an engine: it runs a teacher over some prompts, and sums the rows of its softmax.

What is summed, and along which text, comes with each prompt (`stage1_teacher.reduction`). An engine that has no access
to the whole softmax lists the most probable tokens of each position instead.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.covering.covering import ReducedRow
from pipeline.covering.truncated_rows import ListedRows
from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime import log
from pipeline.runtime.devices import computes_on_gpu
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.reduction.sparse_targets import SpanRequest, SparseTargets, Sparsity
from stage1_teacher.reduction.types import RowsAlong

# Share of its first GPU that the driving process of an engine over several machines reserves, so that it sees one.
DRIVER_SHARE = 0.1

# Keys of a prompt for `stage1_teacher.engines.vllm_worker`: its message, or the first token after which own
# log-probabilities are requested.
MESSAGE, OWN_LOGPROBS = "bld_message", "bld_own_logprobs"


class EngineRequest(NamedTuple):
    """Arguments with which an engine is opened.

    Attributes:
        model: a local folder or hub id; only a name for a served model.
        start: id put before a document, or None.
        ends: ids that mean END.
        branches: the dump's covering has branch rows, so their speed matters; others may be requested anyway.
        over_machines: this process is a Ray actor in the first bundle of a placement group that has a GPU for each of
            the engine's workers.
    """

    model: str
    teacher: TeacherConfig
    placement: PlacementConfig
    tokenizer: ByteTokenizer
    start: int | None = None
    ends: tuple[int, ...] = ()
    branches: bool = False
    over_machines: bool = False


@dataclass(frozen=True)
class BranchToken:
    """A token that leaves prompt `prompt` after its first `leaves` tokens, or continues from branch token `parent`."""

    prompt: int
    leaves: int
    token: int
    parent: int | None  # number of an earlier branch token of the same prompt


class Branches(Protocol):
    """Prompts held in the engine so that branches can leave them."""

    rows: list[list[list[ReducedRow]]]  # of the prompts that are held, as from `Engine.reduced_rows`
    num_tokens: int  # actually computed so far, including those of the prompts
    longest: int | None  # maximum number of tokens of a path, including its prompt's; None: unlimited

    def extend(self, tokens: Sequence[BranchToken], requests: Sequence[RowsAlong]) -> list[ReducedRow]:
        """Return the row after each new branch token, reduced as its request says.

        Branch tokens are numbered consecutively over all calls.

        Args:
            requests: one row each; `first` has no meaning.
        """


class Engine(Protocol):
    """A teacher whose whole softmax is within reach: the model's own logits, summed where they are computed."""

    name: str  # with its version; part of the dump's identity
    cannot_branch: str | None  # why its branches must not be used, as found by `stage1_teacher.engines.branch_check`
    shared_tokens: int  # unit in which branches share a prompt's tokens; a prompt shorter than that shares nothing
    vocabulary: Vocabulary  # of `EngineRequest.tokenizer` and `ends`, as wide as the model's logits

    def reduced_rows(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> list[list[list[ReducedRow]]]:
        """Return the rows that are requested of each prompt of token ids, request by request.

        Raises ValueError if a logit is not finite.
        """

    def own_logprobs(self, prompt: Sequence[int], first: int = 0) -> Tensor:
        """Return the model's own log-probabilities after each token from `first` on, computed for this prompt alone.

        They are [len(prompt) - first, token ids], float32 natural logs, and use none of the code that reduces rows. For
        checks only: a row holds the whole vocabulary.
        """

    def branches(self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]) -> Branches:
        """Compute the first of some prompts, as many as it can hold, with the rows requested of them, and hold them.

        They are held until anything else is asked of the engine. `Branches.rows` has an item for each; at least one.

        Raises ValueError if the engine cannot branch.
        """

    def close(self) -> None:
        """Release memory and processes."""


@runtime_checkable
class SparseEngine(Protocol):
    """An engine that also sums the rows of whole spans into their targets, where it computes them.

    Attributes:
        runner: the code that runs its steps, where there are several; each shard names it.
    """

    runner: str

    def sparse_targets(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[SpanRequest]], sparsity: Sparsity
    ) -> list[list[SparseTargets]]:
        """Return the sparse targets of the spans that are requested of each prompt.

        Raises ValueError if a logit is not finite.
        """


@runtime_checkable
class ListingEngine(Protocol):
    """A teacher whose whole softmax is out of reach."""

    name: str  # with its version; part of the dump's identity

    def listed_rows(self, prompts: Sequence[Sequence[int]]) -> list[ListedRows]:
        """Return the most probable tokens after each token of each prompt of token ids."""

    def close(self) -> None:
        """Close the connections."""


def close_failed(engine: Engine | ListingEngine) -> None:
    """Close a failed engine. Errors are only logged: it is broken, and what matters is whether the new one starts."""
    try:
        engine.close()
    except Exception as error:
        log.warning(f"closing the failed engine: {type(error).__name__}: {error}")


def free_memory() -> None:
    """Free what a closed engine held and nothing refers to any more, so that a new one finds enough memory."""
    gc.collect()
    if computes_on_gpu():
        torch.cuda.empty_cache()
