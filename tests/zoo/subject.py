"""Inputs of a check, and what all checks share: texts, recipes, the model to compare with."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

from pipeline.config import Recipe
from tests.zoo import checks
from tests.zoo.cells import Cell
from tests.zoo.spellings import Spelling

TEXTS = ("the thing and é", " in the end", "naïve 日本 42", "def f(x):\n    return x")
PADDING = 3  # rows of a head beyond the tokenizer's tokens


class WrongError(AssertionError):
    """The product's answer differs from the model's."""


class Place(NamedTuple):
    """Inputs of a check: an empty folder, how to get a tokenizer, and the seed of the weights."""

    work: Path
    spelling: Callable[[str], Spelling]
    seed: int


def spelled_texts(spelling: Spelling) -> list[str]:
    """Return the texts that the tokenizer's tokens spell."""
    spelled = {text: b"".join(spelling.token_bytes[i] or b"" for i in spelling.encode(text)) for text in TEXTS}
    return [text for text, have in spelled.items() if have == spelling.prefix + text.encode()]


def own_model(folder: Path) -> Any:
    """Load transformers' own model of a folder, in float64 where it can."""
    return checks.in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def write_corpus(work: Path, texts: Sequence[str]) -> Path:
    corpus = work / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return corpus


def recipe_of(cell: Cell, place: Place, model: Path, texts: Sequence[str]) -> Recipe:
    """Return the recipe of a dump of `texts` that stores everything, and of a student of the same model."""
    spelling = place.spelling(cell.tokenizer)
    corpus = write_corpus(place.work, texts)
    teacher = {
        "model": str(model), "engine": cell.engine or "transformers", "dtype": "float32", "max_tokens": 64,
        "overlap_tokens": 8, "start": spelling.start, "end": [spelling.end],
    }  # fmt: skip
    values: dict[str, Any] = {
        "corpus": {"source": str(corpus)},
        "teacher": teacher,
        "dump": {
            "path": str(place.work / "dump"),
            "top_k": 256,
            "min_prob": 0,
            "audit_documents": 0,
            "tokens": {"top_k": 7, "min_prob": 0},
        },
    }
    if cell.target:
        target = place.spelling(cell.target)
        values["student"] = {
            "model": str(model), "tokenizer": target.folder, "path": str(place.work / "student"),
            "start": target.start, "end": target.end,
        }  # fmt: skip
    return Recipe.model_validate(values)


def control_id(spelling: Spelling, name: str) -> int:
    return int(spelling.wrapped.convert_tokens_to_ids(name))
