"""What the training loop asks of the garbage collector."""

import gc
import weakref

import pytest

from stage2_student.training.loop import start_frozen


class Node:
    """An object that refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_frees_what_training_makes_and_lets_what_was_there_be() -> None:
    before = Node()
    left = weakref.ref(before)
    with pytest.raises(RuntimeError, match="a step failed"), start_frozen():
        assert gc.get_freeze_count()
        made = weakref.ref(Node())
        del before
        gc.collect()
        assert made() is None and left() is not None
        raise RuntimeError("a step failed")
    assert not gc.get_freeze_count()
    gc.collect()
    assert left() is None
