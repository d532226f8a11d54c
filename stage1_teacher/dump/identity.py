"""A dump's identity, from the recipe and the teacher's files on this machine, before its engine is opened."""

from typing import Any

from pipeline.config import Recipe
from pipeline.sources.file_hash import weights_sha256
from stage1_teacher.dump import shard_plan
from stage1_teacher.targets.resolved import ResolvedTeacher, resolve_ids


def teacher_identity(recipe: Recipe, teacher: ResolvedTeacher, engine: str, corpus_sha256: str) -> dict[str, Any]:
    """Return the identity of a dump of that corpus by this teacher."""
    ids = resolve_ids(recipe, teacher.tokenizer, teacher.chat)
    served = recipe.teacher.engine_spec.served
    weights = None if served else weights_sha256(teacher.model, recipe.teacher.revision)
    runs_code = recipe.teacher.trust_remote_code and not served and recipe.dump.arithmetic_used > 1
    code = shard_plan.code_sha256(teacher.model, recipe.teacher.revision) if runs_code else None
    return shard_plan.make_identity(recipe, teacher, ids, shard_plan.ModelHashes(weights, code), engine, corpus_sha256)
