"""A check before a dump is resumed: do its shards hold the model's own log-probabilities?

A release that did not know the model's head may have begun it, or a server may serve another model under the same name.
"""

from schemas.manifest import Manifest
from schemas.shard import read_shard
from schemas.storage.locations import Location
from stage1_teacher.engines.base import ListingEngine
from stage1_teacher.targets import own_logprobs
from stage1_teacher.targets.own_logprobs import window_of
from stage1_teacher.targets.teacher import Teacher


def check_resumed(dump: Location, manifest: Manifest, teacher: Teacher) -> None:
    """Raise ValueError if the first existing record holds log-probabilities that are not the model's own.

    Otherwise new shards would be right, and the dump half wrong.
    """
    missing = {shard.index for shard in manifest.missing(dump)}
    existing = [shard.path(dump) for shard in manifest.shards if shard.index not in missing]
    record = next((record for path in existing[:1] for record in read_shard(path) if record.segments), None)
    if record is None:
        return
    comparison = own_logprobs.compare(record, window_of(record, teacher), teacher)
    if not comparison.is_within_limit:
        why = (
            "the server serves another model, or serves it differently, than when the dump was begun. Go back to that "
            "one, or"
            if isinstance(teacher.engine, ListingEngine)
            else "an earlier release made it with a head that is not the model's, so it cannot be resumed:"
        )
        raise ValueError(
            f"{existing[0]}, doc_id {record.doc_id!r}: its log-probabilities of the teacher's tokens differ by "
            f"{comparison.nats:.3g} nats (half the mean square; limit {comparison.limit_nats:.3g}) from the model's "
            f"own: {why} give a new dump.path, or delete that folder to start again"
        )
