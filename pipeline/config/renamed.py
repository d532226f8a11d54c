"""Old names of a recipe's keys, which hold for a release: a section says them (`Section.renamed`), and each use is
warned of.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pipeline.config.section import Section, models_in
from pipeline.runtime import log


def with_new_names(values: dict[str, Any], model: type[BaseModel], where: str, over: bool = False) -> None:
    """Give the keys of nested values their new names, in place, with a warning for each.

    Args:
        values: as read, not yet checked: whatever is no section is left as it is.
        where: what they were read from, for messages.
        over: an old name has just come, and counts more than a new one that was there; else both at once are refused.
    Raises:
        ValueError: an old name stands beside the new one.
    """
    try:
        for message in dict.fromkeys(_renamed(values, model, "", over)):
            log.warning(f"{where}: {message}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _renamed(values: Any, model: type[BaseModel], prefix: str, over: bool) -> Iterator[str]:
    if not isinstance(values, dict):
        return
    for old, new in (model.renamed if issubclass(model, Section) else {}).items():
        if old not in values:
            continue
        if new in values and not over:
            raise ValueError(
                f"{prefix}{old} is the old name of {prefix}{new}, and both are given: take {prefix}{old} out"
            )
        value, there = values.pop(old), values.get(new)
        values[new] = there | value if isinstance(there, dict) and isinstance(value, dict) else value
        yield f"{prefix}{old} is called {prefix}{new} now; the next release knows the new name alone"
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            found = values.get(name)
            for index, part in enumerate(found if isinstance(found, list) else [found]):
                yield from _renamed(
                    part, inner, f"{prefix}{name}.{index}." if isinstance(found, list) else f"{prefix}{name}.", over
                )
