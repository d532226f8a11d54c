"""Documents packed into rows: which ones, and that none of them reaches another."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaModel, masking_utils

from pipeline.config import StudentConfig, TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import Layout, collate, empty_micro_batch
from stage2_student.data.packing import (
    PAYS_ABOVE,
    Rows,
    _even,
    _even_side_by_side,
    _side_by_side,
    own_micro_batches,
    packing_fault,
    padded_tokens,
    plan_micro_batches,
    resolve_packing,
)
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.losses.alm import chunk_tensors
from stage2_student.model.initial_student import load_start
from stage2_student.model.student import Student
from tests.support.small_dumps import make_record, make_text

END_ID = 268
ALL = {"ce": 1.0, "byte_ce": 1.0, "kl": 1.0, "alm": 10.0}


@pytest.fixture(scope="module")
def documents(model: Path) -> list[Encoded]:
    rng = np.random.default_rng(0)
    records = [make_record(f"d{i}", make_text(rng, size), rng) for i, size in enumerate([9, 1, 4, 3, 8, 2])]
    found = encode_records(records, ByteTokenizer.load(str(model)), 512)
    return [document for document in found if isinstance(document, Encoded)]


def random_lengths(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(n) for n in rng.integers(1, int(rng.choice([10, 80])), int(rng.integers(1, 60)))]


@pytest.mark.parametrize("packing", ["off", "on", "auto"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_micro_batches_hold_each_document_once_and_are_equally_many_per_rank(packing: str, world: int) -> None:
    for seed in range(20):
        lengths = random_lengths(seed)
        plan = plan_micro_batches(lengths, 64, world, packing)
        assert sorted(i for rank in plan for rows in rank for row in rows for i in row) == list(range(len(lengths)))
        assert len({len(rank) for rank in plan}) == 1
        for rows in (rows for rank in plan for rows in rank if rows):
            longest = max(lengths[i] for row in rows for i in row)
            assert max(sum(lengths[i] for i in row) for row in rows) == longest
            assert longest * len(rows) <= 64 or (len(rows) == 1 and lengths[rows[0][0]] == longest)


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize(("world", "of_rank"), [(8, 4096), (8, 16384), (32, 8192)])
def test_ranks_wait_little_for_each_other(packing: str, world: int, of_rank: int) -> None:
    rng = np.random.default_rng(world)
    lengths = [int(n) for n in rng.lognormal(4.9, 0.6, 2 * world * of_rank // 160).clip(20, 512)]
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), world * of_rank))]
    plan = plan_micro_batches(lengths, 8192, world, packing)
    slots = list(zip(*plan, strict=True))
    waited_for = sum(max(padded_tokens(lengths, [rows]) for rows in slot) for slot in slots)
    assert waited_for < 1.25 * sum(lengths) / world
    assert len(slots) == -(-len(plan_micro_batches(lengths, 8192, 1, packing)[0]) // world)  # no more than have to be
    assert all(padded_tokens(lengths, [rows]) <= 8192 for slot in slots for rows in slot)


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shortest_documents_are_planned_too(packing: str, world: int) -> None:
    rng = np.random.default_rng(0)
    for num in range(12):  # the search for a limit ends also where there is nothing left between two of them
        for longest in (1, 2, 3, 15):
            lengths = [int(n) for n in rng.integers(1, longest + 1, num)]
            for most in (1, 2, 5, 16):
                plan = plan_micro_batches(lengths, most, world, packing)
                assert sorted(i for rank in plan for rows in rank for row in rows for i in row) == list(range(num))


def test_one_rank_has_all_that_fits_in_one_micro_batch() -> None:
    lengths = [40, 30, 30, 20, 10, 10]
    assert plan_micro_batches(lengths, 1000, 1) == [[[[0], [1], [2], [3], [4], [5]]]]
    assert plan_micro_batches(lengths, 1000, 1, "on") == [[[[0], [1, 4], [2, 5], [3]]]]


def test_auto_packs_a_step_where_that_saves_enough() -> None:
    def all_of(lengths: Sequence[int], packing: str) -> list[Rows]:
        return plan_micro_batches(lengths, 256, 1, packing)[0]

    outcomes = set()
    for seed in range(40):
        lengths = random_lengths(seed)
        off, on = all_of(lengths, "off"), all_of(lengths, "on")
        pays = padded_tokens(lengths, on) < (1 - PAYS_ABOVE) * padded_tokens(lengths, off)
        assert all_of(lengths, "auto") == (on if pays else off)
        outcomes.add(pays)
    assert outcomes == {True, False}
    assert padded_tokens([5, 3, 2, 1], [[[0], [1, 3], [2]], [[]][:0]]) == 15


def test_a_layout_says_where_each_document_stands() -> None:
    assert Layout.of([4, 1, 3]) == Layout((3, 4), (0, 4, 8))
    assert Layout.of([4, 1, 3], [1, 2]) == Layout((2, 4), (0, 4, 5))
    assert empty_micro_batch(7).layout == Layout((1, 1), ())


def loss_and_gradient(
    model: Path, documents: Sequence[Encoded], interface: str, row_sizes: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute every objective in one micro-batch: the sums of all parts, the gradient of all weights."""
    tokenizer = ByteTokenizer.load(str(model))
    shape = StudentShape(64, 269, tokenizer.token_bytes, b"", (END_ID,))
    made = make_interface(StudentConfig(model="m", path="p", interface=interface, max_dropped=0.5), shape)
    train = TrainConfig.model_validate({"dtype": "float32", "objectives": ALL})
    student = Student(load_start(model, False), made, train)
    for index, parameter in enumerate(made.parameters()):  # they start at zero, where no gradient would reach the model
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    examples = [make_example(document, END_ID, END_ID, made.max_bytes, Masks(1.0, 0.05)) for document in documents]
    micro = collate(examples, row_sizes)
    extra = made.prepare(documents, examples, micro) | chunk_tensors(documents, micro.layout, 0.1)
    nats, sums = student(replace(micro, extra=extra))
    nats.backward()
    return sums, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("interface", ["linear", "causal", "token_marginal"])
def test_packed_documents_have_the_losses_and_gradients_of_padded_ones(
    interface: str, model: Path, documents: list[Encoded]
) -> None:
    lengths = [document.num_tokens for document in documents]
    rows = plan_micro_batches(lengths, 10**6, 1, "on")[0][0]
    in_rows = [documents[i] for row in rows for i in row]
    assert len(rows) < len(in_rows) and padded_tokens(lengths, [rows]) > sum(
        d.num_tokens for d in in_rows
    )  # packed, and with padding
    padded, padded_gradient = loss_and_gradient(model, in_rows, interface, None)
    packed, packed_gradient = loss_and_gradient(model, in_rows, interface, [len(row) for row in rows])
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)
    assert padded_gradient.norm() > 0
    assert (packed_gradient - padded_gradient).norm() <= 1e-6 * padded_gradient.norm()


def test_a_model_whose_documents_would_not_stay_apart_is_not_packed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = load_start(model, False)
    assert resolve_packing(llama, "auto", "cuda") == ("off", None) and resolve_packing(llama, "on", "cuda") == (
        "on",
        None,
    )
    assert packing_fault(llama) is None and resolve_packing(llama, "auto", "cpu") == ("auto", None)
    mamba = MambaModel(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    assert packing_fault(mamba) == "it takes no position ids"
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert str(packing_fault(llama)).startswith("its states differ by")
    kept, remark = resolve_packing(llama, "auto", "cpu")
    assert (
        kept == "off" and "auto packs nothing" in str(remark) and resolve_packing(llama, "off", "cpu") == ("off", None)
    )
    with pytest.raises(
        ValueError, match=r"train\.packing is on, but packed documents would influence each other in a llama model"
    ):
        resolve_packing(llama, "on", "cuda")


def test_micro_batches_by_group_are_those_by_document() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 120, int(rng.integers(0, 60))).tolist()
        limit, world = int(rng.integers(1, 400)), int(rng.integers(1, 9))
        groups = _even_side_by_side(lengths, limit, world)
        found = [groups.rows(group) for group in range(len(groups.starts) - 1)]
        assert found == _even(_side_by_side, lengths, limit, world)
        plan = plan_micro_batches(lengths, limit, world)
        assert [own_micro_batches(np.array(lengths, dtype=int), limit, rank, world) for rank in range(world)] == plan
