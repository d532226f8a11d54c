"""What a version of the format costs: stored bytes by column, and CPU time of writing, reading and looking up.

    make bench BENCH=format_versions ARGS="--dump runs/demo/dump"

The records of a dump are written again in each version, without alternatives of tokens (where version 2 is version 1)
and, if the dump has them, with; all are read back and compared to the bit. Times are the CPU's, all threads, each
version's in turns with the others', as medians of the rounds' ratios to the first version. Longer documents are four of
the dump's in one. The large shard repeats the dump's records under other names; its size would tell of the repetitions.
"""

import json
import statistics
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from pipeline.dumps.view import complete_shards
from schemas import shard
from schemas.columns import BY_NAME, COLUMNS
from schemas.dump_files import Key
from schemas.record import Record
from schemas.shard import commit_shard, read_rows, read_shard, to_table, window_names
from tests.bench import pages, results
from tests.bench.shard_speed import train_arrays
from tests.schemas.test_stored_entries import in_order

VERSIONS = (1, 3)
WITH_TOKENS = (2, 3)
LEVEL = 15
Timed = Callable[[], object]


def in_turns(runs: Mapping[str, Timed], rounds: int) -> dict[str, tuple[float, float]]:
    """Return for each run its least CPU seconds, and the median of its ratios to the first run of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name] += [time.process_time() - started] if number else []
    first = next(iter(seconds.values()))
    return {
        name: (min(of_run), statistics.median(a / b for a, b in zip(of_run, first, strict=True)))
        for name, of_run in seconds.items()
    }


def is_equal(ours: Record, theirs: Record) -> bool:
    """Compare to the bit: versions differ in the order of a position's entries, which `in_order` takes away."""
    ours, theirs = in_order(ours), in_order(theirs)
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in vars(theirs) if name != "tokens"]
    if theirs.tokens is not None:
        pairs += [(getattr(ours.tokens, name), value) for name, value in vars(theirs.tokens).items()]
    return all(a.tobytes() == b.tobytes() if isinstance(b, np.ndarray) else a == b for a, b in pairs)


def written(records: Sequence[Record], version: int, metadata: Mapping[bytes, bytes], path: Path) -> Path:
    """Write a shard with the metadata of a dump's own, and the columns of tokens that its records have."""
    identity = json.loads(metadata[Key.IDENTITY.encode()])
    if records[0].tokens is None:
        identity.pop("tokens", None)
    table = to_table(records, identity, version)
    commit_shard(table.replace_schema_metadata({**metadata, **table.schema.metadata}), path, LEVEL)
    return path


def sizes_of(path: Path) -> Counter[str]:
    """Return the bytes of each column, of the footer, and of all of a file."""
    data, footer = path.read_bytes(), pq.read_metadata(path)
    sizes = Counter({"footer": struct.unpack("<I", data[-8:-4])[0], "all": len(data)})
    for group in range(footer.num_row_groups):
        for index in range(footer.num_columns):
            column = footer.row_group(group).column(index)
            sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return sizes


def size_rows(dump: Path, folder: Path) -> tuple[list[dict[str, Any]], list[Record], int]:
    """Return the rows of sizes by column, and the records and their bytes of text."""
    totals: dict[int, Counter[str]] = {version: Counter() for version in VERSIONS}
    records: list[Record] = []
    for path in complete_shards(dump):
        stored = [replace(record, tokens=None) for record in read_shard(path)]
        metadata = pq.read_schema(path).metadata
        for version in VERSIONS:
            again = written(stored, version, metadata, folder / f"{version}.parquet")
            assert all(map(is_equal, read_shard(again), stored)), f"{path} is not the same in version {version}"
            totals[version] += sizes_of(again)
        records += stored
    num_bytes = sum(len(record.document) for record in records)
    names = ["all", *dict.fromkeys(c.name for c in COLUMNS if any(totals[v][c.name] for v in VERSIONS)), "footer"]
    rows = [
        {
            "stored bytes per text byte": name if name in ("all", "footer") else f"`{name}`",
            **{
                f"version {version}": round(totals[version][name] / num_bytes, 3) if totals[version][name] else None
                for version in VERSIONS
            },
        }
        for name in names
    ]
    return rows, records, num_bytes


def token_rows(dump: Path, folder: Path) -> list[dict[str, Any]]:
    """Return a row with the sizes of a dump's shards with alternatives of tokens; none if it has none."""
    totals: Counter[int] = Counter()
    num_bytes = 0
    for path in complete_shards(dump):
        stored = list(read_shard(path))
        if any(record.tokens is None for record in stored):
            return []
        num_bytes += sum(len(record.document) for record in stored)
        for version in WITH_TOKENS:
            again = written(stored, version, pq.read_schema(path).metadata, folder / f"{version}.parquet")
            assert all(map(is_equal, read_shard(again), stored)), f"{path} is not the same in version {version}"
            totals[version] += again.stat().st_size
    sizes = {f"version {version}": round(totals[version] / num_bytes, 3) for version in WITH_TOKENS}
    return [{"stored bytes per text byte": "with `dump.tokens`", **sizes}]


def list_array(values: np.ndarray, sizes: Sequence[int], kind: pa.DataType) -> pa.Array:
    offsets = pa.array(np.cumsum([0, *sizes]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values, type=kind))


def column_size(array: pa.Array, how: str, level: int = LEVEL) -> int:
    """Return the stored bytes of one column by itself: `dictionary`, `byte-stream-split`, `differences`, `plain`."""
    leaf = "c.list.element" if pa.types.is_list(array.type) else "c"
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"c": array}),
        sink,
        compression="zstd",
        compression_level=level,
        use_dictionary=[leaf] if how == "dictionary" else False,
        use_byte_stream_split=[leaf] if how == "byte-stream-split" else False,
        column_encoding={leaf: "DELTA_BINARY_PACKED"} if how == "differences" else None,
        write_statistics=False,
    )
    footer = pq.read_metadata(pa.BufferReader(sink.getvalue()))
    return sum(footer.row_group(group).column(0).total_compressed_size for group in range(footer.num_row_groups))


def tried_rows(shards: Sequence[Sequence[Record]], num_bytes: int) -> list[dict[str, Any]]:
    """Return the rows of ways to store entries, measures and lengths, each in a shard of its own as they are."""
    ways = ("dictionary", "byte-stream-split", "differences", "plain")
    sums: dict[str, Counter[str]] = {}
    for records in shards:
        for name, array in variants(records):
            for way in ways:
                if way != "differences" or pa.types.is_integer(array.type.value_type):
                    sums.setdefault(name, Counter())[way] += column_size(array, way)
            sums[name]["dictionary, zstd 19"] += column_size(array, "dictionary", 19)
    return [
        {
            "bytes per text byte": name,
            **{
                way: round(of_name[way] / num_bytes, 3) if of_name[way] else None
                for way in (*ways, "dictionary, zstd 19")
            },
        }
        for name, of_name in sums.items()
    ]


def variants(records: Sequence[Record]) -> list[tuple[str, pa.Array]]:
    """Return ways to hold the columns of a shard."""
    positions = [record.num_positions for record in records]
    counts = np.concatenate([record.entry_counts for record in records])
    symbols = np.concatenate([record.symbols for record in records])
    logprobs = np.concatenate([record.logprobs for record in records])
    position = np.repeat(np.arange(len(counts)), counts)
    is_realised = symbols == np.concatenate([record.realised() for record in records])[position]
    falling = np.flatnonzero(~is_realised)
    rising = falling[np.lexsort((symbols[falling], position[falling]))]
    all_rising = np.lexsort((symbols, position))
    entries = [len(record.symbols) for record in records]
    others = [of_record - of_text for of_record, of_text in zip(entries, positions, strict=True)]
    codes = np.searchsorted(np.unique(logprobs), logprobs)
    floats, small = pa.float32(), pa.uint8()
    found = [
        ("symbols of all entries, by probability", list_array(symbols, entries, small)),
        ("the same, ascending", list_array(symbols[all_rising], entries, small)),
        ("of the others, by probability", list_array(symbols[falling], others, small)),
        ("of the others, ascending", list_array(symbols[rising], others, small)),
        ("log-probabilities of all entries, by probability", list_array(logprobs, entries, floats)),
        ("the same, by symbol", list_array(logprobs[all_rising], entries, floats)),
        ("of the documents' symbols", list_array(logprobs[is_realised], positions, floats)),
        ("of the others, by probability", list_array(logprobs[falling], others, floats)),
        ("of the others, by symbol", list_array(logprobs[rising], others, floats)),
        ("of the others, by symbol, as numbers of levels", list_array(codes[rising], others, small)),
        ("counts of entries, 16 bits", list_array(counts, positions, pa.uint16())),
        ("counts of others, 8 bits", list_array(counts - 1, positions, small)),
    ]
    for name in ("dropped", "doubt", "teacher_token_lengths", "teacher_token_logprobs"):
        values = [getattr(record, name) for record in records]
        found.append((f"`{name}`", list_array(np.concatenate(values), list(map(len, values)), BY_NAME[name].kind)))
    return [(f"{number}. {name}", array) for number, (name, array) in enumerate(found, 1)]


@contextmanager
def groups_of(kib: int) -> Iterator[None]:
    """Have shards written with row groups of so much text."""
    before, shard.GROUP_BYTES = shard.GROUP_BYTES, kib << 10
    yield
    shard.GROUP_BYTES = before


def group_rows(
    records: Sequence[Record], metadata: Mapping[bytes, bytes], num_bytes: int, folder: Path
) -> list[dict[str, Any]]:
    """Return the rows of the sizes of one shard of all records, by size of row groups."""
    rows = []
    for kib in (32, 64, 128, 1024):
        with groups_of(kib):
            size = written(records, 3, metadata, folder / "groups.parquet").stat().st_size
        groups = pq.read_metadata(folder / "groups.parquet").num_row_groups
        rows.append(
            {"all in one shard": f"{groups} row groups", "stored bytes per text byte": round(size / num_bytes, 3)}
        )
    return rows


def large_rows(
    records: Sequence[Record], metadata: Mapping[bytes, bytes], text_bytes: int, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Return the rows of a large shard: what one document of it costs to read, by size of row groups."""
    mean = sum(len(record.document) for record in records) / len(records)
    many = [
        replace(record, doc_id=str(number))
        for number, record in enumerate(islice(cycle(records), int(text_bytes / mean)))
    ]
    sought = len(many) * 2 // 3
    files = {"version 1": written(many, 1, metadata, folder / "1.parquet")}
    for kib in (256, 1024, 4096):
        with groups_of(kib):
            files[f"version 3, groups of {kib} KiB"] = written(many, 3, metadata, folder / f"{kib}.parquet")

    def by_row(path: Path) -> Record:
        return next(read_rows(path, [sought]))

    def by_id(path: Path) -> Record:
        return next(read_rows(path, [[name for name, _ in window_names(path)].index(str(sought))]))

    def by_filter(path: Path) -> pa.Table:
        return pq.read_table(path, filters=[("doc_id", "=", str(sought))])

    for path in files.values():
        assert is_equal(by_row(path), many[sought]) and is_equal(by_id(path), many[sought])
    kinds: dict[str, Callable[[Path], object]] = {
        "by row, CPU ms": by_row,
        "by id, CPU ms": by_id,
        "pyarrow's filter by id, CPU ms": by_filter,
    }
    rows: dict[str, dict[str, Any]] = {name: {"one large shard": name} for name in files}
    for kind, read in kinds.items():
        runs = {name: (lambda path=path, read=read: read(path)) for name, path in files.items()}  # type: ignore[misc]
        for name, (least, _) in in_turns(runs, rounds).items():
            rows[name][kind] = round(least * 1e3, 1)
    return list(rows.values())


def speed_rows(
    records: Sequence[Record], metadata: Mapping[bytes, bytes], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Return the rows of CPU times beside version 1's, of documents as they are and of longer ones."""
    rows = []
    for name, of_kind in (("the demo's documents", records), ("four in one", merged_documents(records, 4))):
        files = {version: written(of_kind, version, metadata, folder / f"{version}.parquet") for version in VERSIONS}
        num_positions = sum(record.num_positions for record in of_kind)
        num_rows = len(of_kind)
        kinds: dict[str, Callable[[int], Timed]] = {
            "a file to records, each checked": lambda version, files=files, num_rows=num_rows: (
                lambda: sum(1 for _ in read_rows(files[version], range(num_rows), small_buffers=True))
            ),
            "a file to padded training arrays": lambda version, files=files: lambda: train_arrays(files[version]),
            "records to a file": lambda version, of_kind=of_kind: (
                lambda: written(of_kind, version, metadata, folder / "again.parquet")
            ),
        }
        for kind, run in kinds.items():
            found = in_turns({str(version): run(version) for version in VERSIONS}, rounds)
            least = {version: of_version[0] for version, of_version in found.items()}
            rows.append(
                {
                    "all threads": f"{name}: {kind}",
                    **{
                        f"version {version}, million positions a CPU second": round(num_positions / seconds / 1e6, 2)
                        for version, seconds in least.items()
                    },
                    "CPU time of version 3 beside 1": round(found["3"][1], 3),
                }
            )
    return rows


def merged_documents(records: Sequence[Record], count: int) -> list[Record]:
    """Make longer documents, of so many each."""
    arrays = [
        column.name for column in BY_NAME.values() if isinstance(getattr(records[0], column.name, None), np.ndarray)
    ]
    merged = []
    for first in range(0, len(records) - count + 1, count):
        parts = records[first : first + count]
        starts = np.cumsum([0, *(len(part.document) for part in parts)]).tolist()
        segments = [
            replace(segment, start=start + segment.start)
            for start, part in zip(starts, parts, strict=False)
            for segment in part.segments
        ]
        merged.append(
            replace(
                parts[0],
                document=b"".join(part.document for part in parts),
                segments=tuple(segments),
                **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
            )
        )
    return merged


def main(
    dump: Annotated[Path, typer.Option(help="A dump, of any version.")] = Path("runs/demo/dump"),
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    large: Annotated[int, typer.Option(help="MiB of text of the large shard.")] = 14,
    save: Annotated[str | None, typer.Option(help="Name of the file of figures.")] = None,
) -> None:
    """Print tables of a dump's columns, of other ways to store them, of a large shard, and of CPU times."""
    first = complete_shards(dump)[0]
    metadata = pq.read_schema(first).metadata
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes, records, num_bytes = size_rows(dump, folder)
        shards = [[replace(r, tokens=None) for r in read_shard(path)] for path in complete_shards(dump)]
        found = {
            "rows": sizes,
            "tokens": token_rows(dump, folder),
            "tried": tried_rows(shards, num_bytes),
            "speed": speed_rows(records, metadata, rounds, folder),
            "groups": group_rows(records, metadata, num_bytes, folder),
            "large": large_rows(records, metadata, large << 20, rounds, folder),
        }
    for rows in filter(None, found.values()):
        print(pages.table(rows, pages.headings(rows)), "\n")
    if save is not None:
        results.save(save, found, documents=f"{len(records)} records, {num_bytes:,} bytes, {len(shards)} shards")


if __name__ == "__main__":
    typer.run(main)
