"""Opening of corpus files: compression is detected by content, and damaged files are named."""

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
_BZ2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # the second ends a stream, here an empty one
# None of these can start a text: each has a byte that is invalid UTF-8 there, or (bz2) an implausible number.
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    *((b"BZh%d" % level + block, "bz2") for level in range(1, 10) for block in _BZ2_BLOCKS),
)
_HEAD_BYTES = 4096
_BUFFER_BYTES = 1 << 16
_SKIP_BYTES = 1 << 20


class Peeked(io.RawIOBase):
    """A file read from its start again after its first bytes were read."""

    def __init__(self, head: bytes, file: Any) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(part) :]
        buffer[: len(part)] = part
        return len(part)


class _Plain(io.BufferedReader):
    """A file that is not compressed and can be entered anywhere."""


class _Seekable(Peeked):
    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


def peek(file: Any) -> tuple[bytes, io.BufferedReader]:
    """Return the first bytes of a file, and the whole file."""
    head = b""
    while len(head) < _HEAD_BYTES and (part := file.read(_HEAD_BYTES - len(head))):
        head += part
    if isinstance(file, _Plain):
        file.seek(0)
        return head, file
    return head, io.BufferedReader(Peeked(head, file), _BUFFER_BYTES)


def is_plain(file: IO[bytes]) -> bool:
    """Return whether a file that `opened` gave can be entered anywhere."""
    return isinstance(file, _Plain)


def pass_over(file: IO[bytes], num_bytes: int) -> bool:
    """Go forward in a file that `opened` gave. Returns whether it had to be read, as a compressed one has to be."""
    if isinstance(file, _Plain):
        file.seek(num_bytes, io.SEEK_CUR)
        return False
    while num_bytes and (part := file.read(min(num_bytes, _SKIP_BYTES))):
        num_bytes -= len(part)
    return True


def _is_at_start(raw: Any) -> bool:
    """Go back to a file's start. Returns False, and goes nowhere, if that is impossible: a stream without a size."""
    try:
        return bool(raw.seekable() and raw.seek(0) == 0)
    except (OSError, ValueError):
        return False


@contextmanager
def opened(name: str, by_content: bool = True) -> Iterator[IO[bytes]]:
    """Open a file's content, decompressed. Raises ValueError, naming the file, for damaged content.

    Args:
        by_content: a file that starts like a compressed one is treated as one, whatever its name; else only the name
            decides.
    """
    by_name = next((kind for suffix, kind in COMPRESSIONS.items() if name.lower().endswith(suffix)), None)
    try:
        with fsspec.open(name, "rb", compression=None) as raw:
            head, file = peek(raw)
            compression = next((kind for magic, kind in _MAGIC if by_content and head.startswith(magic)), by_name)
            # fsspec's reader silently stops after the first of several frames, and where a frame is truncated.
            if compression is None and _is_at_start(raw):
                yield _Plain(_Seekable(b"", raw), _BUFFER_BYTES)
            elif compression == "zstd":
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
            else:
                yield file if compression is None else compr[compression](file, mode="r")
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name} cannot be read: {error}. Fetch or compress it again.") from error
