"""`bld merge`: joins dumps that differ only in their corpora; shards are linked or copied unchanged, and renumbered."""

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.identity import identity_differences
from pipeline.config.loading import load_recipe, read_values, save_recipe
from pipeline.dumps.card import public_name, write_card
from pipeline.dumps.completeness import require_complete
from pipeline.runtime import log
from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan, arithmetic_of, with_accepted_engine, write_json
from schemas.shard import window_names
from schemas.storage.atomic import committed, make_folder
from stage1_teacher.dump.shard_plan import corpus_sha256
from stage1_teacher.dump.summary import summarise


def merge_dumps(out: Path, dumps: Sequence[Path], accept_engine: Sequence[str] = ()) -> dict[str, Any]:
    """Join complete dumps into `out`, in the order given, and return the summary; run again, it continues.

    Args:
        accept_engine: engines, by name and version, that may have made some of the dumps, beside those that the dumps
            already accept.
    Raises:
        ValueError: a dump is incomplete, two differ in more than the corpus and an accepted engine (the field is
            named), two hold the same documents, or `out` holds something else.
    """
    manifests = check_mergeable(out, dumps, accept_engine)
    merged = _claim(out, merged_manifest(manifests), dumps[0])
    if (dumps[0] / dump_files.VOCABULARY).exists():  # the others' is the same: they have one tokenizer
        _link(dumps[0] / dump_files.VOCABULARY, out / dump_files.VOCABULARY)
    targets = iter(merged.shards)
    for dump, manifest in zip(dumps, manifests, strict=True):
        for shard in manifest.shards:
            _link(shard.path(dump), next(targets).path(out))
    summary = summarise(out, merged) | {"merged_from": [_origin(*pair) for pair in zip(dumps, manifests, strict=True)]}
    write_json(out / dump_files.SUMMARY, summary)
    write_card(out)
    if versions := summary.get("schema_versions"):
        log.warning(
            f"{out}: shards of the format's versions {' and '.join(map(str, versions))}, whose columns differ; bld "
            "reads all of them, but a tool that wants one table of all files does not: its card shows how to read each"
        )
    twice = sum(number > 1 for number in Counter(_document_ids(out, merged)).values())
    if twice:
        ids = f"{count_of(twice, 'document id')} {'occurs' if twice == 1 else 'occur'}"
        log.warning(f"{out}: {ids} more than once; corpus.id_field gives documents ids of their own")
    return summary


def check_mergeable(out: Path, dumps: Sequence[Path], accept_engine: Sequence[str] = ()) -> list[Manifest]:
    """Return the dumps' manifests. Checks every byte; raises ValueError if they cannot be one dump."""
    if len(dumps) < 2:
        raise ValueError(f"{count_of(len(dumps), 'dump')} to merge into {out}: give two or more")
    # Not Path.resolve, which raises RuntimeError for circular links.
    if os.path.realpath(out) in map(os.path.realpath, dumps):
        raise ValueError(f"{out} is one of the dumps to merge; give a new folder")
    _refuse_twice(dumps)
    manifests = [Manifest.load(dump) for dump in dumps]
    accepted = {*accept_engine, *(engine for manifest in manifests for engine in manifest.accepted_engines)}
    first = _nobody_accepted(manifests, accepted)
    for dump, manifest in zip(dumps, manifests, strict=True):
        ours = with_accepted_engine(manifest.identity, manifests[first].identity, accepted)
        differences = identity_differences(_but_corpus(manifests[first].identity), _but_corpus(ours))
        if differences:
            raise ValueError(
                f"{dumps[first]} and {dump} cannot be merged: they differ in {'; '.join(differences)} ({dumps[first]} "
                f"there, {dump} here). {_way_out(differences, manifests[first].identity, manifest.identity)}"
            )
    _refuse_same_documents(dumps, manifests)
    for dump in dumps:
        require_complete(dump, "Run `bld teacher` again to finish or repair it, then merge.")
    return manifests


def _engine(identity: dict[str, Any]) -> str:
    return str(identity.get("teacher", {}).get("engine"))


def _nobody_accepted(manifests: Sequence[Manifest], accepted: Collection[str]) -> int:
    """Return the index of a dump whose engine is not just accepted, to compare the others with; 0 if there is none."""
    return next((i for i, manifest in enumerate(manifests) if _engine(manifest.identity) not in accepted), 0)


def _way_out(differences: Sequence[str], first: dict[str, Any], other: dict[str, Any]) -> str:
    if [text.split(":")[0] for text in differences] == ["teacher.engine"]:
        return (
            f"Accept the other engine's different rounding with --accept-engine {_engine(other)}, or make one of them "
            "again with the other's engine."
        )
    older = min(arithmetic_of(first), arithmetic_of(other))
    hint = f" (dump.arithmetic={older})" if any(text.startswith("arithmetic:") for text in differences) else ""
    return f"Make one of them again with the other's settings{hint}."


def _but_corpus(identity: dict[str, Any]) -> dict[str, Any]:
    return {**identity, "corpus": _how_read(identity)}


def _how_read(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that says how any corpus is read."""
    return {key: value for key, value in identity.get("corpus", {}).items() if key not in ("sha256", "field")}


def _refuse_twice(dumps: Sequence[Path]) -> None:
    """Raise ValueError if a folder is named twice, under whatever path."""
    names: dict[str, Path] = {}
    for dump in dumps:
        folder = os.path.realpath(dump)
        if folder in names:
            other = "" if str(names[folder]) == str(dump) else f", as {names[folder]} and as {dump}"
            raise ValueError(f"{dump} is named twice{other}: a merge would hold its documents twice; name it once")
        names[folder] = dump


def _refuse_same_documents(dumps: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    seen: dict[str, str] = {}
    for dump, manifest in zip(dumps, manifests, strict=True):
        shards = {shard.sha256: f"{dump} (shard {shard.index})" for shard in manifest.shards}
        for sha256, where in shards.items():
            if sha256 in seen:
                raise ValueError(f"{seen[sha256]} and {where} hold the same documents; leave one of the dumps out")
        seen |= shards


def merged_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """Return the manifest of the dumps' plans one after another, renumbered; its corpus is all of theirs."""
    shards: list[ShardPlan] = []
    first = 0
    for shard in (shard for manifest in manifests for shard in manifest.shards):
        index = len(shards)
        shards.append(replace(shard, index=index, first_document=first, folder=dump_files.part_folder(index)))
        first += shard.num_documents
    fields = sorted({str(manifest.identity.get("corpus", {}).get("field")) for manifest in manifests})
    counts: Counter[str] = Counter()
    for manifest in manifests:
        counts.update(manifest.corpus_counts)
    engines = dict.fromkeys(engine for manifest in manifests for engine in manifest.accepted_engines)
    engines |= dict.fromkeys(_engine(manifest.identity) for manifest in manifests)
    engines.pop(_engine(manifests[0].identity))
    corpus = {"sha256": corpus_sha256(shards), "field": ", ".join(fields), **_how_read(manifests[0].identity)}
    return Manifest(
        schema_version=max(manifest.schema_version for manifest in manifests),
        identity=manifests[0].identity | {"corpus": corpus},
        corpus_counts=dict(counts),
        accepted_engines=tuple(engines),
        shards=tuple(shards),
    )


def _claim(out: Path, merged: Manifest, first: Path) -> Manifest:
    """Claim the folder for this merge, and return its manifest. Raises ValueError if it holds something else."""
    if (out / dump_files.MANIFEST).exists():
        theirs = Manifest.load(out)
        merged = merged.laid_out_as(theirs)
        if differences := _plan_differences(theirs, merged):
            raise ValueError(
                f"{out} holds another dump: {'; '.join(differences)}. Give a new folder, or delete that one"
            )
        if theirs != merged:  # begun by a release that did not record which engines the parts accept
            merged.save(out)
        return merged
    if out.exists() and any(path.name not in (dump_files.RECIPE, dump_files.SHARDS) for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and is not a dump; give a new folder")
    (out / dump_files.SHARDS).mkdir(parents=True, exist_ok=True)
    made_by = first / dump_files.RECIPE
    if made_by.exists():  # for the teacher's settings; the others differ only in the corpus
        save_recipe(load_recipe(made_by, [f"dump.path={yaml.safe_dump(str(out))}"]), out / dump_files.RECIPE)
    merged.save(out)
    return merged


def _plan_differences(theirs: Manifest, merged: Manifest) -> list[str]:
    """Return the fields in which the folder's merge differs from this one; accepted engines may differ."""
    plans = [{"shards": len(plan.shards), "corpus_counts": plan.corpus_counts} for plan in (theirs, merged)]
    return [
        *identity_differences(theirs.identity, merged.identity),
        *identity_differences(*plans),
        *(["shards: they hold other documents"] if theirs.shards != merged.shards else []),
    ]


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no links; an existing target is complete and kept."""
    if target.exists():
        return
    make_folder(target.parent)
    with committed(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, partial)


def _origin(dump: Path, manifest: Manifest) -> dict[str, Any]:
    recipe = read_values(dump / dump_files.RECIPE)
    source = (recipe.get("corpus") or {}).get("source", dump.name)
    documents = sum(shard.num_documents for shard in manifest.shards)
    return {"source": public_name(str(source)), "documents": documents, "corpus": manifest.identity.get("corpus")}


def _document_ids(out: Path, merged: Manifest) -> Iterator[str]:
    for shard in merged.shards:
        yield from (doc_id for doc_id, start in window_names(shard.path(out)) if start == 0)
