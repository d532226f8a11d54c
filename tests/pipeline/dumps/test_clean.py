"""`bld clean`: what it lists, what it removes, and what it leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dumps.clean import clean
from schemas.storage.atomic import writer_name
from tests.support.readable_dumps import make_dump

HOST = writer_name().rpartition("-")[0]


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "files" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "files" / "abc" / "weights").write_bytes(b"x" * 2048)
    dump = make_dump(tmp_path / "dump")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (dump / "shards" / f"part-00007.{HOST}-{gone.pid}.partial").write_bytes(b"x" * 100)
    (dump / "shards" / f"part-00008.{writer_name()}.partial").write_bytes(b"x" * 100)
    (dump / "odd.partial").write_bytes(b"x")
    return dump


def test_without_yes_everything_stays_and_is_listed_with_its_size(
    dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(dump.parent.rglob("*"))
    clean([dump], cache=True, yes=False)
    said = capsys.readouterr().out
    assert sorted(dump.parent.rglob("*")) == before
    assert "100 B" in said and "2.0 KiB" in said and "odd.partial" in said and "--yes removes them" in said
    assert f"kept: process {os.getpid()} is writing it" in said


def test_yes_removes_what_is_dead_and_nothing_else(dump: Path) -> None:
    kept = {path for path in dump.rglob("*") if path.suffix != ".partial" or str(os.getpid()) in path.name}
    clean([dump], cache=False, yes=True)
    assert set(dump.rglob("*")) == kept
    assert (dump.parent / "cache" / "files" / "abc" / "weights").exists()
    clean([dump], cache=True, yes=True)
    assert not (dump.parent / "cache" / "files" / "abc").exists() and set(dump.rglob("*")) == kept


def test_a_folder_that_is_no_dump_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not a dump"):
        clean([tmp_path], cache=False, yes=True)
    assert (tmp_path / "a.partial").exists()
