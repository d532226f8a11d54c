"""Protocol of a generator: it continues prompts of token ids, each with a seed of its own."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pipeline.config import PlacementConfig, TeacherConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer


class Sampling(NamedTuple):
    """Settings by which tokens are drawn; see `pipeline.config.GenerateConfig`.

    Attributes:
        top_k: None: all tokens.
        stop: texts at which a completion ends.
        ends: token ids that end a completion, and are END.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stop: tuple[str, ...]
    ends: tuple[int, ...]


class GeneratorRequest(NamedTuple):
    """Arguments with which a generator is opened.

    Attributes:
        model: a local folder or hub id; only a name for a served model.
        writer: the model's section, with windows that hold a prompt and its completion.
        over_machines: see `stage1_teacher.engines.base.EngineRequest`.
    """

    model: str
    writer: TeacherConfig
    placement: PlacementConfig
    tokenizer: ByteTokenizer
    sampling: Sampling
    over_machines: bool = False


class Draw(NamedTuple):
    """A completion that is wanted."""

    prompt: tuple[int, ...]
    seed: int


class Drawn(NamedTuple):
    """A completion: its tokens without the end token, and whether there was one.

    With texts to stop at, it may go on for a few tokens behind the first of them.
    """

    tokens: list[int]
    is_ended: bool


class Generator(Protocol):
    """A model that continues prompts.

    Attributes:
        name: of the engine, with its version.
        batch_prompts: prompts that are given to it at once.
    """

    name: str
    batch_prompts: int

    def generate(self, draws: Sequence[Draw]) -> list[Drawn]:
        """Return a completion for each request, drawn with its own seed, whatever the others are."""

    def close(self) -> None:
        """Release memory, processes and connections."""


def drawn(tokens: Sequence[int], ends: Sequence[int]) -> Drawn:
    """Return what an engine wrote, up to the first end token."""
    at = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Drawn(list(tokens[:at]), at is not None)


def written_bytes(tokens: Sequence[int], tokenizer: ByteTokenizer) -> bytes:
    """Return the bytes that tokens spell; control tokens, and ids behind the vocabulary, spell none."""
    known = tokenizer.token_bytes
    return b"".join(known[token] or b"" for token in tokens if token < len(known))
