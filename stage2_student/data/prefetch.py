"""Items made ahead of their use, in a background thread.

A thread is enough: tokenizers, Arrow, NumPy's large operations and torch's all release the GIL. Prefetching changes
neither the items nor their order. Items made but never taken are lost, so a position to resume from comes with the item
itself.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class _Made(NamedTuple, Generic[Item]):
    item: Item


class _Ended(NamedTuple):
    error: BaseException  # StopIteration at the end of the items


@contextmanager
def prefetched(items: Iterator[Item], ahead: int) -> Iterator[Iterator[Item]]:
    """Yield the same items, with up to `ahead` of them made before they are requested; with 0 there is no thread.

    An exception raised while making an item is raised, with its own traceback, in that item's place. On leaving,
    however that happens, the thread finishes its current item and ends.
    """
    if ahead == 0:
        yield items
        return
    room, stopped = threading.Semaphore(ahead), threading.Event()
    made: SimpleQueue[_Made[Item] | _Ended] = SimpleQueue()

    def work() -> None:
        try:
            while room.acquire() and not stopped.is_set():
                made.put(_Made(next(items)))
        except BaseException as error:  # always reported: the other thread waits for it
            made.put(_Ended(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield _taken(made, room)
    finally:
        stopped.set()
        room.release()
        thread.join()


def _taken(made: "SimpleQueue[_Made[Item] | _Ended]", room: threading.Semaphore) -> Iterator[Item]:
    while True:
        result = made.get()
        if isinstance(result, _Ended):
            if isinstance(result.error, StopIteration):
                return
            raise result.error
        room.release()
        yield result.item
