"""Texts longer than a model's window, read in several; each token has at least a quarter of a window before it.

Each token is predicted once. Windows are runs of the document's own tokens, never encoded anew, so that the scored
bytes stay the document's. Each begins with the start token. A chat is cut between messages: a window begins with a
message if one is near, however little then comes before the answer, and ends inside an answer only if that is longer
than a window.

Shape legend: L tokens of a document, including the start token.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.runtime import log
from pipeline.runtime.huggingface import max_positions

DEFAULT_MAX_TOKENS = 2048  # if neither recipe nor command line gives one, and the model has as many positions


class TokenWindow(NamedTuple):
    """The tokens that a model reads at once, and those it predicts there.

    Attributes:
        begin, end: it reads tokens `begin .. end`.
        has_start: the document's first token is put before them.
        targets: indices of the tokens that it predicts, ascending; each in `begin + 1 .. end`.
    """

    begin: int
    end: int
    has_start: bool
    targets: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The index in the window of the token that each target is predicted from."""
        rows: np.ndarray = self.targets - 1 - self.begin + self.has_start
        return rows

    def read(self, tokens: Sequence[int]) -> list[int]:
        """Return the model's input tokens."""
        return [*([tokens[0]] if self.has_start else []), *tokens[self.begin : self.end]]


def overlap_of(max_tokens: int) -> int:
    """Return the minimum number of tokens before a token that is predicted in a later window."""
    return max_tokens // 4


def cut_tokens(
    is_target_L: np.ndarray, max_tokens: int, restarts: Sequence[int] = (), repeats_start: bool = True
) -> Iterator[TokenWindow]:
    """Yield windows of at most `max_tokens` tokens in which every target is predicted once.

    Args:
        is_target_L: bool; the first is always False, because nothing predicts it. There may be one more than tokens:
            for the token that follows the last.
        max_tokens: at least 8.
        restarts: tokens at which a message begins, ascending.
        repeats_start: the first token is put before a window that starts at a restart.
    """
    assert max_tokens >= 8 and not is_target_L[0]
    targets = np.flatnonzero(is_target_L)
    done = 0
    while done < len(targets):
        begin, has_start = _begin(int(targets[done]), max_tokens, restarts, repeats_start, is_first=not done)
        last = begin + max_tokens - has_start  # the last token that the window can predict
        until = int(np.searchsorted(targets, last, side="right"))
        if restarts and until < len(targets):  # prefer a cut between two answers to one inside an answer
            ends = done + 1 + np.flatnonzero(np.diff(targets[done : until + 1]) > 1)
            until = int(ends[-1]) if len(ends) else until
        yield TokenWindow(begin, int(targets[until - 1]), has_start, targets[done:until])
        done = until


def _begin(
    target: int, max_tokens: int, restarts: Sequence[int], repeats_start: bool, is_first: bool
) -> tuple[int, bool]:
    """Return where the window that first predicts `target` begins, and whether the start token is put before it."""
    overlap = overlap_of(max_tokens)
    if target <= (max_tokens if is_first else overlap):
        return 0, False
    # A message that begins too far back would leave too little of the window for the targets.
    near = [restart for restart in restarts if target - max_tokens // 2 <= restart < target]
    if near:
        far_enough = [restart for restart in near if target - restart >= overlap]
        return (far_enough[-1] if far_enough else near[0]), repeats_start
    return target - overlap, True


def window_size(config: Any, max_tokens: int | None, name: str) -> int:
    """Return the size of a model's windows, in tokens.

    It is `max_tokens` if given, otherwise `DEFAULT_MAX_TOKENS`, or the model's number of positions if that is smaller,
    which is logged.

    Args:
        name: the model's, for messages.
    Raises:
        ValueError: `max_tokens` exceeds the model's number of positions.
    """
    positions = max_positions(config)
    if max_tokens is None:
        if positions is None or positions >= DEFAULT_MAX_TOKENS:
            return DEFAULT_MAX_TOKENS
        log.info(
            f"{name}: windows of {positions} tokens, because it has no more positions (the default is "
            f"{DEFAULT_MAX_TOKENS})"
        )
        return positions
    if positions is not None and max_tokens > positions:
        raise ValueError(
            f"max_tokens is {max_tokens}, but {name} has {positions} positions (max_position_embeddings); give "
            f"{positions} or less, or leave it out: each model then reads windows that it has positions for"
        )
    return max_tokens
