"""What stage 1 asks of an engine: the last hidden states of every position of some prompts. Everything after is shared.

An engine that cannot give them lists the most probable tokens of each position instead.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.listed import ListedRows


class Engine(Protocol):
    """A served teacher without its head."""

    name: str  # with its version; part of the dump's identity

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each prompt of token ids, [len(prompt), hidden size]: what the head is applied to, the final norm included."""

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


def open_engine(model: str, teacher: TeacherConfig, placement: PlacementConfig) -> Engine:
    """The engine that the recipe names, with `model` (a local folder or hub id) loaded. Raises ValueError for a served teacher."""
    if teacher.engine == "openai":
        raise ValueError("a served teacher gives no hidden states; for this, use teacher.engine: vllm or transformers")
    if teacher.engine == "vllm":
        from stage1_teacher.engine_vllm import VllmEngine

        return VllmEngine(model, teacher, placement)
    from stage1_teacher.engine_transformers import TransformersEngine

    return TransformersEngine(model, teacher, placement)
