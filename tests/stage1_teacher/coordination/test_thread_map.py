"""Concurrent calls: results in order, several at once, no exception lost."""

import threading

import pytest

from stage1_teacher.coordination.thread_map import thread_map


def test_calls_run_side_by_side_and_results_keep_the_order_of_the_items() -> None:
    both = threading.Barrier(2, timeout=30)  # broken unless two calls are under way at once

    def work(item: int) -> int:
        both.wait()
        return item * item

    assert thread_map(work, range(8)) == [item * item for item in range(8)]
    assert thread_map(work, []) == []


def test_the_first_item_that_fails_raises_in_the_caller() -> None:
    def work(item: int) -> int:
        if item in (2, 4):
            raise OSError(f"item {item}")
        return item

    with pytest.raises(OSError, match="item 2"):
        thread_map(work, range(6))
