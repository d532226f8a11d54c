"""Copies of whole files of any size between a local folder and a location. A copy is absent (or old) or complete."""

import shutil
from pathlib import Path

from schemas.storage import object_store
from schemas.storage.atomic import committed, make_folder
from schemas.storage.locations import Location, RemotePath, store_errors

_BUFFER_BYTES = 8 << 20


def copy_to(local: Path, path: Location) -> None:
    """Copy a local file to a location. Raises OSError."""
    if isinstance(path, RemotePath):
        object_store.upload(path, local)
        return
    make_folder(path.parent)
    with committed(path) as partial:
        shutil.copyfile(local, partial)


def copy_from(path: Location, local: Path) -> None:
    """Copy a file from a location to a local one, which is complete only once this returns. Raises OSError."""
    if not isinstance(path, RemotePath):
        shutil.copyfile(path, local)
        return
    with store_errors(path, path.scheme), path.open() as source, local.open("wb") as target:
        shutil.copyfileobj(source, target, _BUFFER_BYTES)
