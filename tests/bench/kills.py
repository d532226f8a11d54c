"""Kill a dump at random moments, with workers in parallel, and see that nothing but the shards in flight is ever lost.

    .venv/bin/python -m tests.bench.kills [--kills 50] [--flips 1000] [--interrupts 4] [--workers 2] [--seed 0]

A round starts the workers on one dump and sends each SIGKILL after a time of its own: anywhere in its run, or just when
a shard is half written. After every round each shard that exists must be whole, byte for byte, and one that was there
before must be untouched. A dump that is complete must verify, and hold what a dump that nobody disturbed holds; then
the next one is begun. Interrupts are SIGINT and SIGTERM, which must leave nothing half written and exit with 130 and
143. Flips are single bits anywhere in any shard, and truncations, of a dump without a summary: `verify` must find every
one.

Workers are forked from this process, which has imported all that a worker imports and computed nothing (threads do not
survive a fork): a kill costs a second, not ten.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
import yaml

from pipeline import cli
from schemas.file_seal import check_seal
from schemas.manifest import Manifest
from stage1_teacher.verification.verify import verify_dump, verify_shard
from tests.support.tiny import END_OF_TEXT, tiny_model

Stamp = tuple[int, int, int]  # inode, size, time of writing


class BenchError(AssertionError):
    """A broken promise of the dump."""


def in_child(work: Callable[[], int], log: Path) -> int:
    """Fork; the child runs `work` and exits with its result, its output in `log`. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        code = work()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int) -> int:
    """Return the exit code as a shell gives it, but negative if a signal ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dump_command(recipe: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    sys.argv = ["bld", "teacher", str(recipe)]
    try:
        cli.main()
    finally:
        (recipe.parent / "modules.json").write_text(json.dumps(list(sys.modules)), encoding="utf-8")
    return 0


def import_as(modules: Path) -> None:
    """Import everything that another process had imported at its end."""
    for name in json.loads(modules.read_text(encoding="utf-8")):
        if name not in sys.modules and name.split(".")[0] != "__main__":
            with suppress(ImportError, AttributeError):  # parts of packages that are no modules of their own
                importlib.import_module(name)


def write_recipe(folder: Path, model: Path, num_documents: int) -> Path:
    folder.mkdir(parents=True)
    corpus = folder / "corpus.jsonl"
    texts = [f"the thing number {i} and the other thing, é or {'in ' * (i % 7)}{i}" for i in range(num_documents)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    ends = {"start": END_OF_TEXT, "end": [END_OF_TEXT]}
    teacher = {"model": str(model), "engine": "transformers", "dtype": "float32", "max_tokens": 64, "overlap_tokens": 8}
    recipe = {
        "corpus": {"source": str(corpus)},
        "teacher": teacher | ends,
        "dump": {"path": str(folder / "dump"), "shard_bytes": 300},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


class Killing:
    """One dump that is killed again and again, beside one that is not."""

    def __init__(self, root: Path, seed: int, num_documents: int) -> None:
        self.random = random.Random(seed)
        self.root, self.log = root, root / "log.txt"
        self._must(in_child(lambda: tiny_model(root / "model") and 0, self.log))
        self.whole = write_recipe(root / "whole", root / "model", num_documents)
        self._must(in_child(lambda: dump_command(self.whole), self.log))
        import_as(root / "whole" / "modules.json")
        shutil.rmtree(root / "whole" / "dump")
        started = time.monotonic()
        self._must(in_child(lambda: dump_command(self.whole), self.log))
        self.seconds = time.monotonic() - started
        self.recipe = write_recipe(root / "killed", root / "model", num_documents)
        self.dump = root / "killed" / "dump"
        self.kills = self.half_written = self.completed = 0
        self.before: dict[str, Stamp] = {}

    def _must(self, pid: int) -> None:
        code = exit_code(pid)
        if code:
            raise BenchError(f"exit code {code}:\n{self.log.read_text(encoding='utf-8')[-3000:]}")

    def round(self, num_workers: int) -> None:
        """Start workers, kill each at its moment, check what is left."""
        alive = {in_child(lambda: dump_command(self.recipe), self.log): self._moment() for _ in range(num_workers)}
        while alive:
            for pid, moment in list(alive.items()):
                if moment():
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and not moment():
                    continue
                code = os.waitstatus_to_exitcode(status if ended else os.waitpid(pid, 0)[1])
                if code not in (0, -signal.SIGKILL):
                    raise BenchError(f"exit code {code}:\n{self.log.read_text(encoding='utf-8')[-3000:]}")
                self.kills += code != 0
                del alive[pid]
            time.sleep(0.0005)
        self.half_written += len(self.partials())
        self.check()

    def _moment(self) -> Callable[[], bool]:
        """Tell if it is time to kill: some time after the start, or once something is half-written after that."""
        at = time.monotonic() + self.random.uniform(0, self.seconds)
        wait_for_partial, reached = self.random.random() < 0.5, [False]

        def is_time() -> bool:
            if not reached[0] and time.monotonic() >= at:
                reached[0] = not wait_for_partial or bool(self.partials())
            return reached[0]

        return is_time

    def partials(self) -> list[Path]:
        return [*self.dump.glob("*.partial"), *(self.dump / "shards").glob("*.partial")]

    def check(self) -> None:
        """Check that what exists is whole, and that what existed before is unchanged."""
        now: dict[str, Stamp] = {}
        for path in sorted((self.dump / "shards").glob("*.parquet")):
            check_seal(path)
            stat = path.stat()
            now[path.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for name, stamp in self.before.items():
            if now.get(name) != stamp:
                raise BenchError(f"{name} was complete and has been lost or made again: {stamp}, now {now.get(name)}")
        self.before = now
        manifest = self.dump / "manifest.json"
        if manifest.exists() and len(now) == len(Manifest.load(self.dump).shards):
            self.finish()

    def finish(self) -> None:
        """Complete the dump, compare it with the undisturbed one, and throw it away."""
        self._must(in_child(lambda: dump_command(self.recipe), self.log))
        self._must(in_child(self._compare, self.log))
        shutil.rmtree(self.dump)
        self.before = {}
        self.completed += 1

    def _compare(self) -> int:
        faults = verify_dump(self.dump)
        left = [str(path) for path in self.partials()]
        theirs = self.whole.parent / "dump"
        names = [path.name for path in sorted((theirs / "shards").glob("*.parquet"))]
        others = [
            name
            for name in names
            if not pq.read_table(self.dump / "shards" / name).equals(pq.read_table(theirs / "shards" / name))
        ]
        audits = [json.loads((d / "audit.json").read_text(encoding="utf-8")) for d in (self.dump, theirs)]
        same_audit = audits[0] == audits[1]
        print(faults, left, others, same_audit)
        return int(bool(faults or left or others) or not same_audit)

    def interrupt(self, number: signal.Signals) -> None:
        """Send SIGINT or SIGTERM midway and check what is left and the exit code.

        Nothing half-written may remain, and the exit code is a shell's for the signal.
        """
        pid = in_child(lambda: dump_command(self.recipe), self.log)
        num_before = len(list((self.dump / "shards").glob("*.parquet")))
        while len(list((self.dump / "shards").glob("*.parquet"))) < num_before + 3:
            time.sleep(0.001)
        os.kill(pid, number)
        code = exit_code(pid)
        said = self.log.read_text(encoding="utf-8")[-300:]
        if code != 128 + number or self.partials() or "same command again to resume" not in said:
            raise BenchError(f"{number.name}: exit code {code}, left {self.partials()}, said {said!r}")
        self.check()


def flip(dump: Path, number: int, chance: random.Random) -> list[str]:
    """Return the names of damaged shards that `verify` did not find, out of `number`.

    Damage is a single flipped bit; in one case of ten a truncation instead.
    """
    manifest = Manifest.load(dump)
    missed = []
    for index in range(number):
        shard = chance.choice(manifest.shards)
        path = shard.path(dump)
        good = path.read_bytes()
        spoiled = bytearray(good)
        # Half anywhere, half in the last 4 KiB: footers are small, and where checksums of pages do not reach.
        first = 0 if index % 2 else max(0, len(good) - 4096)
        at = chance.randrange(first, len(good))
        if index % 10 == 9:
            del spoiled[at:]
        else:
            spoiled[at] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(spoiled))
        if not verify_shard(path, shard, manifest):
            missed.append(f"{path.name}, byte {at}")
        path.write_bytes(good)
    return missed


def main(
    kills: Annotated[int, typer.Option(help="Kills that must hit a running worker.")] = 50,
    flips: Annotated[int, typer.Option(help="Bits flipped, or truncations.")] = 1000,
    interrupts: Annotated[int, typer.Option(help="SIGINT and SIGTERM, in turn.")] = 4,
    workers: Annotated[int, typer.Option(help="Processes on the dump at once.")] = 2,
    documents: Annotated[int, typer.Option(help="Short texts in the dump; about five make a shard.")] = 160,
    seed: Annotated[int, typer.Option(help="Of moments and bits.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        killing = Killing(Path(folder), seed, documents)
        num_shards = len(Manifest.load(killing.whole.parent / "dump").shards)
        print(f"{num_shards} shards, {killing.seconds:.1f} s undisturbed", flush=True)
        for index in range(interrupts):
            killing.interrupt((signal.SIGINT, signal.SIGTERM)[index % 2])
        print(f"{interrupts} interrupts: exit codes 130 and 143, nothing half written", flush=True)
        while killing.kills < kills:
            killing.round(workers)
            print(f"{killing.kills}/{kills} kills, {len(killing.before)} shards complete", flush=True)
        killing.finish()
        print(
            f"{killing.kills} kills, {workers} workers at once: "
            f"{killing.half_written} files half-written at a kill, none kept; "
            f"{killing.completed} dumps completed, all with the undisturbed dump's content and audit"
        )
        whole = killing.whole.parent / "dump"
        (whole / "summary.json").unlink()
        missed = flip(whole, flips, killing.random)
        print(f"{flips} flipped bits or truncations without a summary: {flips - len(missed)} found; missed: {missed}")
        if missed:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
