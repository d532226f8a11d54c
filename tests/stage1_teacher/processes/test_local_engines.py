"""Engines of one machine in processes of their own: the dump is that of one engine, whichever of them dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.loading import load_recipe
from pipeline.runtime import log
from pipeline.runtime.child_processes import child_environment, descendants
from schemas.manifest import Manifest
from schemas.storage.atomic import writer_name
from stage1_teacher.coordination.retry import EngineError
from stage1_teacher.coordination.shard_work import ShardProgress
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.processes import child as child_module
from stage1_teacher.processes.local_engines import LocalEngines, machine_engines
from stage1_teacher.processes.shard_queue import ShardQueue
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe

ROOT = Path(__file__).resolve().parents[3]


def dump_with_two(recipe: Path, *overrides: str) -> Path:
    """Do what `bld teacher RECIPE -o placement.engines=2` does, in this process; return the dump's folder."""
    run_teacher(load_recipe(recipe, ["placement.engines=2", *overrides]), connect=machine_engines)
    return recipe.parent / "dump"


@pytest.fixture
def broken_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what replaces engine 1's process by Python code of a test; engine 2 is a real one."""

    def set_code(code: str) -> None:
        environment = child_module._environment
        real = child_module._COMMAND[-1]
        command = (*child_module._COMMAND[:-1], f"import os\nif os.environ['NUMBER'] == '1':\n {code}\n{real}")
        monkeypatch.setattr(child_module, "_COMMAND", command)
        monkeypatch.setattr(
            child_module, "_environment", lambda number, *rest: environment(number, *rest) | {"NUMBER": str(number)}
        )

    return set_code


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_two_engines_of_which_one_is_killed_amid_a_shard_make_the_dump_of_one_and_end(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    collect = LocalEngines._collect

    def troubled(engines: LocalEngines, queue: ShardQueue | None) -> Iterator[ShardProgress]:
        working = [child for child in engines._children if child.ready and child.attempts]
        if working and not killed:
            killed.append(working[0].number)
            shard = next(iter(working[0].attempts)).shard.plan.path(tmp_path / "dump")
            writer = writer_name().removesuffix(str(os.getpid())) + str(working[0].pid)
            shard.with_suffix(f".{writer}.partial").write_bytes(b"half")  # what a kill within a write leaves
            os.kill(working[0].pid, signal.SIGKILL)
        yield from collect(engines, queue)

    monkeypatch.setattr(LocalEngines, "_collect", troubled)
    folder = dump_with_two(write_recipe(tmp_path, model, TEXTS[:12]))
    assert content(folder) == content(whole) and verify_dump(folder) == [] and partials(folder) == []
    said = capsys.readouterr().err
    assert f"engine {killed[0]} is lost: killed by SIGKILL; it is started again" in said
    assert "2 engines\n" in said and said.count("complete;") == 1
    assert not [process for process in descendants(os.getpid()) if "engine_process" in cmdline(process)]


def test_a_killed_writer_of_one_engine_costs_the_dump_nothing(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    collect = LocalEngines._collect

    def troubled(engines: LocalEngines, queue: ShardQueue | None) -> Iterator[ShardProgress]:
        writers = [child for child in descendants(os.getpid()) if "spawn_main" in cmdline(child)]
        if writers and not killed:  # it starts with its first shard, and takes a second to import what it needs
            killed.append(writers[0].pid)
            os.kill(writers[0].pid, signal.SIGKILL)
        yield from collect(engines, queue)

    monkeypatch.setattr(LocalEngines, "_collect", troubled)
    folder = dump_with_two(write_recipe(tmp_path, model, TEXTS[:12]), "placement.writers=1")
    assert content(folder) == content(whole) and partials(folder) == []
    said = capfd.readouterr().err
    assert killed and "a process that wrote shard" in said and "another one writes it again" in said
    assert "is lost" not in said


def test_an_engine_that_fails_to_start_is_named_with_its_last_lines_and_the_other_makes_the_dump(
    tmp_path: Path, model: Path, whole: Path, capfd: pytest.CaptureFixture[str], broken_engine: Callable[[str], None]
) -> None:
    broken_engine("raise SystemExit('no device of that name')")
    folder = dump_with_two(write_recipe(tmp_path, model, TEXTS[:12]))
    assert content(folder) == content(whole)
    said = capfd.readouterr().err
    assert "engine 1 failed to start: exit code 1; 1 engine left; its last lines:\nno device of that name" in said


def test_a_dump_whose_engines_all_fail_to_start_ends_with_the_last_error(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    with pytest.raises(EngineError, match=r"no engine is left; the last error: engine . failed to start: exit code 7"):
        dump_with_two(write_recipe(tmp_path, model, TEXTS[:12]))


def test_an_error_that_every_engine_would_meet_ends_the_dump_in_its_words(
    tmp_path: Path, model: Path, broken_engine: Callable[[str], None]
) -> None:
    broken_engine(
        "from stage1_teacher.dump import job\n"
        " def broken(recipe): raise ValueError("
        "'this tokenizer has no seventh gear')\n job.load_tokenizer = broken"
    )
    with pytest.raises(ValueError, match="this tokenizer has no seventh gear"):
        dump_with_two(write_recipe(tmp_path, model, TEXTS[:12]))


# A shell lets its background jobs ignore Ctrl-C.
NOT_IN_BACKGROUND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def begun(recipe: Path) -> "subprocess.Popen[str]":
    """Start a dump with two engines as an operator does, and wait until some shards are made."""
    shards = recipe.parent / "dump" / "shards"
    command = [sys.executable, "-P", "-m", "pipeline", "teacher", str(recipe), "-o", "placement.engines=2"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", NOT_IN_BACKGROUND, *command],
        cwd=recipe.parent,
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300  # of a machine that does much else
    while len(list(shards.rglob("*.parquet"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_dump_ends_its_engines_and_is_resumed(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS * 2)
    process = begun(recipe)
    engines = [child for child in descendants(process.pid) if "engine_process" in cmdline(child)]
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130}.get(number, -number), said
    assert len(engines) == 2
    gone, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive and len(gone) == 2
    folder = tmp_path / "dump"
    made = len(list((folder / "shards").rglob("*.parquet")))
    assert 0 < made < len(Manifest.load(folder).shards) and not (folder / "summary.json").exists()
    if number != signal.SIGKILL:
        assert "complete and kept" in said and partials(folder) == []
    dump(recipe)
    assert verify_dump(folder) == [] and partials(folder) == []


def test_the_environment_of_an_engine_has_its_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    monkeypatch.setenv(log.COMMAND, "teacher")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(child_module, "num_cores", lambda: 16)
    environment = child_module._environment(2, ("GPU-bb",), 2)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-bb" and environment["OMP_NUM_THREADS"] == "8"
    assert environment[log.COMMAND] == "teacher engine 2" and environment["PYTHONSAFEPATH"] == "1"
    assert child_module._environment(1, (), 2)["CUDA_VISIBLE_DEVICES"] == "GPU-aa,GPU-bb"  # of a server: untouched
