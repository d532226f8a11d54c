"""A later release's recipe: one more key in most sections, and one key renamed.

Each new key comes with what was done before it existed.
"""

from collections.abc import Mapping
from typing import ClassVar

import pytest
from pydantic import Field

from pipeline.config import (
    CorpusConfig,
    CoveringConfig,
    DumpConfig,
    Objectives,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from pipeline.config.section import added

NEW = added("9.9", before="as ever")


class _Corpus(CorpusConfig):
    reading: str = Field("as ever", json_schema_extra=NEW)


class _Teacher(TeacherConfig):
    heads: str = Field("as ever", json_schema_extra=NEW)


class _Covering(CoveringConfig):
    method: str = Field("as ever", json_schema_extra=NEW)


class _Dump(DumpConfig):
    covering: _Covering = _Covering()
    column: str = Field("as ever", json_schema_extra=NEW)


class _Student(StudentConfig):
    rows: str = Field("as ever", json_schema_extra=NEW)


class _Objectives(Objectives):
    new_term: float = Field(0.0, json_schema_extra=added("9.9", before=0.0))


class _Train(TrainConfig):
    renamed: ClassVar[Mapping[str, str]] = {"old_solver": "solver"}

    solver: str = Field("as ever", json_schema_extra=NEW)
    objectives: _Objectives = _Objectives()


class GrownRecipe(Recipe):
    """A whole run, with the keys of a later release."""

    corpus: _Corpus
    teacher: _Teacher
    dump: _Dump
    student: _Student | None = None
    train: _Train = _Train()


# Another value of each key, as an override of a recipe, and the key's name in an identity.
OF_A_DUMP = {
    "corpus.reading": "corpus.reading",
    "teacher.heads": "teacher.heads",
    "dump.covering.method": "covering.method",
    "dump.column": "column",
}
OF_A_RUN = {"student.rows": "student.rows", "train.solver": "train.solver"}


def use_added_keys(patch: pytest.MonkeyPatch) -> None:
    """Read recipes and compare identities as that later release does."""
    for module in ("loading", "identity"):
        patch.setattr(f"pipeline.config.{module}.Recipe", GrownRecipe)
