"""Whole, conditional writes of objects to a store: the only module that imports obstore.

A PUT of a whole object is atomic: readers see the old object, or none, until all bytes have arrived, and a writer that
dies before then leaves nothing. With `If-None-Match: *` (Google: generation 0) exactly one of several writers of a name
succeeds. pyarrow, which we read with, offers no conditional writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from schemas.storage.locations import RemotePath, store_errors

if TYPE_CHECKING:
    from obstore.store import ObjectStore, S3Config

# One request carries a whole shard, some 100 MB by default: the client's own 30 s would abort it below 30 Mbit/s.
_TIMEOUT = "30min"
_WRITABLE = ("s3", "gs")


class StoredObject(NamedTuple):
    """An object as read from a store."""

    content: bytes
    e_tag: str | None
    modified: datetime  # by the store's clock, with its zone


def check_writable(path: RemotePath, key: str = "dump.path") -> None:
    """Raise ValueError for a store in which dumps, or written text, cannot be made; `key` is the recipe's."""
    if path.scheme not in _WRITABLE:
        what, then = "a dump", ", and `bld push` the dump when it is complete"
        if key != "dump.path":
            what, then = "text", ""
        raise ValueError(
            f"{path}: {what} cannot be made there: on a hub each file would be a separate commit. Give a local "
            f"{key}, or an address ({', '.join(f'{scheme}://' for scheme in _WRITABLE)}){then}"
        )


def create(path: RemotePath, content: bytes) -> bool:
    """Write a new object; returns False, and changes nothing, if it already exists. Raises StoreError."""
    return _put(path, content, "create")


def replace(path: RemotePath, content: bytes, e_tag: str | None = None) -> bool:
    """Write an object, replacing any existing one; with `e_tag`, only that version, else returns False.

    Raises StoreError.
    """
    return _put(path, content, "overwrite" if e_tag is None else {"e_tag": e_tag})


def read(path: RemotePath) -> StoredObject | None:
    """Read an object; None if it does not exist. Raises StoreError."""
    import obstore

    with _writing(path):
        try:
            response = obstore.get(_bucket(path), _key(path))
        except FileNotFoundError:
            return None
        return StoredObject(bytes(response.bytes()), response.meta["e_tag"], response.meta["last_modified"])


def remove(path: RemotePath) -> None:
    """Delete an object; does nothing if it does not exist. Raises StoreError."""
    import obstore

    with _writing(path):
        try:
            obstore.delete(_bucket(path), _key(path))
        except FileNotFoundError:  # S3 does not say, Google does
            return


def upload(path: RemotePath, local: Path) -> None:
    """Write a file of any size as an object, replacing any existing one, in parts if it is large. Raises StoreError.

    The object is there once all of its parts are. The parts of an upload that a kill interrupts are no object; a bucket
    can be told to drop them after some days.
    """
    import obstore

    with _writing(path):
        obstore.put(_bucket(path), _key(path), local, mode="overwrite")


def _put(path: RemotePath, content: bytes, mode: Any) -> bool:
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    with _writing(path):
        try:
            # One request, not a multipart upload: an interrupted one leaves no parts to pay for.
            obstore.put(_bucket(path), _key(path), content, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
    return True


@contextmanager
def _writing(path: RemotePath) -> Iterator[None]:
    """Turn obstore's errors into StoreError, without the pages of Rust debug output after their first lines."""
    from obstore.exceptions import BaseError

    with store_errors(path, path.scheme, "written"):
        try:
            yield
        except (BaseError, OSError) as error:
            raise OSError(" ".join(str(error).partition("\n\nDebug source")[0].split())) from error


def _key(path: RemotePath) -> str:
    return path.path.partition("/")[2]


def _bucket(path: RemotePath) -> "ObjectStore":
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = getattr(path.filesystem, "region", None)  # where pyarrow found the bucket
    return _opened(path.scheme, path.path.partition("/")[0], endpoint, region)


@lru_cache
def _opened(scheme: str, bucket: str, endpoint: str | None, region: str | None) -> "ObjectStore":
    """Open a bucket's client, which keeps its connections.

    It takes keys from the environment or the machine's role, as documented.
    """
    from obstore.store import GCSStore, S3Store

    if scheme == "gs":
        return GCSStore(bucket, client_options={"timeout": _TIMEOUT})
    # The store compares this hash with the bytes received, and refuses an object damaged in transit.
    config: S3Config = {"checksum_algorithm": "SHA256"}
    if endpoint:
        config["endpoint"] = endpoint
    if region:
        config["region"] = region
    plain = (endpoint or "").startswith("http://")
    return S3Store(bucket, config=config, client_options={"timeout": _TIMEOUT, "allow_http": plain})
