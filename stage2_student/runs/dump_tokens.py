"""Checks that a run's dumps hold the teacher's tokens, if its objectives compare them."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Recipe
from schemas import dump_files
from schemas.manifest import Manifest
from stage2_student.runs.identity import dumps_by_corpus


def dump_paths(recipe: Recipe) -> list[str]:
    """Return the first dump of each corpus."""
    return [refs[0].path for refs in dumps_by_corpus(recipe).values()]


def check_tokens(recipe: Recipe, manifests: Sequence[Manifest]) -> None:
    """Check that the dumps hold what the objectives compare.

    Args:
        manifests: of each corpus' dump.
    Raises:
        ValueError: one holds no alternatives of the teacher's tokens, or two have teachers with other tokens.
    """
    names = _names(recipe)
    if not names:
        return
    by_path = dict(zip(dump_paths(recipe), manifests, strict=True))
    for path, manifest in by_path.items():
        if not manifest.has_tokens:
            raise _lacking(names[0], path, "holds")
    teachers = {path: teacher_tokens(manifest) for path, manifest in by_path.items()}
    first, *others = teachers
    if other := [path for path in others if teachers[path] != teachers[first]]:
        raise ValueError(
            f"{names[0]} compares the student's tokens with those of one tokenizer, but the teachers of {first} and "
            f"{other[0]} have different ones; name dumps of one teacher, or use objectives on bytes (kl, byte_ce, alm)"
        )


def teacher_tokens(manifest: Manifest) -> tuple[str, tuple[int, ...]]:
    """Return the hash of the teacher's tokenizer, and its tokens that mean END."""
    teacher = manifest.identity["teacher"]
    return teacher["tokenizer_sha256"], tuple(teacher["end_ids"])


def check_planned_tokens(recipe: Recipe) -> None:
    """Check what can be known of the dumps without opening any that is not on this machine, or not made yet.

    Raises:
        ValueError: a dump holds no alternatives of the teacher's tokens, or will hold none.
    """
    names = _names(recipe)
    for path in dump_paths(recipe) if names else ():
        if "://" in path:
            continue
        if (Path(path) / dump_files.MANIFEST).exists():
            if not Manifest.load(Path(path)).has_tokens:
                raise _lacking(names[0], path, "holds")
        elif path == recipe.dump.path and recipe.dump.tokens is None:
            raise _lacking(names[0], path, "will hold")


def _names(recipe: Recipe) -> list[str]:
    """Return the keys of the recipe that need the teacher's tokens."""
    train = recipe.train
    names = [f"train.objectives.{name}" for name in train.objectives.on_tokens]
    return names + (["train.alm_end"] if train.alm_end and train.objectives.alm else [])


def _lacking(name: str, path: str, holds: str) -> ValueError:
    return ValueError(
        f"{name} compares the student's tokens with the teacher's, but {path} {holds} bytes alone; make a dump with "
        "dump.tokens={top_k: 16}, or use objectives on bytes (kl, byte_ce, alm)"
    )
