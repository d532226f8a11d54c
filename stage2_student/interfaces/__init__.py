"""How a student yields byte distributions. A new interface is one file here and one line in `INTERFACES`."""

from collections.abc import Callable

from pipeline.config import StudentConfig
from stage2_student.interfaces.base import ByteScores, Head, Interface, StudentShape
from stage2_student.interfaces.causal import CausalInterface
from stage2_student.interfaces.linear import LinearInterface
from stage2_student.interfaces.token_marginal import TokenMarginal

INTERFACES: dict[str, Callable[[StudentShape, StudentConfig], Interface]] = {
    "linear": lambda shape, _: LinearInterface(shape),
    "causal": lambda shape, _: CausalInterface(shape),
    "token_marginal": lambda shape, student: TokenMarginal(shape, student.max_dropped),
}


def make_interface(student: StudentConfig, shape: StudentShape) -> Interface:
    """The interface that the recipe asks for, for a student of this shape."""
    return INTERFACES[student.interface](shape, student)


__all__ = ["INTERFACES", "ByteScores", "Head", "Interface", "StudentShape", "make_interface"]
