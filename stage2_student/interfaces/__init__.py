"""How a student yields byte distributions. A new interface is one file here and one line in `INTERFACES`.

Shape legend: B documents, L tokens (the start token included), D hidden width, P supervised byte positions,
V symbols (256).
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from stage2_student.interfaces.linear import LinearInterface


class Interface(Protocol):
    """A module that turns the student's hidden states into next-symbol logits."""

    max_bytes: int  # bytes of a token that it predicts; what follows in a longer token is left out

    def __call__(self, hidden_BLD: Tensor, state_P: Tensor, offset_P: Tensor) -> Tensor:
        """(P, 256) float32 logits.

        Args:
            hidden_BLD: the student's last hidden states.
            state_P: index into the flattened B x L states of the one that predicts the token in which the byte lies.
            offset_P: which byte of that token, 0 the first; at most `max_bytes - 1`.
        """
        ...


INTERFACES: dict[str, Callable[[int], nn.Module]] = {"linear": LinearInterface}


def make_interface(name: str, hidden_size: int) -> nn.Module:
    """The interface `name` for a student of this width. Raises ValueError for an unknown name."""
    if name not in INTERFACES:
        raise ValueError(f"student.interface is {name!r}; known: {', '.join(sorted(INTERFACES))}")
    return INTERFACES[name](hidden_size)
