"""A dump made longer: its corpus has grown at the end, and what is there already stays.

The plan is the fingerprint of the corpus. A shard is closed before it would overflow, whatever comes after it, so a longer corpus has the
same shards but for the last one, which may have taken in more documents. That one is made again; no other file is touched.
A shard's own metadata names its own documents, not the corpus: an extended dump has the very files of one that was made at once.
"""

import hashlib
from itertools import islice

from pipeline.config.identity import identity_differences
from pipeline.corpus.documents import Corpus
from pipeline.runtime.log import say
from schemas.manifest import Manifest, ShardPlan, with_accepted_engine
from schemas.storage.atomic import remove
from schemas.storage.locations import Location, open_parquet
from stage1_teacher.dump.shard_plan import document_digest

_CORPUS = "corpus.sha256"


def extend_dump(dump: Location, ours: Manifest, corpus: Corpus, accept_engine: str | None = None) -> None:
    """Let the dump's manifest grow to `ours` where only the corpus differs. Else nothing: a new dump, the same, or quite another one.

    Args:
        accept_engine: as `shard_plan.hold_to_identity` has it; engines that the dump accepts already stay accepted.
    Raises:
        ValueError: the corpus differs, and is not the dump's with more documents after it.
    """
    if not (dump / "manifest.json").exists():
        return
    theirs = Manifest.load(dump)
    accepted = {*theirs.accepted_engines, *([accept_engine] if accept_engine else [])}
    identity = with_accepted_engine(ours.identity, theirs.identity, accepted)
    ours = ours.model_copy(update={"identity": identity, "accepted_engines": theirs.accepted_engines})
    differences = identity_differences(theirs.identity, ours.identity)
    if len(differences) != 1 or not differences[0].startswith(_CORPUS):
        return
    _require_extension(dump, theirs, ours, corpus)
    # From here on the dump is not complete; the manifest goes last, so that no shard of the old plan counts as one of the new.
    remove(dump / "summary.json")
    last, grown = theirs.shards[-1], ours.shards[len(theirs.shards) - 1]
    if grown != last and planned_sha256(last.path(dump)) != grown.sha256:
        remove(last.path(dump))
    ours.save(dump)
    kept = len(theirs.shards) - len(theirs.missing(dump))
    more = sum(s.num_documents for s in ours.shards) - sum(s.num_documents for s in theirs.shards)
    say(f"{dump}: extended by {more} documents; {kept} of {len(theirs.shards)} shards stay as they are")


def planned_sha256(path: Location) -> str | None:
    """The plan's hash of the documents that a shard file was made from; None where there is no file."""
    if not path.exists():
        return None
    with open_parquet(path) as file:
        return str((file.metadata.metadata or {}).get(b"bld.shard_sha256", b"").decode())


def _require_extension(dump: Location, theirs: Manifest, ours: Manifest, corpus: Corpus) -> None:
    num = len(theirs.shards)
    if _count(ours) < _count(theirs):
        _refuse(dump, f"it has fewer documents: {_count(ours)} here, {_count(theirs)} there")
    changed = next((a for a, b in zip(theirs.shards[:-1], ours.shards, strict=False) if a != b), None)
    last = theirs.shards[-1]
    if changed is None and ours.shards[num - 1] != last and _digest(last, corpus) != last.sha256:
        changed = last
    if changed is not None:
        end = changed.first_document + changed.num_documents - 1
        _refuse(dump, f"documents {changed.first_document} to {end} (shard {changed.index}) are not those of the dump")


def _refuse(dump: Location, why: str) -> None:
    raise ValueError(
        f"{dump} holds another dump: {_CORPUS} differs, and the corpus is not that dump's with more documents at its end: {why}. "
        "Restore the corpus, give a new dump.path, or delete that folder to start again; `bld merge` joins dumps of different corpora."
    )


def _count(manifest: Manifest) -> int:
    return sum(shard.num_documents for shard in manifest.shards)


def _digest(shard: ShardPlan, corpus: Corpus) -> str:
    """The plan's hash of the documents that stand in the corpus where the shard's stood."""
    found = islice(corpus.documents(shard.first_document), shard.num_documents)
    return hashlib.sha256(b"".join(document_digest(document) for document in found)).hexdigest()
