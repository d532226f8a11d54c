"""A thread pool for calls that mostly wait for a store."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_NUM_THREADS = 16  # each request takes as long as some megabytes do, and a dump has thousands of shards


def thread_map(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `work(item)` for each item, in order, with several calls at once; raises what the first one raised."""
    with ThreadPoolExecutor(_NUM_THREADS, "thread-map") as executor:
        return list(executor.map(work, items))
