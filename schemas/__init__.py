"""The contract between the stages: shards and manifest, versions 1 to 3. No other package defines these names.

May import `schemas.storage`, and nothing else of the project.
"""

# The newest version, of which a new dump is. One that was begun in an older version continues in that.
SCHEMA_VERSION = 3
# Every version ever released, and the releases that read it. A version is removed from READS only in a release that is
# named here.
RELEASES = {1: "0.1 and later", 2: "0.2 and later", 3: "0.2 and later"}
READS = (1, 2, 3)
# Version of everything that decides a dump's numbers besides its settings: coverings and their shares, `doubt`,
# redistribution, windows, levels, and which rows of a corpus are documents. Part of a dump's identity. Raise it with
# any change to what the same settings store, keep the earlier versions working (a dump continues under the version that
# it was begun with), and add targets of the new version to the tests' golden files.
#   1: a dump without the number.
#   2: `doubt` recovers from dropped mass that rounds to all of it; a dump that stores everything stores it as float32
#      (`levels.EXACT`); Python code of a model counts; a corpus's byte order marks, arrays of JSON and compressed files
#      with other names are read for what they are.
ARITHMETIC = 2
END = 0xFF  # the symbol "the document (or the assistant's turn) ends here"; UTF-8 never contains it
NUM_SYMBOLS = 256


class VersionError(ValueError):
    """A schema version that this release does not read; the message ends with what can read it."""


def version_fault(where: object, version: object) -> str | None:
    """Return why something of this schema version cannot be read here, and what can read it; None if it can."""
    number = int(version) if isinstance(version, int) or (isinstance(version, str) and version.isdigit()) else None
    if number in READS:
        return None
    readable = f"{', '.join(map(str, READS[:-1]))} and {READS[-1]}"
    way_out = (
        f"bld {RELEASES[number]} can read it"
        if number in RELEASES
        else "It was written by a newer bld, or is not a dump"
    )
    return f"{where} has schema version {version!r}; this release reads {readable}. {way_out[0].upper()}{way_out[1:]}."
