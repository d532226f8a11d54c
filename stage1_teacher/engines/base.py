"""Protocols of an engine: it gives the input of its model's head at every position of some prompts.

Everything after that is shared. An engine that cannot give these hidden states lists the most probable tokens of each
position instead.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.covering.truncated_rows import ListedRows
from pipeline.runtime import log
from pipeline.runtime.devices import computes_on_gpu
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.reduction.logit_rule import LogitRule

# Share of its first GPU that an engine over several machines reserves for its driving process, so that both get the
# same one.
HEAD_SHARE = 0.1

# Key that requests own log-probabilities from `stage1_teacher.engines.vllm_worker`; its value is the first token.
OWN_LOGPROBS = "bld_own_logprobs"


class EngineRequest(NamedTuple):
    """Arguments with which an engine is opened.

    Attributes:
        model: a local folder or hub id; only a name for a served model.
        start: id put before a document, or None.
        end: an id that means END; None if only hidden states are needed.
        branches: branches will be requested.
        over_machines: this process is a Ray actor in the first bundle of a placement group that has a GPU for each of
            the engine's workers.
    """

    model: str
    teacher: TeacherConfig
    placement: PlacementConfig
    tokenizer: ByteTokenizer
    start: int | None = None
    end: int | None = None
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

    hidden: list[Tensor]  # as from `Engine.hidden_states`
    num_tokens: int  # actually computed so far, including those of the prompts
    longest: int | None  # maximum number of tokens of a path, including its prompt's; None: unlimited

    def extend(self, tokens: Sequence[BranchToken]) -> Tensor:
        """Return the head's input after each new branch token, [len(tokens), hidden size].

        Branch tokens are numbered consecutively over all calls.
        """


class Engine(Protocol):
    """A served teacher without its head."""

    name: str  # with its version; part of the dump's identity
    cannot_branch: str | None  # why its branches must not be used, as found by `stage1_teacher.engines.branch_check`
    shared_tokens: int  # unit in which branches share a prompt's tokens; a prompt shorter than that shares nothing

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the head's input at each position of each prompt of token ids, [len(prompt), hidden size].

        It includes whatever the model does to its hidden states before the head.
        """

    def logit_rule(self) -> LogitRule:
        """Return what the model does to its head's products. Raises ValueError if no `LogitRule` describes it."""

    def own_logprobs(self, prompt: Sequence[int], first: int = 0) -> Tensor:
        """Return the model's own log-probabilities after each token from `first` on.

        They are [len(prompt) - first, token ids], float32 natural logs, computed by the model's own head, not by our
        copy of it. For checks only: a row holds the whole vocabulary.
        """

    def branches(self, prompts: Sequence[Sequence[int]]) -> Branches:
        """Compute some prompts and hold them.

        Raises ValueError if the engine was not opened with `branches`, or cannot branch.
        """

    def close(self) -> None:
        """Release memory and processes."""


@runtime_checkable
class ListingEngine(Protocol):
    """A teacher whose head is not accessible."""

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
