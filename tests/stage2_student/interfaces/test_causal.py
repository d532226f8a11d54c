"""The causal interface: packed and parallel, against one byte at a time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import END
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate, empty_micro_batch
from stage2_student.data.spans import token_spans
from stage2_student.interfaces import StudentShape
from stage2_student.interfaces.causal import FIRST, CausalInterface
from stage2_student.model.initial_student import load_start
from stage2_student.model.student import Student
from tests.support.small_dumps import make_record
from tests.support.tiny import tiny_model

MASKS = Masks(1.0, 0.05)
SHAPE = StudentShape(hidden_size=16, head_rows=300, token_bytes=(), prefix=b"", end_ids=(0,))


def make_batch(*texts: list[bytes]) -> MicroBatch:
    """Make a micro-batch of documents given by their tokens."""
    examples = []
    for tokens in texts:
        document = b"".join(tokens)
        spans = token_spans(tokens, document)
        starts, ends = (np.array([getattr(s, name) for s in spans]) for name in ("start", "stop"))
        record = make_record("d", document, np.random.default_rng(0))
        examples.append(make_example(Encoded(record, np.arange(len(tokens)), starts, ends), 0, 0, None, MASKS))
    return collate(examples)


def random_interface(seed: int = 0) -> CausalInterface:
    torch.manual_seed(seed)
    interface = CausalInterface(SHAPE, byte_width=8)
    torch.nn.init.normal_(interface.symbols.weight)
    return interface


def one_by_one(interface: CausalInterface, hidden_BLD: Tensor, batch: MicroBatch) -> Tensor:
    """Compute the same in a Python loop: the decoder's equations, a byte at a time."""
    gru, rows = interface.decoder, []
    for state, offset, symbol in zip(batch.state_P, batch.offset_P.tolist(), batch.symbols_P, strict=True):
        if offset == 0:
            memory, before = torch.tanh(interface.start(hidden_BLD.flatten(0, 1)[state])), torch.tensor(FIRST)
        x = gru.weight_ih_l0 @ interface.before(before) + gru.bias_ih_l0
        h = gru.weight_hh_l0 @ memory + gru.bias_hh_l0
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3), h.chunk(3)
        update, new = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        memory, before = (1 - update) * new + update * memory, symbol
        rows.append(interface.symbols(memory))
    return torch.stack(rows)


TEXTS = ([b"a", b" caf\xc3", b"\xa9!", b" " * 40], [b"thing", b"s"], [b"x" * 7])


def test_all_tokens_at_once_are_as_one_byte_after_another() -> None:
    batch, interface = make_batch(*TEXTS), random_interface()
    hidden_BLD = torch.randn(*batch.tokens_BL.shape, 16, requires_grad=True)
    ours, theirs = interface(hidden_BLD, batch, torch.nn.Identity()), one_by_one(interface, hidden_BLD, batch)
    assert ours.counted_P.all() and ours.logits_PV.dtype == torch.float32
    torch.testing.assert_close(ours.logits_PV, theirs, rtol=1e-4, atol=1e-4)
    leaves, weights_PV = [hidden_BLD, *interface.parameters()], torch.randn_like(theirs)
    for mine, twin in zip(
        torch.autograd.grad((ours.logits_PV * weights_PV).sum(), leaves),
        torch.autograd.grad((theirs * weights_PV).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, twin, rtol=1e-3, atol=1e-3)


def test_a_byte_is_seen_by_the_later_bytes_of_its_token_alone() -> None:
    batch, interface = make_batch(*TEXTS), random_interface()
    hidden_BLD = torch.randn(*batch.tokens_BL.shape, 16)
    plain_PV = interface(hidden_BLD, batch, torch.nn.Identity()).logits_PV
    run_P = (batch.offset_P == 0).cumsum(0)
    for position in range(len(run_P)):
        symbols_P = batch.symbols_P.clone()
        symbols_P[position] = (symbols_P[position] + 1) % 256
        other_PV = interface(hidden_BLD, replace(batch, symbols_P=symbols_P), torch.nn.Identity()).logits_PV
        later_P = (run_P == run_P[position]) & (batch.offset_P > batch.offset_P[position])
        assert ((plain_PV != other_PV).any(-1) == later_P).all()


def test_a_state_is_seen_by_its_own_token_alone() -> None:
    batch, interface = make_batch(*TEXTS), random_interface()
    hidden_BLD = torch.randn(*batch.tokens_BL.shape, 16)
    plain_PV = interface(hidden_BLD, batch, torch.nn.Identity()).logits_PV
    for state in range(hidden_BLD.shape[0] * hidden_BLD.shape[1]):
        changed_BLD = hidden_BLD.clone()
        changed_BLD.flatten(0, 1)[state] += 1
        other_PV = interface(changed_BLD, batch, torch.nn.Identity()).logits_PV
        assert ((plain_PV != other_PV).any(-1) == (batch.state_P == state)).all()


def test_a_long_token_is_supervised_to_its_end() -> None:
    batch = make_batch([b" " * 40, b"-" * 200])
    assert batch.offset_P.tolist() == [*range(40), *range(200), 0] and batch.symbols_P[-1] == END
    logits_PV = random_interface()(torch.randn(1, 3, 16), batch, torch.nn.Identity()).logits_PV
    assert logits_PV.shape == (241, 256) and torch.isfinite(logits_PV).all()


def test_the_first_step_passes_no_gradient_to_the_states() -> None:
    batch, interface = make_batch(*TEXTS), CausalInterface(SHAPE)
    hidden_BLD = torch.randn(*batch.tokens_BL.shape, 16, requires_grad=True)
    logits_PV = interface(hidden_BLD, batch, torch.nn.Identity()).logits_PV
    torch.nn.functional.cross_entropy(logits_PV, batch.symbols_P).backward()
    assert not logits_PV.any() and interface.symbols.weight.grad is not None and interface.symbols.weight.grad.any()
    assert hidden_BLD.grad is not None and not hidden_BLD.grad.any()


def test_a_rank_without_documents_calls_every_module() -> None:
    interface = random_interface()
    logits_PV = interface(torch.randn(1, 1, 16), empty_micro_batch(0), torch.nn.Identity()).logits_PV
    assert logits_PV.shape == (0, 256)
    logits_PV.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in interface.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_of_bytes_learns_by_it_and_warms_it_up_alone(dtype: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", merges=[])
    tokenizer = ByteTokenizer.load(str(model))
    document = "the café".encode()
    [encoded] = encode_records([make_record("d", document, np.random.default_rng(0))], tokenizer, 64)
    assert isinstance(encoded, Encoded) and (encoded.ends - encoded.starts == 1).all()
    batch = collate([make_example(encoded, 256, 256, None, MASKS)])
    assert batch.offset_P.tolist() == [0] * 10
    shape = StudentShape(64, 257, tokenizer.token_bytes, b"", (256,))
    config = TrainConfig.model_validate({"dtype": dtype, "objectives": {"ce": 0, "byte_ce": 1, "kl": 1}})
    student = Student(load_start(model, False), CausalInterface(shape), config)
    torch.nn.init.normal_(student.interface.symbols.weight)  # type: ignore[union-attr, arg-type]
    nats, _ = student(batch, True)
    nats.backward()
    assert all((p.grad is not None) == name.startswith("interface.") for name, p in student.named_parameters())
    nats, _ = student(batch)
    nats.backward()
    assert student.lm.model.embed_tokens.weight.grad.any()
