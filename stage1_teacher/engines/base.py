"""What stage 1 asks of an engine: what its model's head is applied to, at every position of some prompts. Everything
after is shared.

An engine that cannot give them lists the most probable tokens of each position instead.
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

# Of its first GPU, what an engine over several machines takes for the process that drives it, so that both are given
# the same one.
HEAD_SHARE = 0.1

OWN_LOGPROBS = (
    "bld_own_logprobs"  # asks `stage1_teacher.engines.vllm_worker` for them, from this token of the prompt on
)


class EngineRequest(NamedTuple):
    """What an engine is opened with.

    Attributes:
        model: a local folder or hub id; of a served one a mere name.
        start: id put before a document, or None.
        end: an id that means END; None where only hidden states are asked for.
        branches: it will be asked for some.
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
    """A token that leaves prompt `prompt` after its first `leaves` tokens, or goes on from the branch token
    `parent`.
    """

    prompt: int
    leaves: int
    token: int
    parent: int | None  # number of an earlier branch token of the same prompt


class Branches(Protocol):
    """Some prompts, held so that branches can leave them."""

    hidden: list[Tensor]  # as of `Engine.hidden_states`
    num_tokens: int  # really computed so far, those of the prompts included
    longest: int | None  # tokens that a path may have, its prompt's included; None: any number

    def extend(self, tokens: Sequence[BranchToken]) -> Tensor:
        """What the head is applied to after each new branch token, [len(tokens), hidden size]. They are numbered on
        from earlier calls'.
        """


class Engine(Protocol):
    """A served teacher without its head."""

    name: str  # with its version; part of the dump's identity
    cannot_branch: (
        str | None
    )  # why its branches are not to be used, as has been found of it; see `stage1_teacher.engines.branch_check`
    shared_tokens: int  # of a prompt, that its branches share at a time: those of a shorter one share nothing

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each prompt of token ids, [len(prompt), hidden size]: what the head is applied to, whatever the model
        does before it included.
        """

    def logit_rule(self) -> LogitRule:
        """What the model does to its head's products. Raises ValueError where that is no `LogitRule`."""

    def own_logprobs(self, prompt: Sequence[int], first: int = 0) -> Tensor:
        """[len(prompt) - first, token ids] float32 natural logs: the model's own answer after each token from `first`
        on, for which none of our code rebuilds a head. For checks: a row holds the whole vocabulary.
        """

    def branches(self, prompts: Sequence[Sequence[int]]) -> Branches:
        """Compute some prompts and hold them. Raises ValueError where the engine was not opened with `branches`, or
        cannot branch.
        """

    def close(self) -> None:
        """Give memory and processes back."""


@runtime_checkable
class ListingEngine(Protocol):
    """A teacher whose head is out of reach."""

    name: str  # with its version; part of the dump's identity

    def listed_rows(self, prompts: Sequence[Sequence[int]]) -> list[ListedRows]:
        """For each prompt of token ids, the most probable tokens after each of its tokens."""

    def close(self) -> None:
        """Give connections back."""


def close_failed(engine: Engine | ListingEngine) -> None:
    """Close an engine that has failed. It is broken; what matters is whether the new one starts."""
    try:
        engine.close()
    except Exception as error:
        log.warning(f"closing the failed engine: {type(error).__name__}: {error}")


def free_memory() -> None:
    """Give back what an engine held that nothing refers to any more, so that a new one finds room."""
    gc.collect()
    if computes_on_gpu():
        torch.cuda.empty_cache()
