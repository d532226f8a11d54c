"""JSON by the standard, which every reader takes."""

import json
import math
from typing import Any


def json_text(values: Any, **options: Any) -> str:
    """Return `json.dumps` of values, with null for a number that is NaN or infinite: JSON has no word for it, and many
    readers stop there.

    Args:
        options: of `json.dumps`.
    """
    try:
        return json.dumps(values, allow_nan=False, **options)
    except ValueError:  # "Out of range float values are not JSON compliant"
        return json.dumps(_finite(values), allow_nan=False, **options)


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {_finite_key(key): _finite(value) for key, value in values.items()}
    return [_finite(value) for value in values] if isinstance(values, list | tuple) else values


def _finite_key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
