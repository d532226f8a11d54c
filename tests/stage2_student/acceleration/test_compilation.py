"""A compiled student computes the losses and gradients of one that is not, in one graph for all shapes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.acceleration.compilation import check_compile, compile_trunk, without_compiling
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.model.initial_student import load_start
from stage2_student.model.student import Student
from tests.support.small_dumps import make_record, make_text
from tests.support.tiny import tiny_model

END_ID = 268


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def batches(model: Path) -> list[MicroBatch]:
    """Make batches of several shapes: rows of one document, one row, and documents packed into rows."""
    rng = np.random.default_rng(0)
    tokenizer = ByteTokenizer.load(str(model))
    found = []
    for sizes, rows in [((8, 5, 9), None), ((12, 3), None), ((30,), None), ((4, 6, 5, 7), [2, 2])]:
        records = [make_record(f"d{i}", make_text(rng, size), rng) for i, size in enumerate(sizes)]
        documents = [one for one in encode_records(records, tokenizer, 512) if isinstance(one, Encoded)]
        found.append(collate([make_example(one, END_ID, END_ID, None, Masks(1.0, 1.0)) for one in documents], rows))
    return found


def config(**train: object) -> TrainConfig:
    objectives = {"ce": 1.0, "byte_ce": 0.0, "kl": 0.0}
    return TrainConfig.model_validate({"dtype": "float32", "objectives": objectives, **train})


def computed(student: Student, batches: list[MicroBatch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield loss, gradient of the first block, and nats in evaluation, of each batch."""
    weight = student.lm.model.layers[0].mlp.up_proj.weight
    for batch in batches:
        weight.grad = None
        nats, _ = student.train()(batch)
        nats.backward()
        assert weight.grad is not None
        gradient = weight.grad.clone()
        with torch.no_grad():
            evaluated, _ = student.eval()(batch, tokens_alone=True)
        yield nats.detach(), gradient, evaluated


def both(model: Path, batches: list[MicroBatch], checkpointing: bool) -> dict[bool, list[tuple[Tensor, ...]]]:
    """Return what a student computes as it is (False) and compiled (True)."""
    found: dict[bool, list[tuple[Tensor, ...]]] = {}
    for compiled in (False, True):
        train = config(compile=compiled, gradient_checkpointing=checkpointing)
        lm = load_start(model, False)
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        names = list(lm.state_dict())
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        student = Student(lm, None, train)
        compile_trunk(lm, train)
        found[compiled] = list(computed(student, batches))
        assert bool(torch._dynamo.utils.counters["stats"]["calls_captured"]) is compiled
        assert list(lm.state_dict()) == names  # checkpoints hold the same weights
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_for_all_shapes_compute_what_the_model_as_it_is_does(
    checkpointing: bool, model: Path, batches: list[MicroBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs themselves, run without being turned into kernels: these take a compiler some seconds each."""
    made = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *arguments, **how: made(*arguments, backend="aot_eager", **how))
    found = both(model, batches, checkpointing)
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_kernels_compute_what_the_model_as_it_is_does(model: Path, batches: list[MicroBatch]) -> None:
    found = both(model, batches[:1], checkpointing=False)
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_text_that_grows_is_computed_without_compiling(model: Path) -> None:
    lm = load_start(model, False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_trunk(lm, config(compile=True))
    with without_compiling(), torch.no_grad():
        for length in (3, 4, 5):
            lm(input_ids=torch.arange(length)[None])
    assert not torch._dynamo.utils.counters["stats"]["calls_captured"]


def test_where_it_cannot_work_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train\.compile .*zero_stage 3 gathers block by block"):
        config(compile=True, deepspeed={"zero_stage": 3})
    check_compile(config(compile=True))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    check_compile(config())
    with pytest.raises(ValueError, match=r"train\.compile: true needs a C\+\+ compiler, and there is no g\+\+"):
        check_compile(config(compile=True))
    monkeypatch.setenv("CXX", "nowhere/c++")
    with pytest.raises(ValueError, match=r"no nowhere/c\+\+, which CXX names"):
        check_compile(config(compile=True))
