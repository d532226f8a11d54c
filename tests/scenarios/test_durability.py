"""Failures that a dump promises to survive, and those it promises to name."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas.file_seal import check_seal
from schemas.manifest import Manifest
from schemas.shard import read_shard
from stage1_teacher.verification.verify import verify_dump
from tests.bench.kills import flip
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def parts(dump: Path) -> list[Path]:
    return sorted((dump / "shards").glob("*.parquet"))


def left(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.partial"))


def test_a_dump_killed_or_interrupted_at_random_moments_loses_only_the_shards_in_flight() -> None:
    """Three kills of two workers, one SIGINT, one SIGTERM; `make bench` does fifty."""
    options = ["--kills", "3", "--interrupts", "2", "--flips", "20", "--documents", "40", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.kills", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_flipped_bit_and_truncation_is_found_without_a_summary(copy: Path) -> None:
    (copy / "summary.json").unlink()
    assert flip(copy, 100, random.Random(0)) == []


def test_every_bit_of_a_footer_is_under_the_seal(copy: Path) -> None:
    path = parts(copy)[0]
    good = path.read_bytes()
    for at in range(len(good) - 200, len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            check_seal(path)


def test_a_reader_finds_a_damaged_page_by_itself(copy: Path) -> None:
    path = parts(copy)[0]
    column = pq.read_metadata(path).row_group(0).column(2)
    spoiled = bytearray(path.read_bytes())
    spoiled[column.data_page_offset + column.total_compressed_size - 8] ^= 1
    path.write_bytes(bytes(spoiled))
    with pytest.raises(
        ValueError, match=r"part-00000\.parquet is damaged: .*`bld verify` lists everything that is wrong"
    ):
        list(read_shard(path))


def test_a_shard_that_was_deleted_is_named_and_made_again_alike(tmp_path: Path, model: Path, whole: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    shutil.copytree(whole, tmp_path / "dump")
    second = parts(tmp_path / "dump")[1]
    second.unlink()
    assert verify_dump(tmp_path / "dump") == [f"{second}: missing; run `bld teacher` again to make it"]
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole) and verify_dump(tmp_path / "dump") == []


@pytest.mark.parametrize("damage", ["flipped", "cut off", "empty"])
def test_a_damaged_shard_is_never_summed_up_as_complete(tmp_path: Path, model: Path, whole: Path, damage: str) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    shutil.copytree(whole, tmp_path / "dump")
    (tmp_path / "dump" / "summary.json").unlink()
    path = parts(tmp_path / "dump")[1]
    column = pq.read_metadata(path).row_group(0).column(2)  # of the text, which no summary reads
    good = path.read_bytes()
    at = column.data_page_offset + column.total_compressed_size - 8
    path.write_bytes(
        {"flipped": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], "cut off": good[:-9], "empty": b""}[damage]
    )
    with pytest.raises(
        ValueError, match=r"part-00001\.parquet is (damaged|empty): .*; delete it and run the same command again"
    ):
        dump(recipe)
    assert not (tmp_path / "dump" / "summary.json").exists()
    path.unlink()
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole) and verify_dump(tmp_path / "dump") == []


def test_an_empty_shard_is_called_empty_by_who_reads_it(copy: Path) -> None:
    path = parts(copy)[0]
    path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"part-00000\.parquet is empty: 0 bytes.*delete it and run `bld teacher` again"
    ):
        list(read_shard(path))
    assert verify_dump(copy)[0].startswith(f"{path}: is empty: 0 bytes")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Limit the size of files: a write fails as on a full disk.

    With EFBIG instead of ENOSPC; no privileges are needed.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_named_leaves_nothing_half_written_and_is_resumed(
    tmp_path: Path, model: Path, whole: Path
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    with largest_file(8000), pytest.raises(OSError, match=r"part-00000.parquet cannot be written.*same command again"):
        dump(recipe)
    assert parts(tmp_path / "dump") == left(tmp_path) == []
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole)


class SlowDisk:
    """A slow sync that fails at one of its calls, long after the write itself succeeded."""

    def __init__(self, seconds: float, fails_at: int | None) -> None:
        self.seconds, self.fails_at, self.calls = seconds, fails_at, 0
        self.early: list[str] = []  # files that had their name before they were durable
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        number, self.calls = self.calls, self.calls + 1
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".partial" and path.parent.name == "shards":
            name = path.with_name(f"{path.name.partition('.')[0]}.parquet")
            self.early += [name.name] if name.exists() else []
        time.sleep(self.seconds)
        if number == self.fails_at:
            raise OSError(errno.EIO, "Input/output error")
        self._fsync(descriptor)


def test_on_a_slow_disk_a_shard_has_its_name_only_once_it_is_durable(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(0.02, None)
    monkeypatch.setattr("os.fsync", disk.fsync)
    dump(write_recipe(tmp_path, model, TEXTS[:12]), "placement.overlap=true")
    assert disk.calls >= 2 * len(parts(whole)) and disk.early == []
    assert content(tmp_path / "dump") == content(whole) and verify_dump(tmp_path / "dump") == []


def test_a_disk_that_fails_late_at_any_moment_leaves_whole_files_only_and_the_dump_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = dump(write_recipe(tmp_path / "once", model, TEXTS[:4]))
    counting = SlowDisk(0.0, None)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", counting.fsync)
        dump(write_recipe(tmp_path / "counted", model, TEXTS[:4]))
    for fails_at in sorted({*random.Random(0).sample(range(counting.calls), 4), counting.calls - 1}):
        recipe = write_recipe(tmp_path / str(fails_at), model, TEXTS[:4])
        folder, disk = recipe.parent / "dump", SlowDisk(0.0, fails_at)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", disk.fsync)
            with pytest.raises(OSError, match=r"Input/output error"):
                dump(recipe)
        assert left(folder) == [] and disk.early == []
        for path in parts(folder):
            check_seal(path)
        if (folder / "summary.json").exists():
            assert len(parts(folder)) == len(parts(at_once))
        dump(recipe)
        assert content(folder) == content(at_once) and verify_dump(folder) == [], fails_at


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_one_are_named_and_resumed_from(tmpfs: Path, model: Path, whole: Path) -> None:
    recipe = write_recipe(tmpfs.parent, model, TEXTS[:12])
    (tmpfs.parent / "dump").symlink_to(tmpfs, target_is_directory=True)
    with pytest.raises(OSError, match=r"cannot be written.*No space left.*same command again"):
        dump(recipe)
    made = content(tmpfs)
    assert 0 < len(made) < len(Manifest.load(tmpfs).shards) and left(tmpfs) == []
    remount(tmpfs, "ro")
    with pytest.raises(OSError, match=r"cannot be written.*Read-only file system"):
        dump(recipe)
    remount(tmpfs, "rw,size=16m")
    dump(recipe)
    assert content(tmpfs) == content(whole) and verify_dump(tmpfs) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_folder_without_permission_is_named(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    (tmp_path / "dump").mkdir(mode=0o555)
    with pytest.raises(OSError, match="dump"):
        dump(recipe)


HOLD = """
import sys
from pathlib import Path
from stage1_teacher.coordination.shard_claims import open_claims
with open_claims(Path(sys.argv[1])) as claims:
    print(claims.take(1), flush=True)
    sys.stdin.read()
"""


def test_processes_share_a_dump_and_a_dead_ones_claim_is_free(
    tmp_path: Path, model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    (tmp_path / "dump").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "dump")], cwd=ROOT, stdin=-1, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    half = tmp_path / "dump" / "shards" / f"part-00001.{other.pid}.partial"
    half.parent.mkdir()
    half.write_bytes(b"half")
    dump(recipe)
    others = [path.name for path in parts(whole) if path.name != "part-00001.parquet"]
    assert [path.name for path in parts(tmp_path / "dump")] == others
    assert left(tmp_path) == [half] and not (tmp_path / "dump" / "summary.json").exists()
    assert "1 shard is missing; other processes make the rest" in capsys.readouterr().err
    other.kill()
    other.communicate()
    dump(recipe)
    assert content(tmp_path / "dump") == content(whole) and left(tmp_path) == []


def test_another_teacher_and_another_corpus_are_refused_by_name(tmp_path: Path, model: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "dump")
    other = tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"teacher.model: .*teacher.weights_sha256: .*Give a new dump.path"):
        dump(write_recipe(tmp_path, other, TEXTS[:12]))
    with pytest.raises(ValueError, match=r"holds another dump: corpus.sha256"):
        dump(write_recipe(tmp_path, model, TEXTS[1:13]))
    (tmp_path / "dump" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest.json"):
        dump(write_recipe(tmp_path, model, TEXTS[:12]))
