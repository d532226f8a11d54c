"""Files of a corpus, opened: what is compressed is decompressed, by what the file holds, and what is damaged is
named.
"""

import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
import pyarrow as pa
from fsspec.compression import compr

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
# None of these can start a text: each holds a byte that UTF-8 has not there, or (bz2) a number that nobody writes.
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    *((b"BZh%d1AY&SY" % level, "bz2") for level in range(1, 10)),
)
_HEAD_BYTES = 4096


class Peeked(io.RawIOBase):
    """A file whose first bytes have been read, from its start on."""

    def __init__(self, head: bytes, file: Any) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def peek(file: Any) -> tuple[bytes, io.BufferedReader]:
    """The first bytes of a file, and the whole of it."""
    head = b""
    while len(head) < _HEAD_BYTES and (part := file.read(_HEAD_BYTES - len(head))):
        head += part
    return head, io.BufferedReader(Peeked(head, file), 1 << 16)


@contextmanager
def opened(name: str, by_content: bool = True) -> Iterator[IO[bytes]]:
    """A file's content, decompressed. Raises ValueError, naming the file, for compressed content that is damaged.

    Args:
        by_content: a file that starts as a compressed one is one, whatever its name says; else its name alone decides.
    """
    by_name = next((kind for suffix, kind in COMPRESSIONS.items() if name.lower().endswith(suffix)), None)
    try:
        with fsspec.open(name, "rb", compression=None) as raw:
            head, file = peek(raw)
            found = next((kind for magic, kind in _MAGIC if by_content and head.startswith(magic)), by_name)
            if (
                found == "zstd"
            ):  # fsspec's reader stops, without a word, after the first frame of several, and where a frame is cut off
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
            else:
                yield file if found is None else compr[found](file, mode="r")
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Fetch or compress it again.") from error
