"""A pass over a corpus by several processes, for what planning needs: the same documents, in the same order.

The corpus is cut into parts: ranges of bytes of a file of lines, groups of rows of a Parquet file, any other file as a
whole. As an id may be the row's number in the corpus, the rows of each part are counted before it is read.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Set
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import CorpusConfig
from pipeline.corpus.digest import DigestedDocument, document_digest
from pipeline.corpus.documents import Corpus, Found
from pipeline.corpus.parts import Part, count, parts
from pipeline.corpus.row import Goal, RowPlace
from pipeline.corpus.rows import RowSource

MIN_BYTES = 1 << 30  # of the corpus's files: below, processes take longer to start than they save
_PART_BYTES = 16 << 20
_MAX_PROCESSES = 16  # one more process puts the parts together, and keeps up with no more


class _Task(NamedTuple):
    """Rows of a part that are to be read."""

    start: RowPlace
    num_rows: int


_Digested = tuple[int, int, str, str, int, bytes, Set[bytes]]  # row, byte, where, id, size, digest, keys
_Fault = tuple[int, int, str, str]  # row, byte, where, and what a row without a document gives instead


def is_large(source: RowSource) -> bool:
    """Return whether several processes read a corpus faster than one; False if it is not all here."""
    if source.hub is not None or any("://" in name for name in source.files) or _num_cores() < 2:
        return False
    return sum(Path(name).stat().st_size for name in source.files) >= MIN_BYTES


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def found_in_parallel(corpus: Corpus) -> Iterator[Found]:
    """Yield what `Corpus.found` does, with `DigestedDocument`s. Raises OSError if a process ends without a word."""
    processes = min(_num_cores(), _MAX_PROCESSES)
    executor = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_begin, initargs=(corpus.config, corpus.source)
    )
    try:
        for task, rows in _in_order(executor, corpus.source, 3 * processes):
            yield from _found(task, rows)
    except BrokenProcessPool as error:
        raise OSError(
            f"{corpus.config.source}: a process that reads it ended without a word, usually for lack of memory. Run "
            "the same command again"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _in_order(
    executor: ProcessPoolExecutor, source: RowSource, ahead: int
) -> Iterator[tuple[_Task, list[_Digested | _Fault]]]:
    """Yield what each part holds, reading so many parts ahead."""
    remaining = parts(source, _PART_BYTES)
    counts: deque[tuple[Part, Future[tuple[int, int]]]] = deque()
    read: deque[tuple[_Task, Future[Any]]] = deque()
    behind = RowPlace(0, 0, 0, 0)  # the last part
    while True:
        more = list(islice(remaining, ahead - len(counts)))
        counts.extend((part, executor.submit(_count, part)) for part in more)
        while counts and len(read) < ahead and (counts[0][1].done() or not read):
            part, counted = counts.popleft()
            if counted.exception():  # raised once all that lies before has been yielded
                read.append((_Task(behind, 0), counted))
                remaining = iter(())
                counts.clear()
                break
            byte, num_rows = counted.result()
            row = behind.row if part.file == behind.file else 0
            task = _Task(RowPlace(part.file, row, byte, behind.number), num_rows)
            behind = RowPlace(part.file, row + num_rows, 0, behind.number + num_rows)
            if num_rows:
                read.append((task, executor.submit(_read, task)))
        if read:
            task, result = read.popleft()
            yield task, result.result()
        elif not more:
            return


def _found(task: _Task, rows: list[_Digested | _Fault]) -> Iterator[Found]:
    file, first, _, number = task.start
    for item in rows:
        place = RowPlace(file, item[0], item[1], number + item[0] - first)
        if len(item) == 4:
            yield place, item[3], frozenset(), item[2]
        else:
            _, _, where, doc_id, size, digest, keys = item
            yield place, DigestedDocument(doc_id, bytes(size), None, digest=digest), keys, where


_corpus: list[Corpus] = []  # of this process, which reads parts of it


def _begin(config: CorpusConfig, source: RowSource) -> None:
    """Prepare a process of the pool, which ends with the one that began it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _corpus.append(Corpus(config, source.arithmetic, source))


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _count(part: Part) -> tuple[int, int]:
    return count(_corpus[0].source, part)


def _read(task: _Task) -> list[_Digested | _Fault]:
    found: list[_Digested | _Fault] = []
    for place, document, keys, where in islice(_corpus[0].found(Goal(task.start)), task.num_rows):
        if isinstance(document, str):
            found.append((place.row, place.byte, where, document))
        else:
            size, digest = len(document.text), document_digest(document)
            found.append((place.row, place.byte, where, document.doc_id, size, digest, keys))
    return found
