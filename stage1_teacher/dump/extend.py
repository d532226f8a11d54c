"""Extension of a dump whose corpus has grown at the end; existing shards are kept.

The plan is the corpus's fingerprint. A shard is closed before it would overflow, whatever follows, so a longer corpus
has the same shards except for the last one, which may take in more documents. Only that one is made again. A shard's
metadata names its own documents, not the corpus, so an extended dump has exactly the files of one that was made in one
go.
"""

from pipeline.config.identity import identity_differences
from pipeline.corpus.documents import DocumentReader
from pipeline.runtime import log
from pipeline.runtime.format import are, count_of
from schemas import dump_files
from schemas.dump_files import Key
from schemas.manifest import Manifest, with_accepted_engine
from schemas.storage.atomic import remove
from schemas.storage.locations import Location, open_parquet
from stage1_teacher.dump.places import Places
from stage1_teacher.dump.shard_plan import documents_sha256

_CORPUS = "corpus.sha256"


def extend_dump(
    dump: Location, ours: Manifest, reader: DocumentReader, places: Places, accept_engine: str | None = None
) -> None:
    """Extend the dump's manifest to `ours` if only the corpus differs; do nothing for a new, equal or different dump.

    Args:
        places: of our shards in the corpus that `reader` reads.
        accept_engine: as for `shard_plan.create_or_check_manifest`; engines that the dump accepts stay accepted.
    Raises:
        ValueError: the corpus differs, and is not the dump's with more documents at its end.
    """
    if not (dump / dump_files.MANIFEST).exists():
        return
    theirs = Manifest.load(dump)
    accepted = {*theirs.accepted_engines, *([accept_engine] if accept_engine else [])}
    identity = with_accepted_engine(ours.identity, theirs.identity, accepted)
    kept_values = {name: getattr(theirs, name) for name in ("schema_version", "accepted_engines")}
    ours = ours.model_copy(update={"identity": identity, **kept_values})
    ours = ours.laid_out_as(theirs)
    differences = identity_differences(theirs.identity, ours.identity)
    if len(differences) != 1 or not differences[0].startswith(_CORPUS):
        return
    last = theirs.shards[-1]
    # A shard begins at the same document in both plans if those before are the same.
    shard = min(last.index, len(ours.shards) - 1)
    documents = reader.read(places.start(shard), last.num_documents, places.filtered(shard))
    _require_extension(dump, theirs, ours, documents_sha256(documents))
    # From here on the dump is incomplete. The manifest is written last: no old shard may count as one of the new plan.
    remove(dump / dump_files.SUMMARY)
    grown = ours.shards[len(theirs.shards) - 1]
    if grown != last and planned_sha256(last.path(dump)) != grown.sha256:
        remove(last.path(dump))
    ours.save(dump)
    kept = len(theirs.shards) - len(theirs.missing(dump))
    more = sum(s.num_documents for s in ours.shards) - sum(s.num_documents for s in theirs.shards)
    shards = f"{kept} of {count_of(len(theirs.shards), 'shard')} {are(kept)}"
    log.info(f"{dump}: extended by {count_of(more, 'document')}; {shards} kept")


def planned_sha256(path: Location) -> str | None:
    """Return the planned hash of the documents that a shard was made from; None if there is no file."""
    if not path.exists():
        return None
    with open_parquet(path) as file:
        return str((file.metadata.metadata or {}).get(Key.SHARD_SHA256.encode(), b"").decode())


def _require_extension(dump: Location, theirs: Manifest, ours: Manifest, last_now: str) -> None:
    """Raise ValueError unless ours extends theirs; `last_now` hashes what is now in the place of their last shard."""
    num = len(theirs.shards)
    if _count(ours) < _count(theirs):
        _refuse(dump, f"it has fewer documents: {_count(ours)} here, {_count(theirs)} there")
    changed = next((a for a, b in zip(theirs.shards[:-1], ours.shards, strict=False) if a != b), None)
    last = theirs.shards[-1]
    if changed is None and ours.shards[num - 1] != last and last_now != last.sha256:
        changed = last
    if changed is not None:
        end = changed.first_document + changed.num_documents - 1
        _refuse(dump, f"documents {changed.first_document} to {end} (shard {changed.index}) are not those of the dump")


def _refuse(dump: Location, why: str) -> None:
    raise ValueError(
        f"{dump} holds another dump: {_CORPUS} differs, and the corpus is not that dump's with more documents at its "
        f"end: {why}. Restore the corpus, give a new dump.path, or delete that folder to start again; `bld merge` "
        "joins dumps of different corpora."
    )


def _count(manifest: Manifest) -> int:
    return sum(shard.num_documents for shard in manifest.shards)
