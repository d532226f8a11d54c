"""The actor on a machine of a cluster: opens an engine, checks that it belongs to the dump, and makes shards."""

import hashlib
import os
import socket
from collections.abc import Iterator, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Recipe
from pipeline.corpus.documents import Document
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.locations import location
from stage1_teacher.coordination.shard_writers import open_writers
from stage1_teacher.dump import shard_plan
from stage1_teacher.dump.check_resumed import check_resumed
from stage1_teacher.dump.identity import teacher_identity
from stage1_teacher.dump.shard_writer import ShardProgress, ShardWriter, fill_shards
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# Everything that decides a shard's content, and this file, because both sides must agree on `Task`. Not the command
# line, reports or set-up.
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
    "stage1_teacher/coordination/shard_draft.py",
    "stage1_teacher/dump/shard_plan.py",
    "stage1_teacher/dump/shard_writer.py",
    "stage1_teacher/ray/actor.py",
)


class Task(NamedTuple):
    """The part of a dump's settings that an engine needs."""

    recipe: Recipe
    identity: dict[str, Any]
    accepted_engines: tuple[str, ...]
    audited: Set[str]
    folder: str  # base of the recipe's relative paths
    code: str  # `code_sha256` of the driver
    over_machines: bool  # the engine's GPUs may be on several machines


class ClusterEngine:
    """An engine in its own process."""

    def __init__(self) -> None:
        self._writer: ShardWriter | None = None
        self._audited: Set[str] = frozenset()

    def open(self, task: Task) -> str:
        """Start the engine and return where it runs.

        Raises ValueError if code, dump or teacher are not the driver's.
        """
        place = f"process {os.getpid()} of {socket.gethostname()}"
        if code_sha256() != task.code:
            raise ValueError(
                f"{place} runs another release of this package, or of torch, than the machine where the dump was "
                "started; install the same releases on all machines of the cluster"
            )
        if Path(task.folder).is_dir():  # otherwise paths must be absolute; one that is missing is named in an error
            os.chdir(task.folder)
        dump = location(task.recipe.dump.path)
        if not (dump / dump_files.MANIFEST).exists():
            raise ValueError(
                f"{place} cannot find {dump}: dump.path must be a folder that all machines share under the same path, "
                "or an address (s3://bucket/folder)"
            )
        teacher = load_tokenizer(task.recipe)
        corpus_sha256 = task.identity["corpus"]["sha256"]
        engine = engine_name(task.recipe.teacher, task.recipe.placement)
        ours = teacher_identity(task.recipe, teacher, engine, corpus_sha256)
        manifest = Manifest.load(dump)
        shard_plan.require_identity(dump, manifest.identity, ours, task.accepted_engines)
        branches = bool(task.audited)
        opened = open_teacher(task.recipe, *teacher, branches=branches, over_machines=task.over_machines)
        try:
            check_resumed(dump, manifest, opened)
        except BaseException:
            opened.close()
            raise
        writers = open_writers(task.recipe.placement)
        self._writer, self._audited = ShardWriter(opened, task.recipe, task.identity, dump, writers), task.audited
        return place

    def make(self, shard: ShardPlan, documents: list[Document]) -> Iterator[ShardProgress]:
        """Make a shard, and yield what each batch added, and the shards committed in the meantime.

        It commits the shard to the dump at once, or, with writers in processes of their own, at any time later.
        """
        assert self._writer is not None
        # Ray sends values into this generator; `yield from` would pass them on to an iterator that takes none.
        for one in fill_shards([(shard, documents)], self._writer, self._audited):  # noqa: UP028
            yield one

    def flush(self) -> Iterator[ShardProgress]:
        """Wait until every shard that it has made is committed, and yield those."""
        assert self._writer is not None
        for one in self._writer.flush():  # noqa: UP028
            yield one


def code_sha256(root: Path = ROOT) -> str:
    """Return the hash of torch's version and of the files that decide a shard's content (`CONTENT`, below `root`)."""
    digest = hashlib.sha256(version("torch").encode())
    for place in (root / part for part in CONTENT):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
