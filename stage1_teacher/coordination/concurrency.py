"""Threads: one that works on what this one has just made (the engine runs the next batch while the last one is reduced and
written), and several that wait for a store."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


_STORE_REQUESTS = 16  # at once; each takes as long as some megabytes, and a dump has thousands of shards


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work(item)` of each, several at once where they wait for a store. What one raises is raised here."""
    with ThreadPoolExecutor(_STORE_REQUESTS, "in-threads") as executor:
        return list(executor.map(work, items))


def one_ahead(items: Iterable[Item], work: Callable[[Item], Result], concurrent: bool) -> Iterator[Result]:
    """Yield `work(item)` of each item, in order.

    Args:
        concurrent: `work` runs in one other thread, on one item at a time, while this thread makes the next item and uses the
            result before. At most two items exist at once. What `work` raises is raised here, after the item that was being
            made; nothing is worked on after it. Without, everything happens in this thread, in turn.
    """
    if not concurrent:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(1, "one-ahead") as executor:
        running: deque[Future[Result]] = deque()  # one, but before the first item
        for item in items:
            results = [future.result() for future in running]
            running.clear()
            running.append(executor.submit(work, item))
            del item  # or it would live on while the next one is made
            yield from results
        for future in running:
            yield future.result()
