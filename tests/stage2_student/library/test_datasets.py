"""A dump's records as torch's data sets: every one once an epoch, over ranks and workers, and on from any position."""

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch.utils.data
from torch.utils.data import DataLoader

from pipeline.dumps.view import records
from stage2_student.data import order
from stage2_student.library import DumpDataset, DumpStream, Position, StreamedRecord, read_document
from tests.support.small_dumps import make_dump


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dump(tmp_path_factory.mktemp("dump") / "dump", num_records=60, num_shards=5)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_PIECES", 16)


def names(items: list[StreamedRecord]) -> list[str]:
    return [item.record.doc_id for item in items]


def test_a_dataset_holds_the_dumps_records_at_any_index_in_any_order(dump: Path) -> None:
    dataset, expected = DumpDataset(dump), [record.doc_id for record in records(dump)]
    assert len(dataset) == 60 and not dataset.has_chats
    for index in [3, 59, 0, 12, 11, 3, 4, -1, -60]:
        assert dataset[index].doc_id == expected[index]
    assert [pickle.loads(pickle.dumps(dataset))[index].doc_id for index in range(60)] == expected
    with pytest.raises(IndexError):
        dataset[60]


def test_a_stream_takes_each_record_once_an_epoch_in_another_order_and_goes_on_from_every_position(dump: Path) -> None:
    stream = list(islice(DumpStream(dump, seed=1), 150))
    epochs = [names(stream[at : at + 60]) for at in (0, 60)]
    assert [Counter(epoch) for epoch in epochs] == [Counter(f"d{i}" for i in range(60))] * 2 and epochs[0] != epochs[1]
    assert names(stream) != names(list(islice(DumpStream(dump, seed=2), 150)))
    for at in (0, 7, 59, 60, 100):
        resumed = DumpStream(dump, seed=1, start=Position(*tuple(stream[at].after)))
        assert names(list(islice(resumed, 30))) == names(stream[at + 1 : at + 31])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ranks_and_workers_share_a_stream_whose_steps_are_those_of_one_process(
    dump: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of two ranks with batches of 4 takes the next 8 records, whichever workers read them."""
    alone = names(list(islice(DumpStream(dump, seed=3), 96)))
    steps = []
    for rank in range(2):
        shares = []
        for worker in range(num_workers):
            info = type("Info", (), {"id": worker, "num_workers": num_workers})
            monkeypatch.setattr("stage2_student.library.datasets.get_worker_info", lambda info=info: info)
            share = list(islice(DumpStream(dump, seed=3, batch_size=4, rank=rank, world=2), 48))
            shares.append([share[at : at + 4] for at in range(0, len(share), 4)])
        steps.append([shares[step % num_workers][step // num_workers] for step in range(12)])
    for step, (ours, theirs) in enumerate(zip(*steps, strict=True)):
        assert names([*ours, *theirs]) == alone[step * 8 : step * 8 + 8]
        assert {item.after for item in [*ours, *theirs]} == {Position(*divmod(step * 8 + 8, 60))}


def test_batches_of_a_loader_with_workers_are_those_of_one_without(dump: Path) -> None:
    loaders = [
        DataLoader(DumpStream(dump, seed=3, batch_size=4), batch_size=4, collate_fn=list, num_workers=workers)
        for workers in (0, 2)
    ]
    expected, found = ([(names(batch), batch[-1].after) for batch in islice(loader, 9)] for loader in loaders)
    assert found == expected
    with pytest.raises(ValueError, match=r"2 workers share this stream: give DumpStream\(batch_size=\)"):
        next(iter(DataLoader(DumpStream(dump), batch_size=4, collate_fn=list, num_workers=2)))


def test_a_rank_outside_the_world_and_an_empty_batch_are_refused(dump: Path) -> None:
    with pytest.raises(ValueError, match="rank 2 of world 2"):
        DumpStream(dump, rank=2, world=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        DumpStream(dump, batch_size=0)
    assert isinstance(DumpStream(dump), torch.utils.data.IterableDataset)


def test_a_document_is_read_as_arrays(dump: Path) -> None:
    found = read_document(dump, "d7")
    [record] = [record for record in records(dump) if record.doc_id == "d7"]
    count = record.num_positions
    assert found.document == record.document and found.offset_P.tolist() == list(range(count))
    for position in range(count):
        first = int(record.entry_counts[:position].sum())
        entries = slice(first, first + int(record.entry_counts[position]))
        stored = found.symbols_PE[position] >= 0
        pairs = zip(record.symbols[entries].tolist(), record.logprobs[entries].tolist(), strict=True)
        ranked = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))  # the dump has them in another order
        assert found.symbols_PE[position][stored].tolist() == [symbol for symbol, _ in ranked]
        assert found.logprobs_PE[position][stored].tolist() == [logprob for _, logprob in ranked]
        expected = 1 - np.exp(record.logprobs[entries].astype(np.float64)).sum()
        assert found.tail_P[position] == pytest.approx(max(expected, 0), abs=1e-12)
        assert np.isneginf(found.logprobs_PE[position][~stored]).all()
    assert bytes(found.realised_P[:-1]) == found.document and found.realised_P[-1] == 255
    np.testing.assert_array_equal(found.measures_P["token_end"], record.token_end)
    assert found.token_starts.tolist() == list(range(len(found.document))) and set(found.token_logprobs) == {-1.0}
    with pytest.raises(ValueError, match="holds no document 'd70'; the most similar ids: 'd7'"):
        read_document(dump, "d70")
