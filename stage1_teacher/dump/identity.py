"""Who the teacher of a recipe is, on this machine: what a dump's identity says of it, before its engine is opened."""

from typing import Any

from pipeline.config import Recipe
from stage1_teacher.dump import shard_plan as plan
from stage1_teacher.targets.resolved import ResolvedTeacher, resolve_ids


def teacher_identity(recipe: Recipe, teacher: ResolvedTeacher, engine: str, corpus_sha256: str) -> dict[str, Any]:
    """The identity of a dump that this teacher makes of that corpus."""
    start, ends = resolve_ids(recipe, teacher.tokenizer, teacher.chat)
    served = recipe.teacher.engine_spec.served
    weights = None if served else plan.weights_sha256(teacher.model, recipe.teacher.revision)
    runs_code = recipe.teacher.trust_remote_code and not served and recipe.dump.arithmetic_used > 1
    code = plan.code_sha256(teacher.model, recipe.teacher.revision) if runs_code else None
    return plan.make_identity(
        recipe, teacher.tokenizer, start, ends, weights, engine, corpus_sha256, teacher.chat, code
    )
