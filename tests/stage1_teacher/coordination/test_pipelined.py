"""Pipelining: faster than in turn, in order, bounded, and no exception lost."""

import threading
import time
from collections.abc import Iterator

import pytest

from stage1_teacher.coordination.pipelined import one_ahead, pipelined

SLEEP = 0.05


def slow_engine(count: int) -> Iterator[int]:
    for item in range(count):
        time.sleep(SLEEP)
        yield item


def slow_reducer(item: int) -> int:
    time.sleep(SLEEP)
    return item * item


def seconds(count: int, concurrent: bool) -> float:
    started = time.monotonic()
    assert list(pipelined(slow_engine(count), slow_reducer, concurrent)) == [item * item for item in range(count)]
    return time.monotonic() - started


def test_a_slow_engine_and_a_slow_reducer_take_less_than_their_sum() -> None:
    in_turn, overlapped = seconds(8, False), seconds(8, True)
    assert in_turn >= 16 * SLEEP
    assert overlapped < 0.8 * in_turn


@pytest.mark.parametrize("concurrent", [False, True])
def test_results_come_in_order_whatever_each_takes(concurrent: bool) -> None:
    def uneven(item: int) -> int:
        time.sleep(0.02 * (item % 3 == 0))
        return item

    assert list(pipelined(range(10), uneven, concurrent)) == list(range(10))
    assert list(pipelined([], uneven, concurrent)) == []


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("failing", [0, 2, 4])
def test_a_failing_reducer_raises_in_the_caller_and_nothing_is_reduced_after_it(concurrent: bool, failing: int) -> None:
    reduced: list[int] = []

    def reducer(item: int) -> int:
        if item == failing:
            raise ZeroDivisionError(f"item {item}")
        reduced.append(item)
        return item

    results: list[int] = []
    with pytest.raises(ZeroDivisionError, match=f"item {failing}"):
        results.extend(pipelined(range(5), reducer, concurrent))
    assert reduced == list(range(failing))
    assert threading.active_count() == threading_before()


def threading_before() -> int:
    """Threads that outlive a test are not ours: pytest's and numba's."""
    return sum(not thread.name.startswith("pipelined") for thread in threading.enumerate())


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_failing_engine_raises_in_the_caller_after_what_it_made_is_reduced(concurrent: bool) -> None:
    reduced: list[int] = []

    def engine() -> Iterator[int]:
        yield from range(3)
        raise OSError("engine died")

    with pytest.raises(OSError, match="engine died"):
        list(pipelined(engine(), reduced.append, concurrent))
    assert reduced == [0, 1, 2]


def test_no_more_than_two_items_exist_at_once() -> None:
    class Item:
        alive = 0
        most = 0

        def __init__(self) -> None:
            Item.alive += 1
            Item.most = max(Item.most, Item.alive)

        def __del__(self) -> None:
            Item.alive -= 1

    def engine() -> Iterator[Item]:
        for _ in range(6):
            time.sleep(0.01)
            yield Item()

    def reducer(item: Item) -> None:
        time.sleep(0.03)

    assert len(list(pipelined(engine(), reducer, True))) == 6
    assert Item.most == 2


@pytest.mark.parametrize("concurrent", [False, True])
def test_items_of_each_source_are_made_in_turn_at_most_one_ahead(concurrent: bool) -> None:
    made: list[tuple[int, int]] = []

    def source(number: int, count: int) -> Iterator[tuple[int, int]]:
        for item in range(count):
            made.append((number, count - item))
            yield made[-1]

    taken = []
    for item in one_ahead((source(*of) for of in enumerate((2, 1, 3))), lambda item: item[1] == 1, concurrent):
        taken.append(item)
        time.sleep(0.01)
        assert len(made) - len(taken) <= concurrent
    assert taken == made == [(0, 2), (0, 1), (1, 1), (2, 3), (2, 2), (2, 1)]
    assert list(one_ahead([], bool, concurrent)) == []


@pytest.mark.parametrize("concurrent", [False, True])
def test_an_item_that_cannot_be_made_raises_after_those_before_it(concurrent: bool) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError("item 3")

    taken: list[int] = []
    with pytest.raises(ZeroDivisionError, match="item 3"):
        taken.extend(one_ahead([source()], lambda item: item == 9, concurrent))
    assert taken == [1, 2]
