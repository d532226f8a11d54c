"""Cost of planning a dump, of finding a late shard's documents, of keys, and of the manifest of many shards.

    .venv/bin/python -m tests.bench.planning [--mb 200] [--keys 10000000] [--shards 1000000] [--made 10000]

Times are CPU seconds of this process; the corpus is random words in documents of 50 to 800 of them. What is put
together has been read by other processes, as a large corpus is; a shard of 1 MiB near the end is found and read. A part
is left out if its figure is 0.
"""

import gzip
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import zstandard

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus, Found
from pipeline.corpus.key_set import KeySet
from pipeline.corpus.parallel import found_in_parallel
from schemas import dump_files, manifest
from schemas.manifest import Manifest, ShardPlan, write_json
from stage1_teacher.dump import audit, input_files
from stage1_teacher.dump.job import read_shards
from stage1_teacher.dump.places import PlaceNotes, Places
from stage1_teacher.dump.shard_plan import plan_shards
from tests.bench.shard_speed import memory

SHARD_BYTES = 1 << 20
Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    started = time.process_time()
    return run(), time.process_time() - started


def write_texts(folder: Path, megabytes: int) -> list[Path]:
    """Write the corpus in each kind of file."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(5000)]
    texts, size = list[str](), 0
    while size < megabytes * 1_000_000:
        texts.append(" ".join(rng.choices(words, k=rng.randrange(50, 800))))
        size += len(texts[-1])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "c.jsonl").write_bytes(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=10_000)
    return sorted(folder.iterdir())


def plan(corpus: Corpus, found: Iterable[Found]) -> tuple[list[ShardPlan], Places]:
    notes, shards = PlaceNotes(), list[ShardPlan]()
    for shard in plan_shards(audit.Sample(16).passing(notes.passing(corpus.placed(found))), SHARD_BYTES):
        shards.append(shard)
        notes.close(shard)
    return shards, notes.places()


def print_planning(folder: Path, megabytes: int) -> None:
    print(f"{'corpus':<22}{'planned, MB/s':>14}{'put together, MB/s':>26}{'late shard read, s':>28}")
    for path in write_texts(folder, megabytes):
        for unique in (False, True):
            corpus = Corpus(CorpusConfig(source=str(path), unique=unique))
            (shards, places), seconds = timed(lambda: plan(corpus, corpus.found()))  # noqa: B023
            _, late = timed(lambda: next(read_shards([shards[-2]], corpus.reader(), places)))  # noqa: B023
            (again, _), own = timed(lambda: plan(corpus, found_in_parallel(corpus)))  # noqa: B023
            assert again == shards
            size = sum(shard.num_bytes for shard in shards) / 1e6
            name = path.name + (", unique" if unique else "")
            print(f"{name:<22}{size / seconds:>14.0f}{size / own:>26.0f}{late:>28.3f}", flush=True)


def print_keys(number: int) -> None:
    """Add that many keys, asking for each before, to the set on disk and to one of Python's."""
    for kind in (KeySet, set):
        before, keys = memory("RssAnon"), kind()

        def add(keys: KeySet | set[bytes] = keys) -> None:
            for index in range(number):
                own = {hashlib.blake2b(b"%d" % index, digest_size=16).digest()}
                if keys.isdisjoint(own):
                    keys.update(own)

        _, seconds = timed(add)
        held = (memory("RssAnon") - before) * 2**20 / number
        print(f"{kind.__name__}: {seconds / number * 1e6:.2f} us and {held:.1f} bytes of memory a key", flush=True)
        del keys, add


def planned(number: int) -> Manifest:
    shards = (
        ShardPlan(
            index=index,
            first_document=index * 8000,
            num_documents=8000,
            num_bytes=16_700_000 + index % 1000,
            sha256=hashlib.sha256(b"%d" % index).hexdigest(),
            folder=dump_files.part_folder(index),
        )
        for index in range(number)
    )
    return Manifest(identity={"corpus": {"sha256": ""}}, corpus_counts={}, shards=tuple(shards))


def print_manifest(dump: Path, number: int) -> None:
    _, saved = timed(lambda: planned(number).save(dump))
    size = sum(path.stat().st_size for path in dump.iterdir())
    manifest._last_plan.clear()
    before = memory("RssAnon")
    loaded, seconds = timed(lambda: Manifest.load(dump))
    print(
        f"{len(loaded.shards):,} shards: {size / 1e6:.1f} MB, saved in {saved:.1f} s, loaded in {seconds:.1f} s, "
        f"{memory('VmRSS') - before:.0f} MiB held",
        flush=True,
    )


def print_complete(dump: Path, number: int) -> None:
    """Make a dump of that many empty shards, and ask whether it is complete."""
    planned(number).save(dump)
    loaded = Manifest.load(dump)
    for shard in loaded.shards:
        path = shard.path(dump)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
    shards = [{"name": shard.path(dump).name, "bytes": 10, "sha256": "0" * 64} for shard in loaded.shards]
    write_json(dump / dump_files.SUMMARY, {"shards": shards})
    manifest._last_plan.clear()

    def ask() -> bool:
        return input_files.is_summed_up(dump, Manifest.load(dump)) and input_files.are_as_noted(dump)

    found, seconds = timed(ask)
    assert found
    _, again = timed(lambda: input_files._shards_sha256(dump))
    print(f"{number:,} complete shards: found to be so in {seconds:.2f} s, and to be unchanged in {again:.2f} s")


def main(mb: int = 200, keys: int = 10_000_000, shards: int = 1_000_000, made: int = 10_000) -> None:
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / kind for kind in ("texts", "many", "made")]
        for folder in folders:
            folder.mkdir()
        if mb:
            print_planning(folders[0], mb)
        if keys:
            print_keys(keys)
        if shards:
            print_manifest(folders[1], shards)
        if made:
            print_complete(folders[2], made)


if __name__ == "__main__":
    typer.run(main)
