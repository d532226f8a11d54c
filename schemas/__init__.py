"""The contract between the stages: shards and manifest, version 1. Nothing else knows these names."""

SCHEMA_VERSION = 1  # what is written
# Every version ever released, and the releases that read it. A version leaves READS only with a release that says so here.
RELEASES = {1: "0.1 and later"}
READS = (1,)
END = 0xFF  # the symbol "the document (or the assistant's turn) ends here"; UTF-8 never contains it
NUM_SYMBOLS = 256


def version_fault(where: object, version: object) -> str | None:
    """Why something of this schema version is not read here, and what reads it; None where it is."""
    number = int(version) if isinstance(version, int) or (isinstance(version, str) and version.isdigit()) else None
    if number in READS:
        return None
    readable = " and ".join(map(str, READS))
    way_out = (
        f"bld {RELEASES[number]} reads it" if number in RELEASES else "a newer bld reads it, if it is a dump at all"
    )
    return f"{where} has schema version {version!r}; this release reads {readable}. {way_out[0].upper()}{way_out[1:]}."
