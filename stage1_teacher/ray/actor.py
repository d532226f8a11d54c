"""The actor on a machine of a cluster: checks that it has what the driver has, opens an engine and makes shards."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pipeline.corpus.documents import Document
from schemas.manifest import ShardPlan
from stage1_teacher.coordination.shard_work import ShardEngine, ShardProgress, Task

ROOT = Path(__file__).resolve().parents[2]
# Everything that decides a shard's content, and this file, because both sides must agree on `ClusterTask`. Not the
# command line, reports or set-up.
CONTENT = (
    "schemas",
    "pipeline/config",
    "pipeline/runtime/dtypes.py",
    "pipeline/runtime/huggingface.py",
    "pipeline/tokenization",
    "pipeline/sources",
    "pipeline/corpus",
    "pipeline/covering",
    "stage1_teacher/inputs",
    "stage1_teacher/engines",
    "stage1_teacher/reduction",
    "stage1_teacher/targets",
    "stage1_teacher/generation",
    "stage1_teacher/coordination/shard_draft.py",
    "stage1_teacher/coordination/shard_work.py",
    "stage1_teacher/dump/job.py",
    "stage1_teacher/dump/shard_plan.py",
    "stage1_teacher/dump/shard_writer.py",
    "stage1_teacher/ray/actor.py",
)


class ClusterTask(NamedTuple):
    """The task of an engine, and how to find what it needs on another machine.

    Attributes:
        folder: base of the recipe's relative paths.
        code: `code_sha256` of the driver.
        over_machines: the engine's GPUs may be on several machines.
    """

    task: Task
    folder: str
    code: str
    over_machines: bool


class ClusterEngine:
    """An engine in its own process."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._engine: ShardEngine | None = None

    def open(self, given: ClusterTask) -> str:
        """Start the engine and return where it runs.

        Raises ValueError if code, folder or model are not the driver's.
        """
        place = f"process {os.getpid()} of {socket.gethostname()}"
        if code_sha256() != given.code:
            raise ValueError(
                f"{place} runs another release of this package, or of torch, than the machine where the command was "
                "started; install the same releases on all machines of the cluster"
            )
        if Path(given.folder).is_dir():  # otherwise paths must be absolute; one that is missing is named in an error
            os.chdir(given.folder)
        given.task.check(place)
        self._engine = self._opened.enter_context(given.task.open(given.over_machines))
        return place

    def make(self, shard: ShardPlan, documents: list[Document]) -> Iterator[ShardProgress]:
        """Make a shard, and yield what each batch added, and the shards committed in the meantime.

        It commits the shard at once, or, with writers in processes of their own, at any time later.
        """
        assert self._engine is not None
        # Ray sends values into this generator; `yield from` would pass them on to an iterator that takes none.
        for one in self._engine.make([(shard, documents)]):  # noqa: UP028
            yield one

    def flush(self) -> Iterator[ShardProgress]:
        """Wait until every shard that it has made is committed, and yield those."""
        assert self._engine is not None
        for one in self._engine.flush():  # noqa: UP028
            yield one


def code_sha256(root: Path = ROOT) -> str:
    """Return the hash of torch's version and of the files that decide a shard's content (`CONTENT`, below `root`)."""
    digest = hashlib.sha256(version("torch").encode())
    for place in (root / part for part in CONTENT):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
