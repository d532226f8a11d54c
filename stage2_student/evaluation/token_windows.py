"""Texts longer than a model's window, read in several: each token is predicted once, with at least a quarter of a
window before it.

Windows are stretches of the document's own tokens, never encoded anew, so that the bytes that are scored stay the
document's. Each begins with the start token. A chat is cut between messages: a window begins with one where one is
near, however little stands before the answer then, and ends inside an answer only where that is longer than a window.

Shape legend: L tokens of a document, the start token included.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.runtime import log
from pipeline.runtime.huggingface import max_positions

DEFAULT_MAX_TOKENS = 2048  # where neither recipe nor command line says otherwise, and the model has as many positions


class TokenWindow(NamedTuple):
    """What a model reads at once, and what it is asked there.

    Attributes:
        begin, end: it reads tokens `begin .. end`.
        has_start: the document's first token is put before them.
        targets: numbers of the tokens that it predicts, ascending; each in `begin + 1 .. end`.
    """

    begin: int
    end: int
    has_start: bool
    targets: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Which token of the window each target is predicted from."""
        rows: np.ndarray = self.targets - 1 - self.begin + self.has_start
        return rows

    def read(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that the model is given."""
        return [*([tokens[0]] if self.has_start else []), *tokens[self.begin : self.end]]


def overlap_of(max_tokens: int) -> int:
    """Least tokens before one that is predicted in a later window."""
    return max_tokens // 4


def cut_tokens(
    wanted_L: np.ndarray, max_tokens: int, restarts: Sequence[int] = (), repeats_start: bool = True
) -> Iterator[TokenWindow]:
    """Windows of at most `max_tokens` tokens in which every wanted token is predicted once.

    Args:
        wanted_L: bool; the first is never wanted, for nothing predicts it. There may be one more than tokens: what
            follows the last.
        max_tokens: 8 or more.
        restarts: tokens at which a message begins, ascending.
        repeats_start: the first token is put before a window that starts at a restart.
    """
    assert max_tokens >= 8 and not wanted_L[0]
    targets = np.flatnonzero(wanted_L)
    done = 0
    while done < len(targets):
        begin, has_start = _begin(int(targets[done]), max_tokens, restarts, repeats_start, is_first=not done)
        most = begin + max_tokens - has_start  # the last token that a window can predict
        until = int(np.searchsorted(targets, most, side="right"))
        if restarts and until < len(targets):  # rather between two answers than inside one
            ends = done + 1 + np.flatnonzero(np.diff(targets[done : until + 1]) > 1)
            until = int(ends[-1]) if len(ends) else until
        yield TokenWindow(begin, int(targets[until - 1]), has_start, targets[done:until])
        done = until


def _begin(
    target: int, max_tokens: int, restarts: Sequence[int], repeats_start: bool, is_first: bool
) -> tuple[int, bool]:
    """Where the window begins that first predicts `target`, and whether the start token is put before it."""
    overlap = overlap_of(max_tokens)
    if target <= (max_tokens if is_first else overlap):
        return 0, False
    # A message that begins too far back would leave too little of the window for what is to be predicted.
    near = [restart for restart in restarts if target - max_tokens // 2 <= restart < target]
    if near:
        far_enough = [restart for restart in near if target - restart >= overlap]
        return (far_enough[-1] if far_enough else near[0]), repeats_start
    return target - overlap, True


def window_size(config: Any, max_tokens: int | None, name: str) -> int:
    """Tokens of a model's window: what is asked for, else `DEFAULT_MAX_TOKENS`, or what the model has, and then says
    so.

    Args:
        name: of the model, for messages.
    Raises:
        ValueError: more are asked for than the model has positions.
    """
    positions = max_positions(config)
    if max_tokens is None:
        if positions is None or positions >= DEFAULT_MAX_TOKENS:
            return DEFAULT_MAX_TOKENS
        log.info(
            f"{name}: windows of {positions} tokens, for it has no more positions (the default is {DEFAULT_MAX_TOKENS})"
        )
        return positions
    if positions is not None and max_tokens > positions:
        raise ValueError(
            f"max_tokens is {max_tokens}, and {name} has {positions} positions (max_position_embeddings); give {positions} or less, "
            "or leave it out: each model is then read in windows that it has positions for"
        )
    return max_tokens
