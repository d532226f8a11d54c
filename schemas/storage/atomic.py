"""Files and objects that are absent (or old) or complete, whatever interrupts us: one way to write a dump, two places
to put it.

In a folder a file is written beside its name, made durable (fsync), and renamed. In an object store it is written to
the machine's scratch folder, and one PUT of the whole object commits it (`schemas.storage.object_store`).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

from schemas.storage import object_store
from schemas.storage.locations import Location, RemotePath, StoreError


@contextmanager
def committed(path: Location, first: bool = False) -> Iterator[Path]:
    """A local name to write to. What is written there becomes `path`, which is absent (or old) or complete; after an
    exception nothing is left.

    Args:
        first: what is at `path` by then stays, and what was written here is dropped: the first commit wins.

    Raises:
        OSError: it cannot be written; says where and how to go on.
    """
    with _told(path):
        if isinstance(path, RemotePath):
            with tempfile.TemporaryDirectory(prefix="bld-") as scratch:
                local = Path(scratch) / path.name
                yield local
                content = local.read_bytes()
                _ = object_store.create(path, content) if first else object_store.replace(path, content)
            return
        partial = path.with_suffix(f".{writer_name()}.partial")
        try:
            yield partial
            if first:
                _sync_and_link(partial, path)
            else:
                sync_and_rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _told(path: Location) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}. What was complete stays, nothing half-written is left. "
            "Make room (or the folder writable), then run the same command again."
        ) from error


def writer_name() -> str:
    """This process, among all that may write to a shared folder: `host-4711`; no dots, for it is a part of a file's
    name.
    """
    return f"{gethostname().replace('.', '-')}-{os.getpid()}"


def remove(path: Location) -> None:
    """Delete a file or an object so that it stays deleted; nothing where there is none."""
    if isinstance(path, RemotePath):
        object_store.remove(path)
        return
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Location) -> None:
    """Make a folder and those above it, so that a power cut takes none of them back. A store has none."""
    if isinstance(folder, RemotePath):
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_and_rename(partial: Path, path: Path) -> None:
    """Make `partial` durable, then give it its name, then make the name durable."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def _sync_and_link(partial: Path, path: Path) -> None:
    """As `sync_and_rename`, unless there is a file of that name: to look and then to rename would leave time for
    another's.
    """
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            partial.replace(path)
    sync_folder(path.parent)


@contextmanager
def committed_folder(path: Path) -> Iterator[Path]:
    """A name to make a folder at, which becomes `path`, in place of what was there; after an exception nothing is left.

    What was there is gone only once the new folder, durable, has its name: killed in between, it lies under
    `PATH.replaced.partial`.
    """
    partial, replaced = (path.with_name(f"{path.name}{end}") for end in (".partial", ".replaced.partial"))
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    try:
        yield partial
        sync_tree(partial)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def first_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path`; where another writer was first, its folder stays and this
    one is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-", ignore_cleanup_errors=True) as scratch:
        ready = Path(scratch) / path.name  # in it, for what has a temporary folder's mode only this user may read
        ready.mkdir()
        yield ready
        sync_tree(ready)
        try:
            ready.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Make all files of a folder, and their names, durable."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
