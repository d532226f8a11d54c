"""A draft that does something else than to write a shard; the process that writes it imports little."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from schemas.storage.atomic import writer_name
from schemas.storage.locations import Location
from stage1_teacher.coordination.shard_draft import Draft


@dataclass
class FakeDraft(Draft):
    """A draft that writes the number of its process, or fails, waits or dies; `die once` dies at its first attempt."""

    act: str = "write"

    def write(self, path: Location, identity: Mapping[str, object], extra: Mapping[str, str], zstd_level: int) -> int:
        partial_file = Path(str(path)).with_suffix(f".{writer_name()}.partial")
        if self.act == "die" or (self.act == "die once" and not list(path.parent.glob("*.died"))):
            partial_file.write_bytes(b"half")
            Path(f"{path}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.act == "fail":
            raise ValueError(f"{path.name} is full")
        if self.act == "wait":
            time.sleep(0.5)
        Path(str(path)).write_text(str(os.getpid()))
        return zstd_level
