"""JSON that every reader takes: values it has no word for become null, and nothing else changes."""

import json
import math
import random
from pathlib import Path
from typing import Any

from schemas.json_text import json_text
from schemas.manifest import write_json


def strict(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def random_values(chance: random.Random, depth: int = 4) -> Any:
    kind = chance.randrange(9 if depth else 7)
    if kind == 7:
        return [random_values(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 8:
        return {str(chance.random()): random_values(chance, depth - 1) for _ in range(chance.randrange(4))}
    return chance.choice([None, True, 7, 0.25, "nan é", math.nan, math.inf, -math.inf])


def nulled(values: Any) -> Any:
    """Read JSON by brute force with a lenient reader, its constants replaced."""
    return json.loads(json.dumps(values), parse_constant=lambda word: None)


def test_what_is_no_json_is_null_and_all_else_stays() -> None:
    chance = random.Random()
    for _ in range(500):
        values = random_values(chance)
        assert strict(json_text(values, indent=1)) == nulled(values)
    assert strict(json_text({"a": (1, math.nan)})) == {"a": [1, None]}
    assert json_text({"é": 1.5}, ensure_ascii=False) == '{"é": 1.5}'


def test_files_of_figures_hold_null_for_a_figure_that_is_not_a_number(tmp_path: Path) -> None:
    write_json(tmp_path / "figures.json", {"model": {"dump": {"kl_clear_nats": float("nan"), "positions": 3}}})
    read = strict((tmp_path / "figures.json").read_text())
    assert read == {"model": {"dump": {"kl_clear_nats": None, "positions": 3}}}
