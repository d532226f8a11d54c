"""An engine that was opened is closed, whatever happens after."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest
from stage1_teacher.calibration import calibrate
from stage1_teacher.dump import job
from stage1_teacher.dump.begun import as_dumped
from stage1_teacher.ray import actor
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher
from stage1_teacher.verification import verify_teacher
from tests.stage1_teacher.dump.test_run import TEXTS, write_recipe


class FailedError(Exception):
    """A failure after the start."""


class Opened:
    """A teacher that can only be closed."""

    def __init__(self) -> None:
        self.engine, self.num_closed = self, 0

    def close(self) -> None:
        self.num_closed += 1

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fail(*_: Any, **__: Any) -> Any:
    raise FailedError


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    teacher = Opened()
    for module in (calibrate, verify_teacher, job):
        monkeypatch.setattr(module, "open_teacher", lambda *_, **__: teacher)
    return teacher


def test_a_calibration_that_fails_closes_the_engine(
    opened: Opened, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "dump_first", fail)
    with pytest.raises(FailedError):
        calibrate.calibrate(load_recipe(write_recipe(tmp_path, model, TEXTS)), 0.1)
    assert opened.num_closed == 1


def test_a_verification_that_fails_closes_the_engine(
    opened: Opened, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_teacher, "recompute", fail)
    with pytest.raises(FailedError):
        verify_teacher.verify_teacher(copy, Manifest.load(copy), 1)
    assert opened.num_closed == 1


def test_an_engine_of_a_cluster_that_may_not_go_on_with_the_dump_is_closed(
    opened: Opened, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "check_resumed", fail)
    manifest = Manifest.load(copy)
    recipe = as_dumped(load_recipe(copy / "recipe.yaml", [f"dump.path={copy}"]), copy, manifest)
    task = job.DumpTask(recipe, manifest.identity, (), frozenset())
    engine = actor.ClusterEngine()
    with pytest.raises(FailedError):
        engine.open(actor.ClusterTask(task, str(Path.cwd()), actor.code_sha256(), False))
    assert opened.num_closed == 1


def test_a_teacher_that_could_not_be_started_again_closes_in_silence(tmp_path: Path, model: Path) -> None:
    """The error of the failed start is the one reported."""
    recipe = load_recipe(write_recipe(tmp_path, model, TEXTS[:2]))
    with pytest.raises(FailedError), open_teacher(recipe, *load_tokenizer(recipe)) as teacher:
        assert isinstance(teacher, Teacher)
        teacher._reopen = fail
        teacher.restart()
