"""Byte interfaces: modules that turn a student's hidden states into byte distributions.

A new interface is a Python file anywhere, named as `student.interface` in the recipe (README.md beside this file). May
import `data`, `schemas`, and the parts of `pipeline` that both stages share.
"""

from collections.abc import Callable

from pipeline.config import StudentConfig
from pipeline.runtime.plugins import is_own, run_file
from stage2_student.interfaces.base import ByteScores, Head, Interface, OrderableHead, StudentShape
from stage2_student.interfaces.causal import CausalInterface
from stage2_student.interfaces.linear import LinearInterface
from stage2_student.interfaces.token_marginal.interface import TokenMarginal

INTERFACES: dict[str, Callable[[StudentShape, StudentConfig], Interface]] = {
    "linear": lambda shape, _: LinearInterface(shape),
    "causal": lambda shape, _: CausalInterface(shape),
    "token_marginal": lambda shape, student: TokenMarginal(shape, student.max_dropped),
}


def make_interface(student: StudentConfig, shape: StudentShape) -> Interface:
    """Make the recipe's interface for a student of this shape.

    Raises:
        ValueError: the user's own file is faulty.
    """
    make = run_file(student.interface, "make_interface") if is_own(student.interface) else INTERFACES[student.interface]
    interface = make(shape, student)
    if not isinstance(interface, Interface):
        raise ValueError(
            f"{student.interface}: make_interface must return a stage2_student.interfaces.Interface, "
            f"not a {type(interface).__name__}"
        )
    if is_own(student.interface):
        interface.own_file = student.interface
    return interface


__all__ = ["INTERFACES", "ByteScores", "Head", "Interface", "OrderableHead", "StudentShape", "make_interface"]
