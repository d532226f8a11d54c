"""Outcomes of cells: what the product does, against brute force."""

import re
from collections.abc import Callable

from tests.zoo.cells import Cell, Outcome
from tests.zoo.models import architecture, tiny_config
from tests.zoo.student import check_eval, check_moved, check_trained
from tests.zoo.subject import Place, WrongError
from tests.zoo.teacher import check_targets


def run(cell: Cell, place: Place) -> Outcome:
    """Return the outcome of a cell; nothing is raised for what the product does."""
    try:
        return Outcome("right", CHECKS[cell.check](cell, place))
    except WrongError as wrong:
        return Outcome("wrong", str(wrong))
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
        return Outcome("refused" if names_it(str(error), cell) else "wrong", said)
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}")


_WAYS_OUT = re.compile(r"\b(use|give|choose|set|take|instead|add|raise|lower|another|supported)\b", re.IGNORECASE)


def names_it(message: str, cell: Cell) -> bool:
    """Tell if a refusal names what is refused (family, its class or the tokenizer) and how to go on."""
    kind = type(tiny_config(cell.family, 300)).__name__.removesuffix("Config")
    names = {cell.family, kind, architecture(cell.family), cell.tokenizer, cell.target or cell.tokenizer}
    flat = _flat(message)
    return any(_flat(name) in flat for name in names) and _WAYS_OUT.search(message) is not None


def _flat(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


CHECKS: dict[str, Callable[[Cell, Place], str]] = {
    "targets": check_targets,
    "eval": check_eval,
    "moved": check_moved,
    "trained": check_trained,
}
