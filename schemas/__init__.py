"""The contract between the stages: shards and manifest, version 1. Nothing else knows these names.

May import `schemas.storage`, and nothing else of the project.
"""

SCHEMA_VERSION = 1  # what is written
# Every version ever released, and the releases that read it. A version leaves READS only with a release that says so
# here.
RELEASES = {1: "0.1 and later"}
READS = (1,)
# What decides a dump's numbers beside its settings: coverings and their shares, `doubt`, spreading, windows, levels,
# and which rows of a corpus are documents. Part of a dump's identity. Raise it with any change of what the same
# settings would store, keep what the numbers before it gave (a dump goes on under the one it was begun with), and add
# the new one's targets to the tests' golden ones.   1: a dump without the number.   2: `doubt` recovers from dropped
# mass that rounds to all of it; everything stored is stored as float32 (`levels.EXACT`); Python      code of a model
# counts; a corpus' byte order marks, arrays of JSON and compressed files of other names are read for what they are.
ARITHMETIC = 2
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
