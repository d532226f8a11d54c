"""Windows that fill `teacher.max_tokens`, and default windows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config import Recipe, TeacherConfig
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Document
from schemas.manifest import Manifest
from stage1_teacher.coordination.retry import retry_with_restart
from stage1_teacher.dump import audit
from stage1_teacher.engines.base import ListingEngine
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.inputs.fit_windows import with_fitting_windows
from stage1_teacher.reduction.types import RowsAlong
from stage1_teacher.targets.engine_output import BranchedOutput
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import dump, write_recipe
from tests.support.tiny import tiny_tokenizer

FULL = b"z" * 62 + b"the"  # 63 tokens and the start; any other way to spell its end has more
ALL = {"beam_width": 100, "branch_threshold": 0, "rejoin_after_tokens": None}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with a learned row for each of 64 positions."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), tiny_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=268, eos_token_id=268, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spellings(text: bytes, token_bytes: Sequence[bytes | None]) -> list[list[int]]:
    """Return every way to spell a text in tokens."""
    if not text:
        return [[]]
    begun = [(token, spelled) for token, spelled in enumerate(token_bytes) if spelled and text.startswith(spelled)]
    return [[token, *rest] for token, spelled in begun for rest in spellings(text[len(spelled) :], token_bytes)]


def opened(folder: Path, model: Path, engine: str) -> Teacher:
    recipe = load_recipe(write_recipe(folder, model, ["unused"], covering=ALL), [f"teacher.engine={engine}"])
    return open_teacher(recipe, *load_tokenizer(recipe))


def test_branches_beyond_the_models_positions_are_dropped_and_counted(tmp_path: Path, gpt2: Path) -> None:
    teacher = opened(tmp_path, gpt2, "transformers")
    [window] = cut_document(Document("full", FULL, None), teacher.tokenizer, 64, 8)
    assert len(teacher.prompt(window)) == 64
    [targets] = teacher.targets([window], teacher.run_engine([window]))
    np.testing.assert_allclose(targets.probs_PV.sum(axis=1), 1)
    # Paths that end in `t` or `th` have 64 tokens; those in `t h` and `th e`, which start at the last two offsets, have
    # no room.
    assert (targets.dropped_P[:-2] < 1e-9).all() and (targets.dropped_P[-2:] > 1e-6).all()


def test_vllm_branches_and_audits_a_window_that_fills_max_tokens_and_refuses_a_longer_prompt_in_words(
    tmp_path: Path, model: Path
) -> None:
    teacher = opened(tmp_path, model, "vllm")
    [window] = cut_document(Document("full", FULL, None), teacher.tokenizer, 64, 8)
    output = teacher.run_engine([window])
    [targets] = teacher.targets([window], output)
    assert targets.dropped_P.max() < 1e-6  # the engine has room for all that spell the end in more tokens
    # All other ways to spell `the`, up to each of its bytes; a row's path is computed from where it leaves the prompt.
    paths = [path for end in (63, 64, 65) for path in spellings(FULL[62:end], teacher.tokenizer.token_bytes)]
    off_prompt = [path for path in paths if path != window.tokens[-1:]]
    assert isinstance(output, BranchedOutput)
    assert output.branchings[0].num_branch_rows == len(off_prompt) >= 5
    assert output.num_tokens == 64 + sum(map(len, off_prompt))
    other = opened(tmp_path / "other", model, "transformers")
    [expected] = other.targets([window], other.run_engine([window]))
    np.testing.assert_allclose(targets.probs_PV, expected.probs_PV, rtol=0, atol=1e-5)
    reference = audit.compute_reference(teacher, window)
    assert reference.fault is None and reference.probs_PV is not None and len(reference.probs_PV) == len(FULL)
    engine = before = teacher.engine
    assert not isinstance(engine, ListingEngine)
    row = RowsAlong(1, b"", np.zeros(1, dtype=np.int64), np.full(1, -1, dtype=np.int64))
    with pytest.raises(ValueError, match=r"refuses prompts of 3 to 200 tokens: .*maximum context length"):
        retry_with_restart(teacher, lambda: engine.reduced_rows([[1, 2, 3], [1] * 200], [[row], [row]]), 3)
    assert teacher.engine is before  # it was not started again
    [[again], [more]] = engine.reduced_rows([[1, 2], [5, 6, 7, 8]], [[row], [row._replace(first=3)]])
    assert (len(again), len(more)) == (1, 1)
    teacher.engine.close()


def test_windows_that_a_recipe_does_not_give_fit_the_model_and_are_said(
    tmp_path: Path, gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, gpt2, ["the thing " * 40, "banding"])
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("  max_tokens: 64\n", "").replace("  overlap_tokens: 8\n", ""), encoding="utf-8")
    folder = dump(path)
    said = capsys.readouterr()
    assert (
        "teacher.max_tokens is 64, as the model has 64 positions; teacher.overlap_tokens is 32" in said.out + said.err
    )
    identity = Manifest.load(folder).identity["teacher"]
    assert (identity["max_tokens"], identity["overlap_tokens"]) == (64, 32)
    assert verify_dump(folder) == []
    dump(path)  # and is the same dump the next time
    with pytest.raises(ValueError, match=r"teacher.max_tokens is 65, and the model \(gpt2\) has 64 positions"):
        dump(path, "teacher.max_tokens=65")
    with pytest.raises(ValueError, match=r"overlap_tokens \(40\) must be at most half"):
        dump(path, "teacher.overlap_tokens=40")


def test_the_overlap_that_a_recipe_does_not_give_is_half_of_a_short_window() -> None:
    values = json.loads(TeacherConfig(model="m", max_tokens=256).model_dump_json())
    assert values["overlap_tokens"] == 128
    assert [TeacherConfig(model="m", max_tokens=n).overlap_tokens for n in (8, 512, 513, 4096)] == [4, 256, 256, 256]
    assert TeacherConfig(model="m").overlap_tokens == 256
    with pytest.raises(ValueError, match="must be at most half"):
        TeacherConfig(model="m", max_tokens=256, overlap_tokens=256)


def test_a_server_that_is_started_with_another_length_leaves_a_begun_dumps_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "corpus": {"source": "c.jsonl"},
        "teacher": {"model": "m", "engine": "openai"},
        "placement": {"base_url": "http://127.0.0.1:1/v1"},
        "dump": {"path": str(tmp_path)},
    }
    for longest in (1023, 4095):
        monkeypatch.setattr("stage1_teacher.engines.openai_server.longest_window", lambda *_, longest=longest: longest)
        fitted = with_fitting_windows(Recipe.model_validate(values), "m")
        assert fitted.teacher.max_tokens == 1023
        Manifest(identity={"teacher": {"max_tokens": 1023}}, corpus_counts={}, shards=()).save(tmp_path)


def test_a_server_of_windows_too_short_to_read_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "corpus": {"source": "c.jsonl"},
        "teacher": {"model": "m", "engine": "openai"},
        "placement": {"base_url": "http://127.0.0.1:1/v1"},
        "dump": {"path": str(tmp_path)},
    }
    monkeypatch.setattr("stage1_teacher.engines.openai_server.longest_window", lambda *_: 7)
    with pytest.raises(ValueError, match=r"^m: the server accepts 7; a window takes at least 8 tokens"):
        with_fitting_windows(Recipe.model_validate(values), "m")
