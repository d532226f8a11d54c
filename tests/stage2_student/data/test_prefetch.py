"""Items made before they are needed."""

import os
import signal
import threading
import traceback
from collections.abc import Iterator

import pytest

from stage2_student.data.prefetch import prefetched


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def failing_at(index: int) -> Iterator[int]:
    yield from range(index)
    raise ValueError("no shard here")


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_same_items_come_in_the_same_order(ahead: int) -> None:
    with prefetched(iter(range(50)), ahead) as items:
        assert list(items) == list(range(50))
    assert threads() == 0


def test_no_more_items_are_made_than_asked_for() -> None:
    made, third = [], threading.Event()

    def watched() -> Iterator[int]:
        for index in range(100):
            made.append(index)
            if index == 2:
                third.set()
            yield index

    with prefetched(watched(), 2) as items:
        assert next(items) == 0
        assert third.wait(10)
        # The thread cannot begin a fourth: there is room for two, and both are made or in progress.
        assert made == [0, 1, 2]
    assert made == [0, 1, 2] and threads() == 0


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_exception_comes_where_its_item_would_have_with_its_own_traceback(ahead: int) -> None:
    with prefetched(failing_at(3), ahead) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="no shard here") as caught:
            next(items)
    assert "failing_at" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == 0


def test_an_exception_in_the_user_ends_the_thread() -> None:
    with pytest.raises(ZeroDivisionError), prefetched(iter(range(100)), 2) as items:
        next(items)
        1 / 0  # noqa: B018
    assert threads() == 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, even if the process was started with SIGINT ignored.

    A shell starts background processes so.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_reaches_the_thread_that_waits() -> None:
    slow = threading.Event()

    def never() -> Iterator[int]:
        slow.wait()
        yield 0

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        slow.set()

    timer = threading.Timer(0.05, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt), prefetched(never(), 1) as items:
        next(items)
        slow.wait()  # where the item came before the signal was handled
        signal.pause()
    timer.join()
    assert threads() == 0
