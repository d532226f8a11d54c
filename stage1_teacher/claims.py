"""Who makes which shard, where several processes work on one dump: what one holds, the others pass over.

Byte i of the file `claims.lock` is locked by the process that makes shard i, and one byte far behind them by the one that writes a
JSON file. The kernel lets go when a process ends, however it ends, so a claim is never stale; the file itself stays empty. Byte-range
locks also hold between machines that share a folder over NFS version 4.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_JSON_BYTE = 1 << 40


class Claims:
    """This process's claims on a dump. One at a time per process and dump: to close any of them lets go of all."""

    def __init__(self, dump: Path) -> None:
        """Raises OSError where the folder cannot be written."""
        self._path = dump / "claims.lock"
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            raise OSError(f"{dump} cannot be written: {error}. Make it writable, or give another dump.path.") from error

    def take(self, shard: int) -> bool:
        """Claim a shard. False where another process has it; one that is ours already stays ours."""
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

    @contextmanager
    def writing_json(self) -> Iterator[None]:
        """While it lasts, nobody else writes the dump's manifest, recipe, summary or audit; waits for its turn."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _JSON_BYTE)
        try:
            yield
        finally:
            self.give_back(_JSON_BYTE)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
