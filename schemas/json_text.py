"""Standard JSON, which every reader accepts."""

import json
import math
from typing import Any


def json_text(values: Any, **options: Any) -> str:
    """Return `json.dumps` of values, with null for a number that is NaN or infinite.

    JSON cannot express these, and many readers fail on them.

    Args:
        options: passed to `json.dumps`.
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
