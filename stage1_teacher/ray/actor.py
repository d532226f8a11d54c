"""An engine on a machine of a cluster: what it is told, what it checks before it makes anything, how it makes a shard."""

import hashlib
import os
import socket
from collections.abc import Iterator, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Recipe
from pipeline.corpus.documents import Document
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.locations import location
from stage1_teacher.dump import shard_plan as plan
from stage1_teacher.dump.check_resumed import check_resumed
from stage1_teacher.dump.identity import teacher_identity
from stage1_teacher.dump.shard_writer import Made, make_shards
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher

ROOT = Path(__file__).resolve().parents[2]
# What decides what is in a shard, and this file, for both sides have to mean the same by a task. Not the command line, reports or set-up.
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
    "stage1_teacher/dump/shard_plan.py",
    "stage1_teacher/dump/shard_writer.py",
    "stage1_teacher/ray/actor.py",
)


class Task(NamedTuple):
    """What an engine has to know of the dump."""

    recipe: Recipe
    identity: dict[str, Any]
    accepted_engines: tuple[str, ...]
    audited: Set[str]
    folder: str  # that relative paths of the recipe start from
    code: str  # `code_sha256` where the dump was started
    over_machines: bool  # the engine's GPUs may lie on several


class ClusterEngine:
    """An engine in a process of its own."""

    def __init__(self) -> None:
        self._opened: tuple[Task, Teacher] | None = None

    def open(self, task: Task) -> str:
        """Start the engine; returns where it is. Raises ValueError where code, dump or teacher are not those of the start."""
        place = f"process {os.getpid()} of {socket.gethostname()}"
        if code_sha256() != task.code:
            raise ValueError(
                f"{place} runs another release of this package, or of torch, than where the dump was started; install the same on "
                "all machines of the cluster"
            )
        if Path(task.folder).is_dir():  # else paths must be absolute: one that is not found is named
            os.chdir(task.folder)
        dump = location(task.recipe.dump.path)
        if not (dump / "manifest.json").exists():
            raise ValueError(
                f"{place} does not find {dump}: dump.path must be a folder that all machines share under one name, or an address "
                "(s3://bucket/folder)"
            )
        teacher = load_tokenizer(task.recipe)
        corpus_sha256 = task.identity["corpus"]["sha256"]
        engine = engine_name(task.recipe.teacher, task.recipe.placement)
        ours = teacher_identity(task.recipe, teacher, engine, corpus_sha256)
        manifest = Manifest.load(dump)
        plan.require_identity(dump, manifest.identity, ours, task.accepted_engines)
        branches = bool(task.audited)
        opened = open_teacher(task.recipe, *teacher, branches=branches, over_machines=task.over_machines)
        try:
            check_resumed(dump, manifest, opened)
        except BaseException:
            opened.close()
            raise
        self._opened = task, opened
        return place

    def make(self, shard: ShardPlan, documents: list[Document]) -> Iterator[Made]:
        """Make a shard and commit it to the dump, yielding what each batch added."""
        assert self._opened is not None
        task, teacher = self._opened
        dump = location(task.recipe.dump.path)
        made = make_shards([(shard, documents)], teacher, task.recipe, task.identity, dump, task.audited)
        # Ray sends values into this generator, which `yield from` would pass on to one that takes none.
        for one in made:  # noqa: UP028
            yield one


def code_sha256(root: Path = ROOT) -> str:
    """Return the hash of the source files that decide what is in a shard (`CONTENT`, below `root`), and of torch's version."""
    digest = hashlib.sha256(version("torch").encode())
    for place in (root / part for part in CONTENT):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
