"""Files and folders appear whole or not at all, also with two writers, or if one is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.storage.atomic import committed, committed_folder, first_folder, is_left_over, writer_name


def test_of_two_that_commit_at_once_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "part.parquet"
    with committed(path, first=True) as late:
        late.write_text("late")
        with monkeypatch.context() as patch:
            patch.setattr("schemas.storage.atomic.writer_name", lambda: "other")
            with committed(path, first=True) as early:
                early.write_text("early")
        # A process that checks before it renames has checked before the other was done.
        monkeypatch.setattr(Path, "exists", lambda self, **_: False)
    monkeypatch.undo()
    assert path.read_text() == "early" and [p.name for p in tmp_path.iterdir()] == ["part.parquet"]


def test_the_first_commit_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    for text in ("one", "two"):
        with committed(tmp_path / "part", first=True) as partial:
            partial.write_text(text)
    assert (tmp_path / "part").read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize("at", ["sync_tree", "rename"])
def test_a_folder_that_cannot_be_replaced_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "export"
    with committed_folder(folder) as partial:
        partial.mkdir()
        (partial / "model").write_text("old")
    rename = Path.rename

    def failing(path: Path, *rest: Path) -> Path:
        if at == "sync_tree" or path.name == "export.partial":
            raise OSError("the disk is full")
        return rename(path, *rest)

    monkeypatch.setattr("schemas.storage.atomic.sync_tree", failing) if at == "sync_tree" else monkeypatch.setattr(
        Path, "rename", failing
    )
    with pytest.raises(OSError, match="the disk is full"), committed_folder(folder) as partial:
        partial.mkdir()
        (partial / "model").write_text("new")
    monkeypatch.undo()
    assert (folder / "model").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["export"]


def test_what_was_there_is_there_until_the_new_folder_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "model").write_text("old")
    seen = []
    monkeypatch.setattr("schemas.storage.atomic.sync_tree", lambda _: seen.append((folder / "model").read_text()))
    with committed_folder(folder) as partial:
        partial.mkdir()
        (partial / "model").write_text("new")
    assert (
        seen == ["old"]
        and (folder / "model").read_text() == "new"
        and [p.name for p in tmp_path.iterdir()] == ["start"]
    )


def test_of_two_that_make_a_folder_at_once_the_first_stays_and_each_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = tmp_path / "cache" / "model", []
    monkeypatch.setattr("schemas.storage.atomic.sync_tree", lambda made: synced.append((made / "a").read_text()))
    with first_folder(folder) as late:
        (late / "a").write_text("late")
        with first_folder(folder) as early:
            (early / "a").write_text("early")
            assert not folder.exists()
        assert synced == ["early"]
    assert synced == ["early", "late"]
    assert (folder / "a").read_text() == "early" and [p.name for p in folder.parent.iterdir()] == ["model"]
    with pytest.raises(KeyError), first_folder(tmp_path / "other") as failed:
        (failed / "a").write_text("half")
        raise KeyError("broken off")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_partial_file_is_left_over_if_its_process_of_this_machine_has_ended(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = writer_name().rpartition("-")[0]
    for writer, expected in [
        (writer_name(), False),
        (f"{host}-{ended.pid}", True),
        (f"other-{ended.pid}", False),
        ("1234", False),
    ]:
        assert is_left_over(tmp_path / f"part-00000.{writer}.partial") is expected, writer
