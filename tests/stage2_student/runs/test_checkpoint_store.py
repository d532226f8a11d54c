"""Copies of checkpoints in a store: complete or absent there, kept as in the run's folder, and resumed from."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import Recipe, TrainConfig
from schemas.storage import copies
from schemas.storage.locations import location, names_below
from stage2_student.runs import checkpoint_store, retention
from stage2_student.runs.checkpoint_files import find_damage
from stage2_student.runs.checkpoint_store import CheckpointCopies, fetch, stored_steps
from stage2_student.runs.checkpoints import checkpoint_name, checkpoint_steps, commit_checkpoint
from tests.support.object_store import ObjectStore, cut_off
from tests.support.small_dumps import make_recipe

ROOT = Path(__file__).parents[3]
Place = Callable[[str], str]


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Return the address of a new folder: on another disk, or in a store."""
    if request.param == "file":
        return lambda name: f"file://{tmp_path}/disk/{name}"
    request.getfixturevalue("store")
    return lambda name: f"s3://bucket/{tmp_path.name}/{name}"


def checkpoint(run: Path, step: int, bits: float | None = None) -> None:
    """Make a checkpoint as a run does."""
    partial = f"{checkpoint_name(step)}.partial"
    (run / "checkpoints" / partial).mkdir(parents=True)
    (run / "identity.json").write_text('{"train": {"seed": 3}}')
    torch.save({"step": step}, run / "checkpoints" / partial / "mp_rank_00_model_states.pt")
    if bits is not None:
        retention.record(run, partial, retention.Evaluation(bits, "text"))
    commit_checkpoint(run, partial, step, 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def recipe(run: Path, address: str) -> Recipe:
    return make_recipe(run, run, run, {"checkpoints": address})


def content(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / checkpoint_name(step)).iterdir()}


def test_an_empty_folder_gets_the_newest_and_the_best_and_retention_is_that_of_the_run(
    tmp_path: Path, place: Place
) -> None:
    run, address = tmp_path / "run", place("runs/a b")
    with CheckpointCopies(run, address, keep_last=2) as made:
        for step, bits in ((1, 2.0), (2, 1.5), (3, 1.8), (4, 1.9), (5, 1.7)):
            checkpoint(run, step, bits)
            made.add(step)
            retention.prune(run, 2)
    assert stored_steps(location(address)) == checkpoint_steps(run) == [2, 4, 5]
    assert {name.partition("/")[0] for name in names_below(location(address)) if "/" in name} == {
        f"step-{step:06d}" for step in (2, 4, 5)
    }
    empty = tmp_path / "empty"
    assert fetch(recipe(empty, address)) == f"fetched step-000005 from {address}"
    assert checkpoint_steps(empty) == [2, 5] and retention.best_step(empty) == 2
    for step in (2, 5):
        assert content(empty, step) == content(run, step)
        assert find_damage(empty / "checkpoints" / checkpoint_name(step)) is None
    for name in ("identity.json", "metrics.jsonl"):
        assert (empty / name).read_bytes() == (run / name).read_bytes()
    assert (empty / "checkpoints" / "latest").read_text() == "step-000005"
    assert fetch(recipe(empty, address)) is None and fetch(recipe(run, address)) is None
    checkpoint(run, 6)
    with CheckpointCopies(run, address, keep_last=0) as made:
        made.add(6)
    assert (
        fetch(recipe(empty, address)) == f"fetched step-000006 from {address}"
    )  # the one on the other machine is newer
    assert checkpoint_steps(empty) == [2, 5, 6]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_copy_that_ends_anywhere_leaves_no_checkpoint_that_is_taken_for_a_whole_one(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """However many files arrive, also where the same step was copied before."""
    run, address = tmp_path / "run", place("killed")
    with CheckpointCopies(run, address, keep_last=3) as made:
        for step in (1, 2):
            checkpoint(run, step)
            made.add(step)
    (run / "checkpoints" / "step-000002").rename(tmp_path / "earlier")
    checkpoint(run, 2, bits=1.0)  # again, after a resume from step 1
    arrived: list[Path] = []

    def upload(local: Path, path: object) -> None:
        if len(arrived) == after:
            raise OSError("the network is gone")
        arrived.append(local)
        copies.copy_to(local, path)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_store, "copy_to", upload)
    with pytest.raises(OSError, match="the network is gone"), CheckpointCopies(run, address, keep_last=3) as made:
        made.add(2)
    monkeypatch.undo()
    assert stored_steps(location(address)) == [1]
    assert fetch(recipe(tmp_path / "empty", address)) == f"fetched step-000001 from {address}"
    checkpoint(run, 3)
    with CheckpointCopies(run, address, keep_last=3) as made:
        made.add(3)
    assert stored_steps(location(address)) == [1, 3]
    assert not [name for name in names_below(location(address)) if name.startswith("step-000002")]  # is cleared away


def test_a_process_killed_in_the_middle_of_an_upload_leaves_the_checkpoint_before_it(
    store: ObjectStore, tmp_path: Path
) -> None:
    run, address = tmp_path / "run", "s3://bucket/cut"
    checkpoint(run, 1)
    with CheckpointCopies(run, address, keep_last=3) as made:
        made.add(1)
    checkpoint(run, 2)
    code = (
        "from pathlib import Path; from stage2_student.runs.checkpoint_store import CheckpointCopies\n"
        f"with CheckpointCopies(Path({str(run)!r}), {address!r}, 3) as made: made.add(2)"
    )
    head = b"PUT /bucket/cut/step-000002/mp_rank_00_model_states.pt"
    with cut_off(store, head, after_bytes=600) as (environment, reached):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment)
        assert reached.wait(300)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert stored_steps(location(address)) == [1]
    assert fetch(recipe(tmp_path / "empty", address)) == f"fetched step-000001 from {address}"


def test_a_damaged_copy_is_passed_over_for_the_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, address = tmp_path / "run", f"file://{tmp_path}/disk"
    with CheckpointCopies(run, address, keep_last=3) as made:
        for step in (1, 2):
            checkpoint(run, step)
            made.add(step)
    states = tmp_path / "disk" / "step-000002" / "mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:-9])
    assert fetch(recipe(tmp_path / "empty", address)) == f"fetched step-000001 from {address}"
    assert "step-000002 cannot be loaded (mp_rank_00_model_states.pt has" in capsys.readouterr().err
    (tmp_path / "disk" / "step-000001" / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no checkpoint that can be loaded: step-000002 \(.*step-000001 \("):
        fetch(recipe(tmp_path / "other", address))


def test_the_checkpoints_of_another_run_are_refused_by_name(tmp_path: Path) -> None:
    run, address = tmp_path / "run", f"file://{tmp_path}/disk"
    checkpoint(run, 2)
    with CheckpointCopies(run, address, keep_last=3) as made:
        made.add(2)
    other = tmp_path / "other"
    checkpoint(other, 1)
    (other / "identity.json").write_text('{"train": {"seed": 4}}')
    with pytest.raises(ValueError, match=r"other holds checkpoints of another run than file://.*train\.checkpoints"):
        fetch(recipe(other, address))
    assert fetch(make_recipe(other, other, other, {})) is None


def test_an_address_is_checked_with_the_recipe() -> None:
    with pytest.raises(ValueError, match="no user, password"):
        TrainConfig(checkpoints="s3://key:secret@bucket/runs")
