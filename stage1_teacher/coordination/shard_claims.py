"""Who makes which shard, where several processes work on one dump: what one holds, the others pass over.

Claims save work and nothing else: a shard that two processes make all the same is committed once, whole, by the first.

In a folder byte i of the file `claims.lock` is locked by the process that makes shard i, and one byte far behind them by the one that
writes a JSON file. The kernel lets go when a process ends, however it ends, so such a claim is never stale; the file itself stays
empty. Byte-range locks also hold between machines that share a folder over NFS version 4. An object store has no locks:
`stage1_teacher.coordination.store_leases`.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from schemas.storage.locations import Location, RemotePath

_JSON_BYTE = 1 << 40


class Claims(Protocol):
    """This process's claims on a dump; a context manager that lets go of all of them."""

    def take(self, shard: int) -> bool:
        """Claim a shard. False where another process has it; one that is ours already stays ours."""

    def give_back(self, shard: int) -> None:
        """Let go of a shard that is made, or will not be."""

    def keep(self) -> None:
        """Called now and then while shards are made, so that what is claimed stays so."""

    def wait(self) -> bool:
        """Wait a little, where what others hold may become free without a sign; False, at once, where a look again would not help."""

    def writing_json(self) -> AbstractContextManager[None]:
        """While it lasts, nobody else writes the dump's manifest, recipe, summary or audit; waits for its turn."""

    def remove_dead_partials(self) -> None:
        """Delete what a killed process left half written of shards that nobody is making."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def require_place(dump: Location) -> None:
    """Raises ValueError for a store in which no dump can be made; asks nothing of it."""
    if isinstance(dump, RemotePath):
        from schemas.storage import object_store as objects

        objects.check_writable(dump)


def open_claims(dump: Location) -> Claims:
    """Raises OSError where the dump cannot be written to, ValueError for a store that cannot hold one."""
    if isinstance(dump, RemotePath):
        from stage1_teacher.coordination.store_leases import StoreClaims

        return StoreClaims(dump)
    return FolderClaims(dump)


class FolderClaims:
    """Locks on bytes of a file. One at a time per process and dump: to close any of them lets go of all."""

    def __init__(self, dump: Path) -> None:
        """Raises OSError where the folder cannot be written."""
        self._dump, self._path = dump, dump / "claims.lock"
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            raise OSError(f"{dump} cannot be written: {error}. Make it writable, or give another dump.path.") from error

    def take(self, shard: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise OSError(
                f"{self._path} cannot be locked: {error}. Put the dump on a file system with locks (NFS: version 4), "
                "and copy it where it is wanted afterwards."
            ) from error
        return True

    def give_back(self, shard: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def keep(self) -> None:
        return

    def wait(self) -> bool:
        return False

    @contextmanager
    def writing_json(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _JSON_BYTE)
        try:
            yield
        finally:
            self.give_back(_JSON_BYTE)

    def remove_dead_partials(self) -> None:
        with self.writing_json():
            for left in self._dump.glob(
                "*.partial"
            ):  # a living process writes these only in its turn, which is ours now
                left.unlink(missing_ok=True)
        for left in self._dump.glob("*/part-*.partial"):  # shards and their costs
            index = int(left.name.removeprefix("part-").split(".")[0])
            if self.take(index):
                left.unlink(missing_ok=True)
                self.give_back(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
