"""Hashes of large files that are not computed anew by every process: a file of the same size and time has the same
one.
"""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from pipeline.sources.pypi import cache_folder, sha256_of
from schemas.storage.atomic import committed

_SMALL_BYTES = 1 << 20  # read sooner than looked up
_SETTLED_SECONDS = 2.0  # one that has just been written may be written again within a tick of its time stamp
_BLOB = re.compile(r"[0-9a-f]{64}")


def file_state(stat: os.stat_result) -> tuple[int, int, int, int]:
    """What of a file changes with its content: size, times, and which file it is.

    The time of modification alone can be kept or set: weights of one architecture are of one size, and those that `cp
    -p`, `rsync -a` or an archive puts in the place of others may have their time too. Nobody sets the time of change.
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def known_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    A hub's cache names a large file's blob by it. Any other large file is hashed once, and the hash kept in the cache
    under path and `file_state`.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return real.name
    stat = real.stat()
    if stat.st_size < _SMALL_BYTES:
        return sha256_of(real)
    key = hashlib.sha256(f"{real}\0{file_state(stat)}".encode()).hexdigest()
    kept = cache_folder() / "hashes" / key
    with suppress(OSError):
        if _BLOB.fullmatch(found := kept.read_text(encoding="ascii")):
            return found
    found = sha256_of(real)
    if time.time() - stat.st_mtime > _SETTLED_SECONDS and file_state(real.stat()) == file_state(stat):
        with suppress(OSError):  # a cache that cannot be written costs time, and nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            with committed(kept) as partial:
                partial.write_text(found, encoding="ascii")
    return found
