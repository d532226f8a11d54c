"""Questions of the tasks beside this file, as data sets for the harness.

Each task's YAML names a function of this module and its source.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import fsspec
from datasets import Dataset

from pipeline.sources.resolve import resolve_file

_LETTER = re.compile(r"(?:^|\n)\s*([A-Z])\. ")


def multiple_choice(source: str, **_: Any) -> dict[str, Dataset]:
    """Load questions with lettered options: columns passage (may be empty), question, choices, answer (its index).

    Args:
        source: JSONL of question, options (lines `A. ...`), answer (one of those lines), and optionally passage.
    """
    return _as_test(_lettered(row, source) for row in _rows(source))


def yes_or_no(source: str, **_: Any) -> dict[str, Dataset]:
    """Load questions about a passage: columns passage (preceded by its title), question, answer (1 is yes)."""
    return _as_test(
        {
            "passage": f"{row['title']} -- {row['passage']}",
            "question": row["question"],
            "answer": ["False", "True"].index(row["answer"]),
        }
        for row in _rows(source)
    )


def _lettered(row: dict[str, str], source: str) -> dict[str, Any]:
    _, *pieces = _LETTER.split(row["options"].strip())
    letters, choices = pieces[0::2], [choice.strip() for choice in pieces[1::2]]
    answer = letters.index(row["answer"][0])
    if choices[answer] != row["answer"][3:].strip():
        raise ValueError(f"{source}: the answer {row['answer']!r} is not one of {choices}")
    return {
        "passage": row.get("passage", "").strip(),
        "question": row["question"].strip(),
        "choices": choices,
        "answer": answer,
    }


def _rows(source: str) -> Iterator[dict[str, str]]:
    with fsspec.open(resolve_file(source), "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _as_test(rows: Iterator[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(list(rows))}
