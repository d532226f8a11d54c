"""Functions as prompts, and which completions of them parse."""

import ast
import json
from pathlib import Path

import pytest

from pipeline.evaluation.python_functions import function_prompts, parses, write_prompts

PROMPT = 'def add(a,\n        b=2):\n    """Add."""\n'


@pytest.mark.parametrize(
    ("completion", "is_finished", "expected"),
    [
        ("    return a + b\n", True, True),
        ("    return a + b", True, True),
        ("    return a + b", False, False),  # the last line was cut off, and nothing is left
        ("    c = a\n    return (a +", False, True),  # as far as it goes
        ("    return a + b\n\n\ndef other(:\n", False, True),  # what follows the function does not count
        ("    return (a + b\n", True, False),
        ("   return a + b\n", True, False),  # another indentation than the docstring's
        ("return a + b\n", True, False),  # no body
        ("\n    # and so\n", True, False),
        ("    return a +\x00b\n", True, False),
    ],
)
def test_a_completion_parses_as_far_as_its_function_goes(completion: str, is_finished: bool, expected: bool) -> None:
    assert parses(PROMPT, completion, is_finished) == expected


def test_prompts_are_beginnings_of_functions_the_same_each_time(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 40)
    written = (tmp_path / "prompts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in written.splitlines()]
    assert len({row["id"] for row in rows}) == 40
    known = dict(function_prompts())
    for row in rows:
        assert known[row["id"]] == row["text"]
        [function] = ast.parse(row["text"]).body
        assert isinstance(function, ast.FunctionDef)
        assert len(function.body) == 1
        assert not parses(row["text"], "", True)
        assert parses(row["text"], f"{' ' * function.body[0].col_offset}return None\n", True)
    write_prompts(tmp_path / "again.jsonl", 40)
    assert (tmp_path / "again.jsonl").read_text(encoding="utf-8") == written
