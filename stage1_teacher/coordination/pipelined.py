"""A pipeline of two threads: the engine runs the next batch while the previous one is reduced and written."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def pipelined(items: Iterable[Item], work: Callable[[Item], Result], concurrent: bool) -> Iterator[Result]:
    """Yield `work(item)` for each item, in order.

    Args:
        concurrent: run `work` in one other thread, on one item at a time, while this thread produces the next item and
            consumes the previous result. At most two items exist at once. An exception in `work` is raised here, after
            the item that was being produced; no later item is worked on. If False, everything happens in this thread,
            in turn.
    """
    if not concurrent:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(1, "pipelined") as executor:
        running: deque[Future[Result]] = deque()  # one, except before the first item
        for item in items:
            results = [future.result() for future in running]
            running.clear()
            running.append(executor.submit(work, item))
            del item  # or it would stay alive while the next one is produced
            yield from results
        for future in running:
            yield future.result()
