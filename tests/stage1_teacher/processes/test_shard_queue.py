"""The shard queue: no shard is forgotten or counted twice, and none waits for an engine that hangs."""

import random
from collections.abc import Iterator

import pytest

from pipeline.corpus.documents import Document
from schemas.manifest import ShardPlan
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_work import ShardProgress
from stage1_teacher.processes.shard_queue import Attempt, Attempts, ShardQueue


def shards(count: int) -> Iterator[tuple[ShardPlan, list[Document]]]:
    for index in range(count):
        yield ShardPlan(index=index, first_document=index, num_documents=1, num_bytes=10, sha256=""), []


def queue(count: int, attempts: int = 3) -> ShardQueue:
    return ShardQueue(shards(count), lambda documents: documents, attempts)


def last(index: int) -> ShardProgress:
    return ShardProgress(1, 10, 5, stored_bytes=100, committed=index, audited=1)


def test_any_order_of_finishes_losses_and_hangs_makes_each_shard_once_and_counts_it_once() -> None:
    for seed in range(50):
        chance = random.Random(seed)
        out, running, told = queue(7, attempts=100), [], []
        while not out.is_done:
            while len(running) < 3 and (run := out.next()):
                running.append(run)
            run = chance.choice(running)
            fate = chance.random()
            if fate < 0.2:
                running.remove(run)
                out.fail(run, "gone")
            elif fate < 0.6:
                told.append(out.advance(run, ShardProgress(0, 4, 2)) if run.done.text_bytes < 4 else None)
            else:
                running.remove(run)
                told.append(
                    out.advance(run, ShardProgress(1, 10 - run.done.text_bytes, 5, 100, run.shard.plan.index, 1))
                )
        made = [t for t in told if t is not None]
        assert sorted(t.committed for t in made if t.committed is not None) == list(range(7))
        assert [sum(t[field] for t in made) for field in (0, 1, 3)] == [7, 70, 700]


def test_a_lost_shard_is_the_next_one_and_an_idle_engine_takes_the_oldest_that_another_is_at() -> None:
    out = queue(3)
    first, second = out.next(), out.next()
    assert isinstance(first, Attempt) and isinstance(second, Attempt)
    out.fail(first, "gone")
    again, third = out.next(), out.next()
    assert again is not None and third is not None
    assert (again.shard.plan.index, third.shard.plan.index) == (0, 2)
    copies = [out.next() for _ in range(4)]
    assert [copy.shard.plan.index if copy else None for copy in copies] == [0, 1, 2, None]
    assert out.advance(copies[1], last(1)) is not None  # type: ignore[arg-type]
    assert out.advance(second, last(1)) is None and not out.is_done


def test_an_engine_that_is_at_work_gets_lost_and_new_shards_and_no_copies() -> None:
    out = queue(2)
    first, second = out.next(is_idle=False), out.next(is_idle=False)
    assert first is not None and second is not None
    assert out.next(is_idle=False) is None and not out.is_done
    out.fail(first, "gone")
    again = out.next(is_idle=False)
    assert again is not None and again.shard is first.shard and out.next(is_idle=False) is None
    assert out.next() is not None


def test_a_shard_that_costs_engine_after_engine_ends_the_dump_with_the_cause() -> None:
    out = queue(1, attempts=2)
    out.fail(out.next(), "killed")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"shard 0 failed on 2 engines .*last error: out of memory"):
        out.fail(out.next(), "out of memory")  # type: ignore[arg-type]


def test_batches_and_commits_belong_to_their_shards_however_late_a_shard_is_written() -> None:
    """Writers of their own commit a shard while the engine is at the next ones."""
    plans = [
        ShardPlan(index=index, first_document=0, num_documents=count, num_bytes=1, sha256="")
        for index, count in enumerate((2, 1, 3))
    ]
    out = ShardQueue(iter([(plan, []) for plan in plans]), lambda documents: documents, 3)
    attempts = Attempts()
    for _ in plans:
        given = out.next(is_idle=False)
        assert given is not None
        attempts.add(given)
    reports = [
        (ShardProgress(1, 5, 5), 0),
        (ShardProgress(1, 5, 5), 0),
        (ShardProgress(1, 7, 7), 1),
        (ShardProgress(2, 9, 9), 2),
        (ShardProgress(0, 0, 0, committed=0, stored_bytes=10), 0),
        (ShardProgress(1, 9, 9), 2),
        (ShardProgress(0, 0, 0, committed=1, stored_bytes=10), 1),
        (ShardProgress(0, 0, 0, committed=2, stored_bytes=10), 2),
    ]
    told = []
    for progress, index in reports:
        attempt = attempts.of(progress)
        assert attempt.shard.plan.index == index, progress
        told.append(out.advance(attempt, progress))
    assert [one.documents for one in told if one is not None] == [1, 1, 1, 2, 0, 1, 0, 0]
    assert not attempts and out.next() is None and out.is_done
