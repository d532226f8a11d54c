"""How a student yields byte distributions. A new interface is one file here and one line in `INTERFACES`."""

from collections.abc import Callable

from stage2_student.interfaces.base import ByteScores, Head, Interface, StudentShape
from stage2_student.interfaces.linear import LinearInterface

INTERFACES: dict[str, Callable[[StudentShape], Interface]] = {"linear": LinearInterface}


def make_interface(name: str, shape: StudentShape) -> Interface:
    """The interface `name` for a student of this shape. Raises ValueError for an unknown name."""
    if name not in INTERFACES:
        raise ValueError(f"student.interface is {name!r}; known: {', '.join(sorted(INTERFACES))}")
    return INTERFACES[name](shape)


__all__ = ["INTERFACES", "ByteScores", "Head", "Interface", "StudentShape", "make_interface"]
