"""Engines that break while a dump is made, and engines of another version."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from pipeline.covering.covering import ReducedRow
from schemas.manifest import Manifest
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.engines import huggingface
from stage1_teacher.engines.huggingface import TransformersEngine
from stage1_teacher.targets import opening
from stage1_teacher.verification.verify import verify_dump
from tests.scenarios.test_durability import parts
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe


def test_another_engine_is_refused_or_accepted_by_name_and_recorded(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    shutil.copytree(whole, tmp_path / "dump")
    began = f"transformers-{transformers.__version__}"
    parts(tmp_path / "dump")[2].unlink()
    pretend_version(monkeypatch, "99.0")
    with pytest.raises(ValueError, match=r"teacher.engine: .*--accept-engine transformers-99.0"):
        dump(recipe)
    with pytest.raises(ValueError, match=r"the engine here is transformers-99.0"):
        dump(recipe, accept_engine="transformers-98.0")
    with pytest.raises(ValueError, match=r"sparsity.top_k"):  # it excuses the engine alone
        dump(recipe, "dump.top_k=3", accept_engine="transformers-99.0")
    dump(recipe, accept_engine="transformers-99.0")
    dump(recipe)  # once is enough
    assert Manifest.load(tmp_path / "dump").accepted_engines == ("transformers-99.0",)
    summary = json.loads((tmp_path / "dump" / "summary.json").read_text(encoding="utf-8"))
    assert summary["shards_by_engine"] == {began: len(parts(whole)) - 1, "transformers-99.0": 1}
    assert verify_dump(tmp_path / "dump") == []


def pretend_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Give transformers another version, in both modules: it replaces its own while it is imported."""
    for module in {id(m): m for m in (sys.modules["transformers"], huggingface.transformers)}.values():
        monkeypatch.setattr(module, "__version__", version)


def failing_engine(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """Make an engine fail in those of its calls; afterwards it can neither be used nor closed.

    Returns the numbers of the calls made.
    """
    calls: list[int] = []
    broken: list[TransformersEngine] = []
    ask, close = TransformersEngine.reduced_rows, TransformersEngine.close

    def reduced_rows(self: TransformersEngine, *asked: Any) -> list[list[list[ReducedRow]]]:
        calls.append(len(calls))
        if fails(calls[-1]):
            broken.append(self)
        if self in broken:
            raise RuntimeError("engine core died")
        return ask(self, *asked)

    def close_it(self: TransformersEngine) -> None:
        if self in broken:
            raise RuntimeError("it is dead")
        close(self)

    monkeypatch.setattr(opening, "check_engine", lambda *_: None)  # its calls are not those of the dump
    monkeypatch.setattr(TransformersEngine, "reduced_rows", reduced_rows)
    monkeypatch.setattr(TransformersEngine, "close", close_it)
    return calls


def test_an_engine_that_crashes_in_a_batch_is_restarted_and_nothing_is_lost(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    failing_engine(monkeypatch, {1, 4, 5}.__contains__)  # once, and twice in a row
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole)
    said = capsys.readouterr().err
    assert said.count("engine failed: RuntimeError: engine core died; restarting it") == 3
    assert said.count("closing the failed engine: RuntimeError: it is dead") == 3


def test_an_engine_that_fails_again_and_again_stops_the_dump_with_the_cause(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing_engine(monkeypatch, lambda call: True)
    with pytest.raises(EngineError, match=r"failed 3 times in a row .*RuntimeError: engine core died") as stop:
        dump(write_recipe(tmp_path, model, TEXTS[:3]))
    assert isinstance(stop.value.__cause__, RuntimeError) and len(calls) == 3
