"""Training on a GPU against float64 on a CPU. Skipped without a GPU."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.acceleration.marginal_kernel import use_marginal_kernel
from stage2_student.data.examples import Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.interfaces.token_marginal import cells as marginal_cells
from stage2_student.interfaces.token_marginal.types import Cells, Columns, Sums
from stage2_student.model.student import Student
from stage2_student.training.building.student import build_student
from tests.stage2_student.interfaces.token_marginal.test_interface import Case
from tests.support.small_dumps import make_recipe
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")
END_ID = 268  # of the tiny model
TEXTS = (b"the thing and", b"in the", b"er the and ing")


def random_cells(num_rows: int, width: int, num_end: int, num_others: int) -> tuple[Cells, Columns]:
    """Draw rows cut into cells of all lengths, one thousands of columns long and some empty."""
    generator = torch.Generator().manual_seed(width)
    num_text_tokens = width - num_end - num_others
    token_C = torch.randperm(width, generator=generator)
    firsts, lasts, counts = [], [], []
    for row in range(num_rows):
        cuts = torch.randint(0, num_text_tokens // (2 if row % 2 else 1), (300,), generator=generator)
        cuts = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([num_text_tokens])])
        firsts.append(cuts[:-1])
        lasts.append(cuts[1:])
        counts.append(len(cuts) - 1)
    tokens_R2 = torch.randint(-1, width, (num_rows, 2), generator=generator)
    first_I, last_I = torch.cat(firsts).int(), torch.cat(lasts).int()
    cells = Cells(torch.tensor(counts), first_I, last_I, tokens_R2)
    return cells, Columns(token_C.int(), token_C.argsort().int(), num_text_tokens, num_end)


def on_gpu(values: Iterable[Any]) -> list[Any]:
    return [value.to(GPU) if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize("width", [500, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_cells_and_their_gradients_are_those_of_float64(width: int, dtype: torch.dtype) -> None:
    cells, columns = random_cells(37, width, num_end=2, num_others=11)
    logits_RV = (torch.randn(37, width) * 4).to(dtype)
    exact_RV = logits_RV.double().requires_grad_()
    given_RV = logits_RV.to(GPU).requires_grad_()
    expected = marginal_cells.cell_sums(exact_RV, cells, columns, [])
    found = marginal_cells.cell_sums(given_RV, Cells(*on_gpu(cells)), Columns(*on_gpu(columns)), [])
    torch.testing.assert_close(tuple(part.cpu() for part in found), tuple(expected), rtol=2e-5, atol=1e-9)
    wanted = Sums(*(torch.randn_like(part) for part in expected))
    [expected_RV] = torch.autograd.grad(list(expected), exact_RV, list(wanted))
    [gradient_RV] = torch.autograd.grad(list(found), given_RV, on_gpu(wanted))
    tolerance = {"rtol": 1e-4 if dtype == torch.float32 else 2**-7, "atol": 1e-6}
    torch.testing.assert_close(gradient_RV.cpu(), expected_RV.to(dtype), **tolerance)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def student_and_batch(tiny: Path, run: Path, interface: str, dtype: str) -> tuple[Student, MicroBatch]:
    (run / "start").symlink_to(tiny)
    tokenizer = ByteTokenizer.load(str(tiny))
    train = {"dtype": dtype, "objectives": {"ce": 0.3, "byte_ce": 1.0, "kl": 1.0, "alm": 0.0}}
    torch.manual_seed(0)
    # Left in training mode: in the other a GPU's GRU has no gradient.
    student = build_student(
        make_recipe(run, tiny, run, train, interface=interface), tokenizer, SpecialIds(END_ID, (END_ID,))
    )
    return student, prepared(student, tokenizer)


def prepared(student: Student, tokenizer: ByteTokenizer) -> MicroBatch:
    """Return a micro-batch of `TEXTS`, prepared by the student's interface."""
    assert student.interface is not None
    encoded = Case(
        0, [(tokenizer.encode(t), None) for t in TEXTS], list(tokenizer.token_bytes), END_ID, padding=0
    ).encoded
    examples = [make_example(e, END_ID, END_ID, student.interface.max_bytes, Masks(1.0, 1.0)) for e in encoded]
    micro = collate(examples)
    return replace(micro, extra=student.interface.prepare(encoded, examples, micro))


@pytest.mark.parametrize("kept_gib", [2.0, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_triton_a_student_has_the_loss_and_the_gradient_that_it_has_by_torch(
    dtype: str, kept_gib: float, tiny: Path, tmp_path: Path
) -> None:
    losses, gradients = [], []
    for kernel in ("torch", "triton"):
        (run := tmp_path / kernel).mkdir()
        student, _ = student_and_batch(tiny, run, "token_marginal", dtype)
        config = student.train_config.model_copy(update={"marginal_kernel": kernel, "marginal_kept_gib": kept_gib})
        said = use_marginal_kernel(student.interface, config)
        assert said is not None and kernel.title() in said.replace("torch's", "Torch")
        batch = prepared(student, ByteTokenizer.load(str(tiny))).to(GPU)
        student.to(GPU)
        assert student.interface is not None
        # Once before, because Triton compiles; the second time nothing may make the host wait.
        student.interface.scores(*states_of(student, batch), batch, student.head)
        hidden = states_of(student, batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if kernel == "triton" else "default")
        try:
            scores = student.interface.scores(*hidden, batch, student.head)
            assert scores.token_nats_N is not None
            (scores.logits_PV.sum() + scores.token_nats_N.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        student.zero_grad()
        nats, _ = student(batch)
        nats.backward()
        losses.append(nats.item())
        gradients.append(torch.cat([p.grad.flatten().float() for p in student.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == "float32" else 5e-3)
    least = 1 - 1e-6 if dtype == "float32" else 0.999
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > least


def states_of(student: Student, batch: MicroBatch) -> tuple[Tensor]:
    return (student.lm.base_model(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state,)


@pytest.mark.parametrize("interface", ["linear", "causal", "token_marginal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_has_the_loss_and_the_gradient_that_it_has_on_a_cpu(
    interface: str, dtype: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the decoder of `causal` is cuDNN's
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    exact, batch = student_and_batch(tiny, tmp_path / "cpu", interface, "float32")
    student, _ = student_and_batch(tiny, tmp_path / "gpu", interface, dtype)
    student.load_state_dict(exact.state_dict())
    student.to(GPU)
    expected, expected_sums = exact(batch)
    nats, sums = student(batch.to(GPU))
    expected.backward()
    nats.backward()
    is_float32 = dtype == "float32"
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5 if is_float32 else 0.02)
    torch.testing.assert_close(sums.cpu(), expected_sums, rtol=1e-4 if is_float32 else 0.05, atol=1e-3)
    ours, theirs = (
        torch.cat([p.grad.flatten().cpu() for p in s.parameters() if p.grad is not None]) for s in (student, exact)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > (1 - 1e-6 if is_float32 else 0.99)
    if is_float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
