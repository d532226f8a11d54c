"""Ends of commands: exit codes, and what is left if SIGINT or SIGTERM interrupts a write."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.dumps.clean import dump_leftovers
from pipeline.runtime.termination import Terminated, terminable
from schemas.storage.atomic import committed, committed_folder
from stage1_teacher.dump.merge import merge_dumps
from tests.pipeline.cli.test_app import ROOT, run_main
from tests.support.readable_dumps import make_dump

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# What each long command does after it has read its options.
LONG = {
    ("eval", "a/model", "--corpus", "b.txt"): "pipeline.evaluation.request.custom_corpus",
    ("push", "a", "b/c"): "pipeline.dumps.hub.push",
    ("pull", "b/c", "a"): "pipeline.dumps.hub.pull",
    ("merge", "a", "b", "c"): "stage1_teacher.dump.merge.merge_dumps",
    ("verify", "a"): "stage1_teacher.verification.verify.verify_dump",
    ("inspect", "a"): "pipeline.dumps.terminal.show",
    ("report", "a"): "pipeline.reports.page.write_report",
    ("export", "a"): "stage2_student.runs.export.export",
    ("plan", "demo", "--calibrate"): "stage1_teacher.calibration.calibrate.calibrate",
    ("teacher", "demo"): "stage1_teacher.dump.run.run_teacher",
}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Restore the default SIGINT handler: a shell starts background processes with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def struck(number: signal.Signals) -> Callable[..., None]:
    """Return a function during which this process receives a signal."""

    def work(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)  # it is not reached: the signal comes first
        raise AssertionError("the signal did nothing")

    return work


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("command", LONG, ids=lambda command: command[0])
def test_a_signal_ends_every_long_command_with_its_code_and_says_how_to_go_on(
    command: tuple[str, ...],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(LONG[command], struck(number))
    assert run_main(monkeypatch, *command) == CODES[number]
    assert "same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", CODES)
def test_what_is_being_written_is_gone_and_what_was_there_stays(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from pipeline.runtime.termination import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from schemas.storage.atomic import committed; from schemas.storage.atomic import committed_folder\n"
        "with terminable(), committed(Path('page.html')) as page, committed_folder(Path('export')) as export:\n"
        "    page.write_text('half'); export.mkdir(); (export / 'model').write_text('half')\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    (tmp_path / "page.html").write_text("whole", encoding="utf-8")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model").write_text("whole", encoding="utf-8")
    writer = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    writer.send_signal(number)
    assert writer.wait() != 0
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert files == ["export", "export/model", "page.html"]
    assert {(tmp_path / name).read_text(encoding="utf-8") for name in files[1:]} == {"whole"}


def test_folders_and_files_are_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with committed(tmp_path / "file") as file, committed_folder(tmp_path / "folder") as folder:
            file.write_text(text, encoding="utf-8")
            folder.mkdir()
            (folder / text).write_text(text, encoding="utf-8")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "two"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]


def test_a_merge_that_is_cut_off_while_it_copies_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = [make_dump(tmp_path / name) for name in ("a", "b")]

    def cut_off(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    def no_links(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("stage1_teacher.dump.merge.check_mergeable", lambda out, dumps, *_: mergeable(dumps))
    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    monkeypatch.setattr("shutil.copyfile", cut_off)
    with pytest.raises(KeyboardInterrupt):
        merge_dumps(tmp_path / "out", dumps)
    assert dump_leftovers(tmp_path / "out") == []


def mergeable(dumps: list[Path]) -> list[object]:
    from schemas.manifest import Manifest

    return [Manifest.load(dump) for dump in dumps]


@pytest.mark.parametrize("raised", [Terminated, KeyboardInterrupt])
def test_a_signal_that_compiled_code_made_a_system_error_of_is_still_that_signal(raised: type[BaseException]) -> None:
    with pytest.raises(raised), terminable():
        raise SystemError("<built-in method wait> returned a result with an exception set") from raised()
    with pytest.raises(SystemError), terminable():
        raise SystemError("of its own")
