"""Shards written by other processes: the same files, though a process is killed; other failures end the dump."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stage1_teacher.coordination.shard_draft import sums
from stage1_teacher.coordination.shard_writers import Writers, Written
from stage1_teacher.reduction.sparse_targets import SparseTargets
from stage1_teacher.reduction.sparsify import Entries
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.support.fake_draft import FakeDraft


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    opened = Writers(2)
    yield opened
    opened.close()


def write(writers: Writers, number: int, folder: Path, act: str = "write") -> list[Written]:
    return writers.write(number, FakeDraft(np.zeros(0), False, act=act), folder / str(number), {}, {}, 10 + number)


def test_shards_written_by_other_processes_are_the_same_files(tmp_path: Path, model: Path) -> None:
    of_tokens = {"top_k": 4}
    here = dump(write_recipe(tmp_path / "here", model, TEXTS, tokens=of_tokens), "placement.writers=0")
    recipe = write_recipe(tmp_path / "there", model, TEXTS, tokens=of_tokens)
    there = dump(recipe, "placement.writers=2", "placement.overlap=true")
    assert content(here) == content(there) and len(content(here)) > 2


def test_shards_are_reported_in_order_when_they_are_written_and_no_more_than_a_few_wait(
    writers: Writers, tmp_path: Path
) -> None:
    found = write(writers, 0, tmp_path, "wait")
    for number in range(1, 7):
        found += write(writers, number, tmp_path)
    assert len(found) >= 7 - 4 and [shard.number for shard in found] == list(range(len(found)))
    found += writers.written(max_pending=0)
    assert found == [Written(number, 10 + number) for number in range(7)]
    assert str(os.getpid()) not in {file.read_text() for file in tmp_path.iterdir()}


def test_an_error_in_a_process_is_raised_here(writers: Writers, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 is full"):  # by `write` itself where the process was quick
        write(writers, 4, tmp_path, "fail")
        writers.written(max_pending=0)


def test_a_killed_process_is_replaced_and_its_shard_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = Writers(1)
    found = write(writers, 3, tmp_path, "die once")
    found += write(writers, 4, tmp_path)  # it waits behind, in the process that dies
    found += writers.written(max_pending=0)
    assert found == [Written(3, 13), Written(4, 14)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["3", "3.died", "4"]  # and nothing of the first attempt
    os.kill(int((tmp_path / "4").read_text()), signal.SIGKILL)  # idle now
    assert write(writers, 5, tmp_path) + writers.written(max_pending=0) == [Written(5, 15)]
    writers.close()
    said = capsys.readouterr().err
    assert "a process that wrote shard 3 was killed, perhaps because memory ran out; another one writes it" in said
    assert said.count("was killed") == 2


def test_a_shard_that_costs_two_processes_ends_the_dump_in_words(tmp_path: Path) -> None:
    writers = Writers(2)
    with pytest.raises(OSError, match=r"wrote shard 3 was killed, perhaps because memory ran out.*placement.writers=0"):
        write(writers, 3, tmp_path, "die")
        write(writers, 4, tmp_path)  # by the other process, which is not to blame
        writers.written(max_pending=0)
    writers.close()


def test_without_processes_a_shard_is_written_at_once(tmp_path: Path) -> None:
    assert write(Writers(0), 5, tmp_path) == [Written(5, 15)]
    assert (tmp_path / "5").read_text() == str(os.getpid())


def test_the_sums_of_spans_are_those_of_their_positions() -> None:
    entries = Entries(np.array([2, 1], np.uint16), np.array([1, 2, 3], np.uint8), np.array([0.5, 0.25, 1.0]))
    none = Entries(np.zeros(0, np.uint16), np.zeros(0, np.uint8), np.zeros(0))
    measures_MP = np.array([[0.125, 0.25], [0.0, 0.0], [0.0, 0.0]])
    from schemas.columns import MEASURES

    measures_MP = np.stack([measures_MP[0] if column.name == "dropped" else np.ones(2) for column in MEASURES])
    found = sums(
        [SparseTargets(entries, measures_MP, np.zeros(1)), SparseTargets(none, measures_MP[:, :0], np.zeros(0))]
    )
    assert found == (2, 0.375, 0.25)
