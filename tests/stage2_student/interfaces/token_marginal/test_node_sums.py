"""Sums of rows that are shipped as nodes, by the kernels' twins: brute force, students' weights, and what is not done.

That the Triton kernels are their twins' equals is in `kernel_cases`.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stage2_student.interfaces.token_marginal import kernel_twins
from stage2_student.interfaces.token_marginal.interface import TokenMarginal
from stage2_student.interfaces.token_marginal.node_sums import Memory
from stage2_student.interfaces.token_marginal.nodes import (
    Listed,
    NodePlan,
    Tables,
    list_cells,
    rows_of,
    unique_positions,
)
from stage2_student.model.lora import add_adapters
from stage2_student.model.student import Student
from tests.stage2_student.interfaces.token_marginal.test_interface import (
    Case,
    brute_force,
    check_against_brute_force,
    random_case,
    tiny_student,
)
from tests.support.tiny import tiny_model

TWINS = kernel_twins.KERNELS
MEMORIES = [Memory(1000, 1000), Memory(4, 2), Memory(0, 3)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.sampled_from(MEMORIES))
def test_values_and_gradients_are_those_of_brute_force(seed: int, lengths: list[int], memory: Memory) -> None:
    check_against_brute_force(random_case(seed, lengths, (TWINS, memory)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_cells_made_of_nodes_are_those_of_the_plan_in_the_order_of_their_columns(seed: int, lengths: list[int]) -> None:
    plain, by_nodes = random_case(seed, lengths).batch.extra, random_case(seed, lengths, (TWINS, MEMORIES[0]))
    nodes = NodePlan(*(by_nodes.batch.extra[name] for name in NodePlan._fields))
    tables = Tables.of(by_nodes.interface.vocabulary)
    found = list_cells(nodes, rows_of(nodes), unique_positions(nodes), tables, len(plain["first_I"]))
    row_I = plain["num_cells_R"].new_tensor(range(len(plain["num_cells_R"]))).repeat_interleave(plain["num_cells_R"])
    order = sorted(range(len(row_I)), key=lambda i: (int(row_I[i]), int(plain["first_I"][i])))
    for name, values in found._asdict().items():
        assert torch.equal(values, plain[name][order].to(values.dtype)), name
    assert torch.equal(unique_positions(nodes), plain["unique_Q"])
    assert torch.equal(nodes.num_cells_R.long(), plain["num_cells_R"])


def test_a_token_is_shipped_in_a_fraction_of_the_bytes_of_its_cells() -> None:
    def size(case: Case) -> int:
        return sum(values.numel() * values.element_size() for values in case.batch.extra.values())

    assert 3 * size(random_case(3, [40], (TWINS, MEMORIES[0]))) < size(random_case(3, [40]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def by_nodes(student: Student, case: Case, memory: Memory) -> None:
    """Have a student's interface, and the batch of a case, go by nodes."""
    documents = [(encoded.tokens.tolist(), None) for encoded in case.encoded]
    again = Case(0, documents, case.token_bytes, case.end, padding=0, by_nodes=(TWINS, memory))
    assert isinstance(student.interface, TokenMarginal)
    again.interface.max_dropped = student.interface.max_dropped
    case.interface, case.batch = again.interface, again.batch
    student.interface = again.interface


HEADS: list[dict[str, Any]] = [
    {"tied": True},
    {"tied": False, "frozen": True},
    {"tied": False, "softcap": 1.5},
    {"tied": True, "scale": 0.25},
    {"tied": False, "bias": True},
    {"tied": False, "watched": True},  # its columns are in the order of token ids
    {"tied": False, "lora": True},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("memory", MEMORIES[::2], ids=["kept", "recomputed"])
def test_gradients_of_a_students_weights_are_those_of_brute_force(
    head: dict[str, Any], memory: Memory, tiny: Path, tmp_path: Path
) -> None:
    student, case = tiny_student(tiny, tmp_path, [b"the thing and", b"in the"])
    by_nodes(student, case, memory)
    lm = student.lm
    if not head["tied"]:
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    if head.get("bias"):
        lm.lm_head.bias = torch.nn.Parameter(torch.randn(len(lm.lm_head.weight)))
    if head.get("lora"):
        config = student_config_of(lora_rank=2)
        add_adapters(lm, config, tokenizer_moved=True)
    lm.double()
    lm.lm_head.weight.requires_grad_(not head.get("frozen", False))
    if head.get("watched"):
        lm.lm_head.register_forward_hook(lambda *_: None)
    student.logit_softcap, student.logit_scale = head.get("softcap"), head.get("scale", 1.0)
    assert (student.head.plain is None) == head.get("watched", False)
    hidden_BLD = lm.base_model(input_ids=case.batch.tokens_BL, use_cache=False).last_hidden_state
    case.logits_BLV = student.token_logits(hidden_BLD)
    expected_PV = brute_force(case)
    found, nats_N = case.interface.marginals(hidden_BLD, case.batch, student.head)
    is_possible_PV, cotangent_PV = expected_PV > -torch.inf, torch.randn_like(expected_PV)
    torch.testing.assert_close(found.logprobs_PV[is_possible_PV], expected_PV[is_possible_PV])
    weights = [p for p in lm.parameters() if p.requires_grad]
    twin = (expected_PV * cotangent_PV)[is_possible_PV].sum()
    expected = torch.autograd.grad(twin, weights, retain_graph=True, allow_unused=True)
    ours = torch.autograd.grad(
        (found.logprobs_PV * cotangent_PV)[is_possible_PV].sum() + 0 * nats_N.sum(), weights, allow_unused=True
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def student_config_of(**values: Any) -> Any:
    from pipeline.config import StudentConfig

    return StudentConfig(model="m", path="p", **values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_has_the_loss_and_the_gradient_that_it_has_by_cells(dtype: str, tiny: Path, tmp_path: Path) -> None:
    objectives = {"ce": 0.3, "byte_ce": 1.0, "kl": 1.0, "alm": 0.0}
    losses, gradients = [], []
    for memory in (None, *MEMORIES):
        texts = [b"the thing and", b"in the", b"er"]
        student, case = tiny_student(tiny, tmp_path, texts, dtype=dtype, objectives=objectives)
        if memory is not None:
            by_nodes(student, case, memory)
        nats, _ = student(case.batch)
        nats.backward()
        losses.append(nats.item())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    exact = dtype == "float32"
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-5 if exact else 2e-3)
    for one, other in pairwise(gradients):
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > (1 - 1e-6 if exact else 0.999)


def test_packed_documents_are_as_documents_apart() -> None:
    from stage2_student.data.examples import Masks, make_example
    from stage2_student.data.micro_batch import collate

    case = random_case(6, [5, 3, 4], (TWINS, MEMORIES[1]))
    found, nats_N = case.marginals()
    examples = [make_example(e, case.end, case.end, None, Masks(1.0, 1.0)) for e in case.encoded]
    packed = collate(examples, row_sizes=[2, 1])
    logits = [case.logits_BLV[b, : len(e.tokens) + 1] for b, e in enumerate(case.encoded)]
    rows = [torch.cat(logits[:2]), logits[2]]
    length = packed.tokens_BL.shape[1]
    packed_BLV = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    packed = replace(packed, extra=case.interface.prepare(case.encoded, examples, packed))
    other, other_nats_N = case.interface.marginals(packed_BLV, packed, lambda logits: logits)
    torch.testing.assert_close(other.logprobs_PV, found.logprobs_PV)
    torch.testing.assert_close(other_nats_N, nats_N)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a value read, a shape that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, values = func.overloadpacket.__name__, kwargs or {}
        waits = any(name.lstrip("_").startswith(one.lstrip("_")) for one in self.WAITS)
        if name == "repeat_interleave":
            waits = values.get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            waits = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        assert not waits, f"{func} makes the host wait"
        return func(*args, **values)


@pytest.mark.parametrize("memory", MEMORIES)
def test_nothing_in_it_waits_for_the_device(memory: Memory, tiny: Path, tmp_path: Path) -> None:
    def nothing(nodes: NodePlan, *rest: Any) -> Listed:
        with torch.utils._python_dispatch._disable_current_modes():
            return list_cells(nodes, *rest)

    student, case = tiny_student(tiny, tmp_path, [b"the thing and", b"in the", b"er"])
    by_nodes(student, case, memory)
    case.interface.by_nodes = TWINS._replace(list_cells=nothing), memory
    hidden_BLD = student.lm.base_model(input_ids=case.batch.tokens_BL).last_hidden_state
    with NoWaiting():
        scores = case.interface(hidden_BLD, case.batch, student.head)
        assert scores.token_nats_N is not None
        (scores.logits_PV.sum() + scores.token_nats_N.sum()).backward()
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        case.batch.labels_BL[case.batch.labels_BL > 0].sum()


def test_kept_logits_have_one_gradient_and_a_second_is_refused(tiny: Path, tmp_path: Path) -> None:
    for memory in (MEMORIES[0], MEMORIES[2]):
        student, case = tiny_student(tiny, tmp_path, [b"the thing and"])
        by_nodes(student, case, memory)
        hidden_BLD = student.lm.base_model(input_ids=case.batch.tokens_BL).last_hidden_state
        nats = case.interface.marginals(hidden_BLD, case.batch, student.head)[1].sum()
        [first] = torch.autograd.grad(nats, hidden_BLD, retain_graph=True)
        if memory.kept_rows:
            with pytest.raises(RuntimeError, match=r"overwritten .* train\.marginal_kept_gib=0"):
                torch.autograd.grad(nats, hidden_BLD)
        else:
            assert torch.equal(torch.autograd.grad(nats, hidden_BLD)[0], first)
