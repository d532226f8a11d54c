"""A shard's seal: a SHA-256 over every byte of the file, stored inside it.

One flipped bit anywhere is detected from the file alone. The Parquet key-value metadata holds `bld.sha256`, 64
hexadecimal digits: the hash of the file with these 64 characters read as `0`. Page checksums detect most damage to
data, but none to a footer; the hash in a dump's summary exists only once the dump is complete.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from schemas.dump_files import Key
from schemas.storage.locations import Location

BLANK = "0" * 64
# In the footer (Thrift's compact form): the key, then "the next field is a string" and its length, 64.
_MARK = Key.SHA256.encode() + b"\x18\x40"
_TRAILER_BYTES = 8  # the footer's length, then PAR1
_CHUNK_BYTES = 1 << 20


def seal(path: Path) -> None:
    """Write the hash of a file into it, in place of `BLANK` under `Key.SHA256`."""
    with path.open("rb+") as file:
        at = _find(file, path)
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest.encode())


def check_seal(path: Location) -> str:
    """Return the file's own SHA-256 in hexadecimal. Raises ValueError if any byte differs from what was sealed."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        at = _find(file, path)
        file.seek(at)
        sealed = file.read(len(BLANK))
        actual = _digest(file, at, whole).encode()
    if sealed != actual:
        raise ValueError(
            f"{path} is damaged: its bytes hash to {actual[:12].decode()}.., "
            f"its seal says {sealed[:12].decode('latin-1')}.."
        )
    return whole.hexdigest()


def _find(file: BinaryIO, path: Location) -> int:
    """Return the offset of the seal's 64 characters. Raises ValueError if the file does not end like a sealed shard."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _TRAILER_BYTES, 0))
    trailer = file.read()
    footer_bytes = int.from_bytes(trailer[:4], "little")
    if not size:
        raise ValueError(f"{path} is empty: 0 bytes, as an interrupted copy leaves it")
    if len(trailer) < _TRAILER_BYTES or trailer[4:] != b"PAR1" or footer_bytes > size - _TRAILER_BYTES:
        raise ValueError(f"{path} is damaged: it does not end as a Parquet file of {size} bytes does")
    start = size - _TRAILER_BYTES - footer_bytes
    file.seek(start)
    at = file.read(footer_bytes).rfind(_MARK)
    if at < 0:
        raise ValueError(f"{path} is damaged, or not a shard of this release: its footer lacks {Key.SHA256}")
    return start + at + len(_MARK)


def _digest(file: BinaryIO, at: int, whole: "hashlib._Hash | None" = None) -> str:
    """Hash the file with the seal blank. `whole` is updated with the actual bytes in the same pass."""
    sealed = hashlib.sha256()
    file.seek(0)
    _update(file, at, sealed, whole)
    sealed.update(BLANK.encode())
    written = file.read(len(BLANK))
    if whole is not None:
        whole.update(written)
    _update(file, None, sealed, whole)
    return sealed.hexdigest()


def _update(file: BinaryIO, num_bytes: int | None, *digests: "hashlib._Hash | None") -> None:
    """Continue the hashes with `num_bytes` of the file, or with all the rest."""
    left = num_bytes
    while chunk := file.read(_CHUNK_BYTES if left is None else min(_CHUNK_BYTES, left)):
        for digest in digests:
            if digest is not None:
                digest.update(chunk)
        left = None if left is None else left - len(chunk)
