"""Where a dump is: a local folder, or a folder of an object store by its address (s3://, gs://, hf://).

An address names a place and holds no secret: it is stored with recipes and shown in messages. Keys, endpoints and
regions come from the environment variables that each store's own tools read; what has to be asked for beside them is in
`_s3` and `_gs`.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

_BUFFER_BYTES = 8 << 20  # read at once: a request to a store takes as long as some megabytes
_PART_BYTES = 256 << 10
_REMOTE_PART_BYTES = 2 << 20  # some 40 requests for a shard of 16 MiB of text
_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_NO_SIGN_REQUEST=1 for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST, CLOUDSDK_AUTH_DISABLE_CREDENTIALS=1 for a public bucket",
    "hf": "HF_TOKEN, HF_ENDPOINT",
}


class Stat(NamedTuple):
    """Of a file."""

    st_size: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an object store. Of `pathlib.Path` it has what reading a dump takes.

    All that reads raises OSError, which says what was read and which variables the store looks at.
    """

    scheme: str
    path: str  # bucket/key
    filesystem: fs.FileSystem

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, part: str) -> "RemotePath":
        return RemotePath(self.scheme, f"{self.path}/{part}", self.filesystem)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.scheme, self.path.rpartition("/")[0], self.filesystem)

    def exists(self) -> bool:
        with reaching(self, self.scheme):
            return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def stat(self) -> Stat:
        with reaching(self, self.scheme):
            return Stat(self.filesystem.get_file_info(self.path).size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        assert mode == "rb"
        with reaching(self, self.scheme):
            raw = cast(io.RawIOBase, self.filesystem.open_input_file(self.path))
        return io.BufferedReader(raw, _BUFFER_BYTES)

    def read_text(self, encoding: str) -> str:
        with reaching(self, self.scheme), self.open() as file:
            return file.read().decode(encoding)

    def iterdir(self) -> "Iterator[RemotePath]":
        """What lies in a folder; nothing where there is no folder."""
        with reaching(self, self.scheme):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return (self / info.base_name for info in found)


class StoreError(OSError):
    """An object store, or the way to it, failed."""


@contextmanager
def reaching(what: object, scheme: str, done: str = "read") -> Iterator[None]:
    """Tell a failure on the way to a store with what was to be read or written, and with what the way hangs on."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        way = f"The environment says how it is reached: {_ENVIRONMENT[scheme]}"
        raise StoreError(f"{what} cannot be {done}: {error}. {way}") from error


Location = Path | RemotePath
AnyLocation = TypeVar("AnyLocation", Path, RemotePath, Location)


def check_address(text: str) -> str:
    """The text itself. Raises ValueError for an address that no store here answers to, or that holds more than a
    place.
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    if scheme not in (*_STORES, "file"):
        raise ValueError(f"{scheme}:// is no store that is read here; give a folder, or {_SCHEMES}")
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment:
        # The text is not repeated: it may be a key.
        raise ValueError(
            f"an address must hold no user, password, query or fragment: recipes are stored. Give them by the environment: "
            f"{_ENVIRONMENT.get(scheme, 'none are needed for a file')}"
        )
    if not rest.strip("/") or (scheme == "file" and not rest.startswith("/")):
        raise ValueError(f"{text} names no folder; give {_SCHEMES}")
    return text


def location(text: str) -> Location:
    """A folder by its path or address, whether it is there or not. Raises ValueError as `check_address` does."""
    scheme, mark, rest = check_address(text).partition("://")
    if not mark:
        return Path(text)
    if scheme == "file":
        return Path(unquote(rest))
    path = rest.strip("/")
    with reaching(text, scheme):
        return RemotePath(scheme, path, _STORES[scheme](path.partition("/")[0]))


def names(folder: Location) -> set[str]:
    """What lies in a folder, by name: one request where asking for each file would be thousands. Empty where there is
    none.
    """
    return {path.name for path in folder.iterdir()} if isinstance(folder, RemotePath) or folder.exists() else set()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Arrow does not say which file it could not read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None or str(path) in str(error):
            raise
        if not path.stat().st_size:
            raise ValueError(
                f"{path} is empty: 0 bytes, as a copy that was cut off leaves it. Copy it again, or delete it and run `bld teacher` again"
            ) from error
        raise ValueError(f"{path} is damaged: {error}. `bld verify` says what else is wrong") from error


@contextmanager
def open_parquet(path: Location, beside_others: bool = False) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose pages are checked as they are read.

    `beside_others`: one of many that are open and read on bit by bit. Of each column a part is held at a time, of a
    shard of 16 MiB of text some 35 MB in all; else whatever a row group has of it, some 125 MB.
    """
    if isinstance(path, Path):
        buffers = {"buffer_size": _PART_BYTES, "pre_buffer": False} if beside_others else {}
        with _naming(path), pq.ParquetFile(path, page_checksum_verification=True, **buffers) as file:
            yield file
        return
    # pre_buffer: a column's bytes are asked for together and ahead, not one after another as they are decoded.
    buffers = {"buffer_size": _REMOTE_PART_BYTES, "pre_buffer": False} if beside_others else {"pre_buffer": True}
    with (
        reaching(path, path.scheme),
        pq.ParquetFile(path.path, filesystem=path.filesystem, page_checksum_verification=True, **buffers) as file,
    ):
        yield file


def _s3(bucket: str) -> fs.FileSystem:
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not endpoint.netloc:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        anonymous=_is_on("AWS_NO_SIGN_REQUEST"),
        region=region,
        scheme=endpoint.scheme or None,
        endpoint_override=endpoint.netloc or None,
    )


def _gs(bucket: str) -> fs.FileSystem:
    emulator = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST") or "")
    return fs.GcsFileSystem(
        anonymous=_is_on("CLOUDSDK_AUTH_DISABLE_CREDENTIALS") or bool(emulator.netloc),
        scheme=emulator.scheme or None,
        endpoint_override=emulator.netloc or None,
    )


def _hf(_: str) -> fs.FileSystem:
    return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("hf")))


_STORES: dict[str, Callable[[str], fs.FileSystem]] = {"s3": _s3, "gs": _gs, "hf": _hf}
_SCHEMES = "s3://bucket/folder, gs://bucket/folder, hf://datasets/owner/name or file:///folder"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "yes", "true")
