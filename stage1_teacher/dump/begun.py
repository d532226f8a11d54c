"""Settings that a dump keeps from its start, whatever has changed on this machine since."""

import json
from importlib.metadata import version

from pipeline.config import CorpusConfig, Recipe
from pipeline.runtime import log
from schemas import ARITHMETIC, dump_files
from schemas.dump_files import Key
from schemas.manifest import Manifest, arithmetic_of
from schemas.storage.locations import Location, location, open_parquet


def as_begun(recipe: Recipe) -> Recipe:
    """Return the recipe with its open settings taken from the dump in its folder, or else the newest.

    These are the version of the arithmetic, the teacher's dtype (whose default depends on the machine), and, for chats,
    whether only their contents are read (`corpus.turns`).

    Raises:
        ValueError: the dump there follows a version that this release does not know.
    """
    dump = location(recipe.dump.path)
    recipe = _with_dtype_of(dump, _with_turns_of(dump, recipe))
    if recipe.dump.arithmetic is not None or not (dump / dump_files.MANIFEST).exists():
        return _under(recipe, recipe.dump.arithmetic_used)
    arithmetic = _known(dump, Manifest.load(dump))
    if arithmetic != ARITHMETIC:
        log.info(
            f"{dump}: continues with arithmetic {arithmetic}, with which it was begun; a new dump would use "
            f"{ARITHMETIC}"
        )
    return _under(recipe, arithmetic)


def _with_turns_of(dump: Location, recipe: Recipe) -> Recipe:
    """Return the recipe with `turns: contents` if the dump was begun so and the recipe does not say."""
    corpus = recipe.corpus
    if not (corpus.has_chats and corpus.turns == "rendered" and (dump / dump_files.MANIFEST).exists()):
        return recipe
    if "turns" in Manifest.load(dump).identity.get("corpus", {}) or corpus.model_fields_set & {"turns", "reasoning"}:
        return recipe
    log.info(
        f"{dump}: continues with contents alone, as it was begun (corpus.turns: contents); a new dump.path has "
        "reasoning and calls too"
    )
    return recipe.model_copy(update={"corpus": _contents_alone(corpus)})


def _with_dtype_of(dump: Location, recipe: Recipe) -> Recipe:
    """Return the recipe with the dtype in which the dump was begun, if the recipe gives none."""
    teacher = recipe.teacher
    if "dtype" in teacher.model_fields_set or not (dump / dump_files.MANIFEST).exists():
        return recipe
    begun = Manifest.load(dump).identity.get("teacher", {}).get("dtype")  # null: a server's own
    if begun is None or begun == teacher.dtype:
        return recipe
    log.info(f"{dump}: continues in {begun}, in which it was begun; a new dump here would be in {teacher.dtype}")
    return recipe.with_values(teacher=teacher.model_copy(update={"dtype": begun}))


def _contents_alone(corpus: CorpusConfig) -> CorpusConfig:
    others = tuple(map(_contents_alone, corpus.exclude))
    return corpus.model_copy(update={"turns": "contents", "reasoning": "keep", "exclude": others})


def as_dumped(recipe: Recipe, dump: Location, manifest: Manifest) -> Recipe:
    """Return the recipe with the arithmetic of a dump, wherever that is stored. Raises as `as_begun` does."""
    return _under(recipe, _known(dump, manifest))


def _known(dump: Location, manifest: Manifest) -> int:
    arithmetic = arithmetic_of(manifest.identity)
    if not 1 <= arithmetic <= ARITHMETIC:
        raise ValueError(
            f"{dump} was begun with arithmetic {arithmetic}; this release knows 1 to {ARITHMETIC}. Use the release "
            "that began it or a newer one, or give a new dump.path."
        )
    return arithmetic


def _under(recipe: Recipe, arithmetic: int) -> Recipe:
    return recipe.model_copy(update={"dump": recipe.dump.model_copy(update={"arithmetic": arithmetic})})


def libraries() -> dict[str, str]:
    """Return versions of libraries that may, rarely, change content slightly: Unicode tables, rendered templates."""
    return {name: version(name) for name in ("tokenizers", "transformers", "jinja2")}


def warn_other_libraries(dump: Location, manifest: Manifest) -> None:
    """Warn if the first existing shard was made with other versions of the libraries than the rest will be."""
    missing = {shard.index for shard in manifest.missing(dump)}
    existing = next((shard.path(dump) for shard in manifest.shards if shard.index not in missing), None)
    if existing is None or not missing:
        return
    with open_parquet(existing) as file:
        theirs = json.loads((file.schema_arrow.metadata or {}).get(Key.LIBRARIES.encode(), b"{}"))
    ours = libraries()
    differences = [
        f"{name} {other} there, {ours[name]} here" for name, other in theirs.items() if ours.get(name, other) != other
    ]
    if differences:
        log.warning(
            f"{dump}: {existing.name} was made with other libraries ({', '.join(differences)}); tokenizers and "
            "templates are the same, but go back to those versions if the shards must be identical to the last byte"
        )
