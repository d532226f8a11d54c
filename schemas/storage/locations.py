"""Locations of dumps: a local folder, or a folder of an object store by its address (s3://, gs://, hf://).

An address holds no secret: it is stored in recipes and shown in messages. Keys, endpoints and regions come from the
environment variables that each store's own tools read; `_s3` and `_gs` handle those that pyarrow does not read itself.
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

_BUFFER_BYTES = 8 << 20  # read at once: the latency of a request to a store equals some megabytes of transfer
_PART_BYTES = 256 << 10
_REMOTE_PART_BYTES = 2 << 20  # some 40 requests for a shard of 16 MiB of text in one row group
_GROUP_BYTES = 16 << 20  # requested at once; three times what a row group of 1 MiB of text takes
_ENVIRONMENT = {
    "s3": (
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, "
        "AWS_NO_SIGN_REQUEST=1 for a public bucket"
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST, CLOUDSDK_AUTH_DISABLE_CREDENTIALS=1 for a public bucket"
    ),
    "hf": "HF_TOKEN, HF_ENDPOINT",
}


class Stat(NamedTuple):
    """The size of a file."""

    st_size: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an object store, with the part of `pathlib.Path` that is needed to read a dump.

    Methods that read raise OSError, which says what was read and which environment variables the store uses.
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
        with store_errors(self, self.scheme):
            return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def stat(self) -> Stat:
        with store_errors(self, self.scheme):
            return Stat(self.filesystem.get_file_info(self.path).size)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        assert mode == "rb"
        with store_errors(self, self.scheme):
            raw = cast(io.RawIOBase, self.filesystem.open_input_file(self.path))
        return io.BufferedReader(raw, _BUFFER_BYTES)

    def read_text(self, encoding: str) -> str:
        with store_errors(self, self.scheme), self.open() as file:
            return file.read().decode(encoding)

    def iterdir(self) -> "Iterator[RemotePath]":
        """Yield the members of a folder; nothing if it does not exist."""
        with store_errors(self, self.scheme):
            members = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return (self / info.base_name for info in members)

    def files_below(self) -> set[str]:
        """Return the paths of all files in a folder, relative to it, by one listing."""
        with store_errors(self, self.scheme):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{self.path}/") for info in found if info.is_file}


class StoreError(OSError):
    """An object store, or the connection to it, failed."""


@contextmanager
def store_errors(what: object, scheme: str, done: str = "read") -> Iterator[None]:
    """Turn an OSError into a StoreError that says what was accessed, and which variables configure the access."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        variables = f"Access is configured by environment variables: {_ENVIRONMENT[scheme]}"
        raise StoreError(f"{what} cannot be {done}: {error}. {variables}") from error


Location = Path | RemotePath
AnyLocation = TypeVar("AnyLocation", Path, RemotePath, Location)


def check_address(text: str) -> str:
    """Return the text itself. Raises ValueError for an unknown scheme, or an address that is more than a location."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    if scheme not in (*_STORES, "file"):
        raise ValueError(f"{scheme}:// is not a supported store; give a folder, or {_SCHEMES}")
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment:
        # The text is not repeated: it may hold a key.
        raise ValueError(
            "an address must hold no user, password, query or fragment, because recipes are stored. "
            f"Give them by environment variables: {_ENVIRONMENT.get(scheme, 'none are needed for a file')}"
        )
    if not rest.strip("/") or (scheme == "file" and not rest.startswith("/")):
        raise ValueError(f"{text} names no folder; give {_SCHEMES}")
    return text


def is_location(text: str) -> bool:
    """Return whether a text is a path, or an address of a kind that `location` knows."""
    scheme, mark, _ = text.partition("://")
    return not mark or scheme in (*_STORES, "file")


def location(text: str) -> Location:
    """Return the location of a path or address, existing or not. Raises ValueError as `check_address` does."""
    scheme, mark, rest = check_address(text).partition("://")
    if not mark:
        return Path(text)
    if scheme == "file":
        return Path(unquote(rest))
    path = rest.strip("/")
    with store_errors(text, scheme):
        return RemotePath(scheme, path, _STORES[scheme](path.partition("/")[0]))


def names(folder: Location) -> set[str]:
    """Return the names of a folder's members; empty if it does not exist.

    One request, instead of thousands to ask for each file.
    """
    return {path.name for path in folder.iterdir()} if isinstance(folder, RemotePath) or folder.exists() else set()


def names_below(folder: Location) -> set[str]:
    """Return the paths of all files in a folder, at any depth, relative to it; empty if it does not exist."""
    if isinstance(folder, RemotePath):
        return folder.files_below()
    found: set[str] = set()
    for at, _, files in os.walk(folder):
        inner = os.path.relpath(at, folder)
        found.update(files if inner == "." else (f"{inner}/{name}" for name in files))
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in Arrow's errors, which do not say which file could not be read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None or str(path) in str(error):
            raise
        if not path.stat().st_size:
            raise ValueError(
                f"{path} is empty: 0 bytes, as an interrupted copy leaves it. "
                "Copy it again, or delete it and run `bld teacher` again"
            ) from error
        said = str(error).rstrip(".")
        raise ValueError(f"{path} is damaged: {said}. `bld verify` lists everything that is wrong") from error


@contextmanager
def open_parquet(path: Location, small_buffers: bool = False) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose page checksums are verified as it is read.

    `small_buffers`: for one of many files that are open at once and read in turns. Only a part of each column is held
    in memory at a time, some 35 MB for a shard of 16 MiB of text in one row group; otherwise a whole row group, some
    125 MB. Small row groups are requested whole from a store, one after another.
    """
    if isinstance(path, Path):
        buffers = {"buffer_size": _PART_BYTES, "pre_buffer": False} if small_buffers else {}
        with _naming(path), pq.ParquetFile(path, page_checksum_verification=True, **buffers) as file:
            yield file
        return
    with store_errors(path, path.scheme), path.filesystem.open_input_file(path.path) as source:
        footer = pq.read_metadata(source)
        groups = map(footer.row_group, range(footer.num_row_groups))
        # pre_buffer: the bytes of all columns are requested together and ahead, not one by one as they are decoded.
        ahead = not small_buffers or max(map(_group_bytes, groups), default=0) <= _GROUP_BYTES
        buffers = {"pre_buffer": True} if ahead else {"buffer_size": _REMOTE_PART_BYTES, "pre_buffer": False}
        with pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, **buffers) as file:
            yield file


def _group_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


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
