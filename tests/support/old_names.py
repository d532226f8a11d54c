"""Recipe keys under the names that the last release knows, and under their new ones."""

import re
from collections.abc import Mapping

NEW_OF = {
    "dump.covering.merge_after": "dump.covering.rejoin_after_tokens",
    "dump.covering.spread_dropped": "dump.covering.redistribute_dropped",
    "placement.most_engines": "placement.max_engines",
    "placement.engine_attempts": "placement.max_engine_failures",
    "student.averaged_scale": "student.averaged_row_scale",
}


def with_new_names(text: str) -> str:
    """Return a recipe's YAML with the new name of each renamed key in it."""
    return _replaced(text, NEW_OF)


def with_old_names(text: str) -> str:
    """Return a recipe's YAML with the old name of each renamed key in it."""
    return _replaced(text, {new: old for old, new in NEW_OF.items()})


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for name, other in names.items():
        text = re.sub(rf"\b{name.rpartition('.')[2]}:", f"{other.rpartition('.')[2]}:", text)
    return text
