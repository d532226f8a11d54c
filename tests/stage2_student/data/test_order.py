"""Distance in the corpus of a step's documents, and the order of runs begun before it was mixed so."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from stage2_student.data import order as order_module
from stage2_student.data.order import START, VERSION, WHOLE_RECORDS, Order, Position, ShuffleWindow

SHARDS, RECORDS, SOURCES = 32, 256, 4


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "WINDOW_PIECES", 128)


def sources_of_steps(version: int, per_step: int) -> list[int]:
    """Count the sources of each step, in an epoch of a corpus that lists them one after another."""
    order = Order(0, np.full(SHARDS, RECORDS), None, version)
    windows = islice(order.windows(), SHARDS * RECORDS // 128)
    source = np.concatenate([window.shard_W * SOURCES // SHARDS for window in windows])
    return [len(np.unique(step)) for step in source.reshape(-1, per_step)]


def test_a_step_holds_what_far_parts_of_the_corpus_hold() -> None:
    before, now = (sources_of_steps(version, 16) for version in (WHOLE_RECORDS, VERSION))
    assert np.mean(np.array(before) == 1) > 0.9
    expected = SOURCES * (1 - (1 - 1 / SOURCES) ** 16)  # of a full shuffle
    assert min(now) > 1 and np.mean(now) > 0.9 * expected


def test_pieces_of_one_document_share_a_step_no_oftener_than_by_chance() -> None:
    """Documents of eight pieces each, in shards; a step is of 16 pieces, a window of 128."""
    continues_U = np.tile(np.arange(RECORDS) % 8 > 0, SHARDS)
    by_chance = 16 * (1 - 1 / 16) ** 16  # of 16 documents drawn anew for each piece of a step, those that are not in it
    for shards in (1, SHARDS):
        order = Order(0, np.full(shards, RECORDS), continues_U[: shards * RECORDS])
        again, firsts = [], []
        for window in islice(order.windows(), shards * RECORDS // 128 * 4):
            document = window.shard_W * RECORDS + window.unit_W // 8
            again += [16 - len(np.unique(step)) for step in document.reshape(-1, 16)]
            firsts.append(np.flatnonzero(window.unit_W % 8 == 0))
        # Eight stand at distances of 16: two share a step only where one is late in its part of the window, and the
        # next early in its.
        assert np.mean(again) < by_chance / 4
    quarters = np.bincount(np.concatenate(firsts) // 32)
    assert quarters.min() > 0.9 * quarters.mean()  # and the first of a document stands anywhere


def windows_before(seed: int, counts_S: np.ndarray, start: Position) -> Iterator[ShuffleWindow]:
    """Yield windows in the order of version 2, as it was written then."""
    epoch, skip = start
    while True:
        shards_S = np.random.default_rng([seed, epoch]).permutation(len(counts_S))
        ends_S = np.cumsum(counts_S[shards_S])
        num_records = int(ends_S[-1])
        for first in range(skip - skip % 128, num_records, 128):
            random = np.random.default_rng([seed, epoch, 1 + first // 128])
            at_W = random.permutation(np.arange(first, min(first + 128, num_records)))
            turn_W = np.searchsorted(ends_S, at_W, side="right")
            shard_W = shards_S[turn_W]
            row_W = at_W - ends_S[turn_W] + counts_S[shard_W]
            yield ShuffleWindow(epoch, first // 128, first, np.zeros_like(at_W), at_W, shard_W, row_W)
        epoch, skip = epoch + 1, 0


@pytest.mark.parametrize("seed", range(10))
def test_a_run_of_the_order_before_meets_its_documents_as_it_did(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts_S = random.integers(0, 200, 7)
    counts_S[3] = 0
    start = Position(int(random.integers(3)), int(random.integers(counts_S.sum())))
    ours = islice(Order(seed, counts_S, None, WHOLE_RECORDS).windows(start), 20)
    for window, expected in zip(ours, windows_before(seed, counts_S, start), strict=False):
        assert window[:3] == expected[:3]
        assert all((a == b).all() for a, b in zip(window[3:], expected[3:], strict=True))


def test_each_shard_is_read_from_front_to_back_once_and_all_lanes_at_once() -> None:
    windows = list(islice(Order(3, np.full(SHARDS, RECORDS)).windows(), SHARDS * RECORDS // 128))
    last: dict[int, tuple[int, int]] = {}  # of each lane: shard and row
    opened: list[int] = []
    for window in windows:
        assert len(set(window.lane_W.tolist())) == order_module.LANES
        for lane, _, shard, row in sorted(zip(*window[3:], strict=True)):
            before = last.get(lane)
            if before is None or before[0] != shard:
                opened.append(shard)
                assert row == 0
            else:
                assert row == before[1] + 1
            last[lane] = (shard, row)
    assert sorted(opened) == list(range(SHARDS))


def test_few_shards_are_read_in_stripes_so_that_a_window_still_draws_from_far_parts() -> None:
    window = next(Order(0, np.array([1024])).windows(START))
    assert len(set((window.unit_W // 256).tolist())) == 4


def test_a_shard_that_holds_most_of_all_is_read_in_stripes_too_and_each_piece_taken_once() -> None:
    counts_S = np.array([40, 4096, *[40] * 14])
    order = Order(1, counts_S)
    windows = list(islice(order.windows(), -(-int(counts_S.sum()) // 128)))
    quarters = np.concatenate([window.unit_W[window.shard_W == 1] // 1024 for window in windows])
    steps = quarters[: len(quarters) // 16 * 16].reshape(-1, 16)
    assert np.mean([len(np.unique(step)) for step in steps]) > 2
    taken = np.concatenate([window.shard_W * 4096 + window.unit_W for window in windows])
    assert len(taken) == counts_S.sum() == len(np.unique(taken))


def test_a_window_of_single_pieces_is_ordered_as_one_whose_documents_have_several_would_be() -> None:
    for seed in range(20):
        group_W = np.random.default_rng(seed).permutation(seed + 1)
        random = np.random.default_rng(seed)
        random.random(len(group_W))  # each piece's turn within its document
        at_W = random.random(len(group_W))[group_W]
        expected = sorted(range(len(group_W)), key=lambda piece: at_W[piece])
        assert order_module._spread(group_W, np.random.default_rng(seed)).tolist() == expected
