"""Old names of recipe keys, valid for one more release.

A section declares them (`Section.renamed`); each use by an operator logs a warning.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pipeline.config.section import Section, models_in
from pipeline.runtime import log


def with_new_names(
    values: dict[str, Any], model: type[BaseModel], where: str, over: bool = False, is_stored: bool = False
) -> None:
    """Give the keys of nested values their new names, in place, with a warning for each.

    Args:
        values: as read, not yet checked; whatever is not a section is left as it is.
        where: where they were read from, for messages.
        over: an old name has just been applied as an override, and wins over an earlier new name; else having both is
            refused.
        is_stored: the values are of a recipe that this program stored with a dump or a run: no warning.
    Raises:
        ValueError: both the old and the new name are given.
    """
    try:
        messages = dict.fromkeys(_renamed(values, model, "", over))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for message in messages if not is_stored else ():
        log.warning(f"{where}: {message}")


def _renamed(values: Any, model: type[BaseModel], prefix: str, over: bool) -> Iterator[str]:
    if not isinstance(values, dict):
        return
    for old, new in (model.renamed if issubclass(model, Section) else {}).items():
        if old not in values:
            continue
        if new in values and not over:
            raise ValueError(
                f"{prefix}{old} is the old name of {prefix}{new}, and both are given: remove {prefix}{old}"
            )
        value, earlier = values.pop(old), values.get(new)
        values[new] = earlier | value if isinstance(earlier, dict) and isinstance(value, dict) else value
        yield f"{prefix}{old} is called {prefix}{new} now; the next release knows only the new name"
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            value = values.get(name)
            for index, part in enumerate(value if isinstance(value, list) else [value]):
                yield from _renamed(
                    part, inner, f"{prefix}{name}.{index}." if isinstance(value, list) else f"{prefix}{name}.", over
                )
