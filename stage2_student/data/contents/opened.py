"""A complete dump, opened."""

from pipeline.runtime.format import are, count_of
from schemas.manifest import Manifest
from schemas.storage.locations import Location


class OpenDump:
    """A complete dump.

    Raises:
        ValueError: a planned shard is missing, or none is planned.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        self.shards = [shard.path(path) for shard in self.manifest.shards]
        missing = [shard.file for shard in self.manifest.missing(path)]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            shards = f"{len(missing)} of {count_of(len(self.shards), 'shard')} {are(len(missing))}"
            raise ValueError(
                f"{path} is not complete: {shards} missing ({listed}); "
                "run `bld teacher` again with the same recipe; it continues where it stopped"
            )
        if not self.shards:
            raise ValueError(
                f"{path} has no shards: its corpus held no usable document ({self.manifest.corpus_counts})"
            )
