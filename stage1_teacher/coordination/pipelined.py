"""Threads beside an engine's: they encode its next batch, and collect the previous one, while it runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
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


def one_ahead(sources: Iterable[Iterator[Item]], is_last: Callable[[Item], bool], concurrent: bool) -> Iterator[Item]:
    """Yield the items of each source in turn.

    Args:
        sources: each makes at least one item; they are drawn in this thread.
        is_last: whether an item is its source's last: then the next source is drawn, and begun, before it is yielded.
        concurrent: make items in one other thread, the next one while the caller is at the one it was given. An
            exception is raised where its item would have been yielded. If False, everything happens in this thread.
    """
    if not concurrent:
        yield from chain.from_iterable(sources)
        return
    rest = iter(sources)
    with ThreadPoolExecutor(1, "one_ahead") as executor:
        source = next(rest, None)
        making = None if source is None else executor.submit(next, source)
        while making is not None:
            item = making.result()
            if is_last(item):
                source = next(rest, None)
            making = None if source is None else executor.submit(next, source)
            yield item
