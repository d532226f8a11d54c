"""Atomic writes to folders and object stores: a file is absent (or old) or complete, whatever interrupts us.

In a folder a file is written under a temporary name, made durable (fsync), and renamed. For an object store it is
written to a local temporary folder, and one PUT of the whole object commits it (`schemas.storage.object_store`).
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
    """Yield a local path to write to; its content becomes `path`, which is absent (or old) or complete.

    After an exception nothing is left.

    Args:
        first: keep what already exists at `path`, and discard what was written here: the first commit wins.

    Raises:
        OSError: it cannot be written; says where and what to do.
    """
    with _explain_os_error(path):
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
def _explain_os_error(path: Location) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}. Complete files are kept, and no incomplete one is left. "
            "Free disk space (or make the folder writable), then run the same command again."
        ) from error


def writer_name() -> str:
    """Return a name for this process, unique among all that may write to a shared folder: `host-4711`.

    It has no dots, because it becomes part of a file name.
    """
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return gethostname().replace(".", "-")


def is_left_over(partial: Path) -> bool:
    """Return whether the process that was writing a partial file has ended; False for one of another machine."""
    host, _, pid = partial.stem.rpartition(".")[2].rpartition("-")
    if host != _host() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)  # sends no signal
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        return False
    return False


def remove(path: Location) -> None:
    """Delete a file or an object durably; does nothing if it does not exist."""
    if isinstance(path, RemotePath):
        object_store.remove(path)
        return
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Location) -> None:
    """Make a folder and its parents, durably. Does nothing for a store, which has no folders."""
    if isinstance(folder, RemotePath):
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_and_rename(partial: Path, path: Path) -> None:
    """Make `partial` durable, rename it to `path`, then make the name durable."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def _sync_and_link(partial: Path, path: Path) -> None:
    """Do as `sync_and_rename`, unless a file of that name exists.

    A check before a rename would leave time for another process to create it.
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
    """Yield a path to make a folder at, which then replaces `path`; after an exception nothing is left.

    The old folder is removed only once the new one is durable and renamed: after a kill in between, it is at
    `PATH.replaced.partial`.
    """
    partial, replaced = (path.with_name(f"{path.name}{end}") for end in (".partial", ".replaced.partial"))
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
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
    """Yield an empty folder to write into, which becomes `path`.

    If another writer was first, its folder is kept and this one is discarded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-", ignore_cleanup_errors=True) as scratch:
        ready = Path(scratch) / path.name  # a subfolder, because only this user may read the temporary folder itself
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
