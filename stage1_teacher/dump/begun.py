"""What a dump was begun with and goes on with, whatever has changed on this machine since."""

import json
from importlib.metadata import version

from pipeline.config import CorpusConfig, Recipe
from pipeline.runtime.log import say, warn
from schemas import ARITHMETIC
from schemas.manifest import Manifest, arithmetic_of
from schemas.storage.locations import Location, location, open_parquet

LIBRARIES_KEY = "bld.libraries"


def as_begun(recipe: Recipe) -> Recipe:
    """The recipe with what it runs under: its own, else that of the dump in its folder, else the newest. That is the version of the
    arithmetic, the teacher's dtype, whose default is this machine's, and of chats whether their contents alone are read (`corpus.turns`).

    Raises:
        ValueError: the dump there follows a version that this release does not know.
    """
    dump = location(recipe.dump.path)
    recipe = _with_dtype_of(dump, _with_turns_of(dump, recipe))
    if recipe.dump.arithmetic is not None or not (dump / "manifest.json").exists():
        return _under(recipe, recipe.dump.arithmetic_used)
    found = _known(dump, Manifest.load(dump))
    if found != ARITHMETIC:
        say(
            f"{dump}: goes on under arithmetic {found}, with which it was begun; of a new dump it would be {ARITHMETIC}"
        )
    return _under(recipe, found)


def _with_turns_of(dump: Location, recipe: Recipe) -> Recipe:
    """The recipe with contents alone where the dump was begun so, and the recipe says nothing of it."""
    corpus = recipe.corpus
    if not (corpus.has_chats and corpus.turns == "rendered" and (dump / "manifest.json").exists()):
        return recipe
    if "turns" in Manifest.load(dump).identity.get("corpus", {}) or corpus.model_fields_set & {"turns", "reasoning"}:
        return recipe
    say(
        f"{dump} was begun with contents alone, and goes on so (corpus.turns: contents); a new dump.path has reasoning and calls too"
    )
    return recipe.model_copy(update={"corpus": _contents_alone(corpus)})


def _with_dtype_of(dump: Location, recipe: Recipe) -> Recipe:
    """Return the recipe with the dtype in which the dump was begun, where the recipe says none."""
    teacher = recipe.teacher
    if "dtype" in teacher.model_fields_set or not (dump / "manifest.json").exists():
        return recipe
    begun = Manifest.load(dump).identity.get("teacher", {}).get("dtype")  # null: a server's own
    if begun is None or begun == teacher.dtype:
        return recipe
    say(f"{dump}: goes on in {begun}, in which it was begun; here a new dump would be in {teacher.dtype}")
    return recipe.with_values(teacher=teacher.model_copy(update={"dtype": begun}))


def _contents_alone(corpus: CorpusConfig) -> CorpusConfig:
    others = tuple(map(_contents_alone, corpus.exclude))
    return corpus.model_copy(update={"turns": "contents", "reasoning": "keep", "exclude": others})


def as_dumped(recipe: Recipe, dump: Location, manifest: Manifest) -> Recipe:
    """The recipe under the arithmetic of a dump, wherever it lies. Raises as `as_begun` does."""
    return _under(recipe, _known(dump, manifest))


def _known(dump: Location, manifest: Manifest) -> int:
    found = arithmetic_of(manifest.identity)
    if not 1 <= found <= ARITHMETIC:
        raise ValueError(
            f"{dump} was begun under arithmetic {found}; this release knows 1 to {ARITHMETIC}. Go on with the release that began it, or a "
            "newer one, or give a new dump.path."
        )
    return found


def _under(recipe: Recipe, arithmetic: int) -> Recipe:
    return recipe.model_copy(update={"dump": recipe.dump.model_copy(update={"arithmetic": arithmetic})})


def libraries() -> dict[str, str]:
    """Versions that may decide content, though seldom and by little: Unicode's tables, what a template renders to."""
    return {name: version(name) for name in ("tokenizers", "transformers", "jinja2")}


def warn_other_libraries(dump: Location, manifest: Manifest) -> None:
    """Say where the first shard that is there was made with other versions of the libraries than the rest will be."""
    missing = {shard.index for shard in manifest.missing(dump)}
    there = next((shard.path(dump) for shard in manifest.shards if shard.index not in missing), None)
    if there is None or not missing:
        return
    with open_parquet(there) as file:
        theirs = json.loads((file.schema_arrow.metadata or {}).get(LIBRARIES_KEY.encode(), b"{}"))
    ours = libraries()
    other = [
        f"{name} {found} there, {ours[name]} here" for name, found in theirs.items() if ours.get(name, found) != found
    ]
    if other:
        warn(
            f"{dump}: {there.name} was made with other libraries ({', '.join(other)}); tokens and templates are compared by what "
            "they are, but go back to those versions if the shards have to be alike to the last byte"
        )
