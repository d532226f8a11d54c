"""Items made ahead of their use, in a thread beside the one that uses them.

A thread is enough: tokenizers, Arrow, NumPy's large operations and torch's all let other threads run. It changes
neither what comes nor in which order; what is made but never taken is lost, so a position that is to be resumed from
comes with the item itself.
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
    error: BaseException  # StopIteration where the items have come to their end


@contextmanager
def prefetched(items: Iterator[Item], ahead: int) -> Iterator[Iterator[Item]]:
    """The same items, up to `ahead` of them made before they are asked for; with 0 there is no thread.

    An exception in making one is raised, with its own traceback, where that item would have come. On leaving, however
    that is, the thread finishes the item that it is at, and has ended.
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
        except (
            BaseException
        ) as error:  # every way out is told: one that the other thread waits on must not die in silence
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
        found = made.get()
        if isinstance(found, _Ended):
            if isinstance(found.error, StopIteration):
                return
            raise found.error
        room.release()
        yield found.item
