"""The Triton kernels of `token_marginal` against their twins and against brute force; run in a process of its own.

By `test_kernel_triton.py`. Under the interpreter logits may be float64, and then the kernels equal their twins to that
dtype's digits; on a GPU too. Tiles are small, so that a row of a small vocabulary has several.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.covering.vocabulary import Vocabulary
from schemas.record import Segment
from stage2_student.interfaces import OrderableHead
from stage2_student.interfaces.token_marginal import kernel_triton, kernel_twins
from stage2_student.interfaces.token_marginal.node_sums import Backward, Memory, Order
from stage2_student.interfaces.token_marginal.nodes import (
    NodePlan,
    Tables,
    chunk_sizes,
    chunks_of,
    plan_of,
    rows_of,
    unique_positions,
)
from stage2_student.interfaces.token_marginal.types import Columns, Sums
from tests.pipeline.covering.test_covering import random_tokens, random_vocabulary
from tests.stage2_student.interfaces.token_marginal.test_interface import (
    Case,
    Documents,
    check_against_brute_force,
    random_case,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_KEPT, RECOMPUTED = Memory(100, 100), Memory(0, 3)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernel_triton, "TILE", 16)
    monkeypatch.setattr(kernel_triton, "CELLS", 8)
    yield


def prefixed(rng: np.random.Generator) -> list[bytes | None]:
    """Draw a vocabulary as SentencePiece's: pieces with and without a space before them, bytes, control tokens."""
    words = [b"".join(rng.choice([b"a", b"b", b"\xc3"], size=rng.integers(1, 4))) for _ in range(9)]
    singles = [b" ", b"a", b"b", b"\xc3", b"\xa9"]
    return [None, None, *singles, *words, *(b" " + word for word in words), b" ", b"a"]


def nested(rng: np.random.Generator) -> list[bytes | None]:
    """Return tokens each of which begins the next, as runs of spaces do; each twice."""
    chain = [b"a" * n for n in range(1, 15)]
    return [*chain, b"b", b"ab", None, *chain]


def wide(rng: np.random.Generator) -> list[bytes | None]:
    """Draw all single bytes that are symbols, and tokens of two and three of them."""
    longer = [rng.integers(97, 100, size=rng.integers(2, 4)).astype(np.uint8).tobytes() for _ in range(25)]
    return [*(bytes([byte]) for byte in range(255)), *longer, None, None]


VOCABULARIES = {"bpe": random_vocabulary, "prefixed": prefixed, "nested": nested, "wide": wide}


class Given:
    """A micro-batch's rows on the device, with random logits of all of them."""

    def __init__(self, name: str, seed: int, dtype: torch.dtype, in_order: bool, padding: int = 3) -> None:
        rng = np.random.default_rng(seed)
        token_bytes = VOCABULARIES[name](rng)
        end = token_bytes.index(None)
        size = (1, 0) if name == "wide" else (4, 1, 0)
        documents: Documents = [(random_tokens(rng, token_bytes, end, n), None) for n in size]
        by_nodes = (kernel_twins.KERNELS, ALL_KEPT)
        case = Case(seed, documents, token_bytes, end, padding=padding, by_nodes=by_nodes)
        assert case.width % 16, "the last tile is to be a part of one"
        extra = {name: value.to(DEVICE) for name, value in case.batch.extra.items()}
        self.nodes = NodePlan(*(extra[name] for name in NodePlan._fields))
        self.rows, self.unique_Q = rows_of(self.nodes), unique_positions(self.nodes)
        self.tables = Tables(*(table.to(DEVICE) for table in Tables.of(case.interface.vocabulary)))
        self.sizes = chunk_sizes(extra)
        self.num_cells = sum(cells for _, cells in self.sizes)
        columns = case.interface.columns
        on_device = columns._replace(token_C=columns.token_C.to(DEVICE), column_V=columns.column_V.to(DEVICE))
        self.order = Order(Columns(*on_device), in_order)
        plan = plan_of(self.nodes, self.unique_Q, self.listed(kernel_twins.KERNELS))
        labels_R = case.batch.labels_BL.flatten().to(DEVICE)[plan.state_R]
        tokens_R2 = torch.stack([plan.next_R, labels_R], dim=-1)
        [self.chunk] = chunks_of(self.rows, plan, tokens_R2, self.sizes)
        generator = torch.Generator().manual_seed(seed)
        self.logits = (4 * torch.randn(len(labels_R), case.width, generator=generator)).to(DEVICE, dtype)

    def listed(self, kernels: object) -> tuple[Tensor, ...]:
        assert hasattr(kernels, "list_cells")
        found: tuple[Tensor, ...] = kernels.list_cells(
            self.nodes, self.rows, self.unique_Q, self.tables, self.num_cells
        )
        return found

    def cotangents(self, sums: Sums) -> Sums:
        generator = torch.Generator().manual_seed(1)
        parts = (torch.randn(p.shape, generator=generator, dtype=torch.float64).to(DEVICE) for p in sums)
        return Sums(*parts)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_cells_that_are_listed_are_those_of_the_twin(name: str) -> None:
    given = Given(name, 0, torch.float64, True)
    ours, twins = given.listed(kernel_triton.KERNELS), given.listed(kernel_twins.KERNELS)
    assert given.num_cells == len(twins[0])
    for one, other in zip(ours, twins, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize(
    ("dtype", "in_order"),
    [(torch.float64, True), (torch.float64, False), (torch.bfloat16, True), (torch.float32, False)],
)
def test_sums_and_gradients_are_those_of_the_twins_in_float64(name: str, dtype: torch.dtype, in_order: bool) -> None:
    given = Given(name, 3, dtype, in_order)
    expected, expected_log_R = kernel_twins.sums(given.logits.double(), given.order, given.chunk, given.tables)
    found, log_total_R = kernel_triton.sums(given.logits, given.order, given.chunk, given.tables)
    tight = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close((*found, log_total_R), (*expected, expected_log_R), **tight)
    back = Backward(expected_log_R, expected, given.cotangents(expected), False)
    expected_gradient = kernel_twins.gradient(given.logits.double(), given.order, given.chunk, given.tables, back)
    before = given.logits.clone()
    apart = kernel_triton.gradient(given.logits, given.order, given.chunk, given.tables, back)
    assert torch.equal(given.logits, before)
    within = tight if dtype == torch.float64 else {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(apart, expected_gradient.to(dtype), **within)
    over = kernel_triton.gradient(given.logits, given.order, given.chunk, given.tables, back._replace(in_place=True))
    assert over.data_ptr() == given.logits.data_ptr() and torch.equal(over, apart)


@pytest.mark.parametrize("memory", [ALL_KEPT, Memory(4, 2), RECOMPUTED], ids=["kept", "some", "none"])
def test_distributions_and_gradients_are_those_of_brute_force(memory: Memory) -> None:
    check_against_brute_force(random_case(5, [3, 0, 2], (kernel_triton.KERNELS, memory)))


def test_a_prefix_of_the_tokenizer_and_control_tokens_are_as_by_brute_force() -> None:
    token_bytes: list[bytes | None] = [b" ", b" a", b"a", b"b", b"ab", b" ab", None]
    by_nodes = (kernel_triton.KERNELS, ALL_KEPT)
    check_against_brute_force(Case(1, [([1, 3, 0, 2], None)], token_bytes, 6, b" ", by_nodes=by_nodes), prefix=b" ")
    segments = [Segment(0, 2, True), Segment(2, 3, True)]
    plain: list[bytes | None] = [b"a", b"b", b"ab", b"ba", None]
    check_against_brute_force(Case(0, [([2, 0, 1, 0], segments)], plain, 4, by_nodes=by_nodes))


def test_masses_of_1e_30_keep_their_digits() -> None:
    given = Given("bpe", 7, torch.float32, True)
    given.logits[1:] *= 0.2
    given.logits[1:, 2::3] -= 69  # 1e-30
    given.logits[2, :20] -= 5  # the largest comes late
    given.logits[3, 20:] -= 5  # and early
    expected, _ = kernel_twins.sums(given.logits.double(), given.order, given.chunk, given.tables)
    found, _ = kernel_triton.sums(given.logits, given.order, given.chunk, given.tables)
    assert (expected.mass_I < 1e-29).sum() > 5
    torch.testing.assert_close(found.mass_I, expected.mass_I, rtol=1e-5, atol=0)


def test_a_logit_of_minus_infinity_has_a_mass_and_one_that_is_no_number_is_not_lost() -> None:
    given = Given("bpe", 8, torch.float32, True)
    given.logits[0, :17] = -torch.inf  # a whole tile, the first
    given.logits[1, 20] = torch.nan
    found, log_total_R = kernel_triton.sums(given.logits, given.order, given.chunk, given.tables)
    of_first = int(given.chunk.rows.num_cells_R[0])
    mass_I = found.mass_I[:of_first]
    assert torch.isfinite(mass_I).all() and (mass_I > 0).all()
    assert log_total_R[1].isnan() and torch.isfinite(log_total_R[[0, 2]]).all()


def test_no_rows_have_no_sums_and_the_head_a_gradient_of_zero() -> None:
    linear = torch.nn.Linear(8, 8).to(DEVICE)
    head = OrderableHead(linear, linear, lambda logits: logits)
    case = Case(4, [], [b"a", b"b", b"ab", None, None], 3, by_nodes=(kernel_triton.KERNELS, ALL_KEPT))
    hidden_BLD = torch.randn(1, 1, 8, device=DEVICE, requires_grad=True)
    scores = case.interface.to(DEVICE)(hidden_BLD, case.batch.to(DEVICE), head)
    assert scores.token_nats_N is not None
    (scores.logits_PV.sum() + scores.token_nats_N.sum()).backward()
    assert linear.weight.grad is not None and not linear.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_taken_in_any_order_and_dtype(dtype: torch.dtype) -> None:
    matrix = torch.randn(7, 37, device=DEVICE)
    if DEVICE == "cpu":
        matrix = matrix.bfloat16().float()  # where a GPU rounds, the interpreter cuts digits off
    index = torch.tensor([6, 0, 3, 3], dtype=torch.int32, device=DEVICE)
    assert torch.equal(kernel_triton.take_rows(matrix, index, dtype), kernel_twins.take_rows(matrix, index, dtype))


def test_tables_have_the_bytes_in_common_of_neighbouring_columns() -> None:
    for make in VOCABULARIES.values():
        token_bytes = make(np.random.default_rng(2))
        vocabulary = Vocabulary(token_bytes, (token_bytes.index(None),), len(token_bytes) + 5)
        tables, text = Tables.of(vocabulary), vocabulary.sorted_bytes
        for column in range(1, len(text)):
            pairs = zip(text[column - 1], text[column], strict=False)
            common = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
            least = min(len(text[column - 1]), len(text[column]))
            assert tables.common_C[column] == (least if common is None else common)
