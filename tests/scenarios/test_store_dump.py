"""Dumps made in an object store: commits, a kill during an upload, and processes that share one."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from schemas.manifest import Manifest
from schemas.storage import object_store
from schemas.storage.atomic import committed
from schemas.storage.locations import Location, RemotePath, StoreError, location, names, open_parquet
from stage1_teacher.coordination import store_leases
from stage1_teacher.coordination.store_leases import StoreClaims
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.support.object_store import ObjectStore, cut_off

ROOT = Path(__file__).resolve().parents[2]


def remote(address: str) -> RemotePath:
    found = location(address)
    assert isinstance(found, RemotePath)
    return found


def stored(folder: Location) -> dict[str, pa.Table]:
    """Return the shards of a dump at any location, as `content` does for a local one."""
    tables = {}
    for name in sorted(names(folder / "shards")):
        with open_parquet(folder / "shards" / name) as file:
            tables[name] = file.read()
    return tables


def versions(folder: RemotePath) -> dict[str, tuple[int, str | None]]:
    """Return when each shard was written, and the hash of its bytes at the store."""
    found = {name: object_store.read(folder / "shards" / name) for name in names(folder / "shards")}
    return {name: (held.modified.timestamp(), held.e_tag) for name, held in found.items() if held is not None}


def test_a_dump_in_a_store_is_the_local_one_grows_there_and_leaves_no_claims(
    store: ObjectStore, tmp_path: Path, model: Path, whole: Path
) -> None:
    folder = remote("s3://bucket/plain")
    recipe = write_recipe(tmp_path, model, TEXTS[:8], path=str(folder))
    dump(recipe)
    before = versions(folder)
    dump(write_recipe(tmp_path, model, TEXTS[:12], path=str(folder)))
    assert stored(folder) == content(whole) and verify_dump(folder) == []
    kept = [name for name, version in versions(folder).items() if before.get(name) == version]
    assert sorted(kept) == sorted(before)[:-1]
    assert {"manifest.json", "recipe.yaml", "summary.json", "audit.json", "README.md"} < names(folder)
    assert Manifest.load(folder).shards == Manifest.load(whole).shards and not names(folder / "claims")
    with pytest.raises(ValueError, match=r"s3://bucket/plain holds another dump: sparsity\.top_k"):
        dump(recipe, "dump.top_k=3")
    of_tokens = remote("s3://bucket/tokens")
    dump(write_recipe(tmp_path / "tokens", model, TEXTS[:3], path=str(of_tokens), tokens={"top_k": 4}))
    assert "vocabulary.parquet" in names(of_tokens) and verify_dump(of_tokens) == []


def test_a_process_killed_in_the_middle_of_an_upload_leaves_no_shard_and_the_next_run_makes_only_what_is_missing(
    store: ObjectStore, tmp_path: Path, model: Path, whole: Path
) -> None:
    folder = remote("s3://bucket/killed")
    recipe = write_recipe(tmp_path, model, TEXTS[:12], path=str(folder))
    command = [sys.executable, "-m", "pipeline", "teacher", str(recipe)]
    with cut_off(store, b"PUT /bucket/killed/shards/part-00002.parquet", after_bytes=4000) as (environment, reached):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL)
        assert reached.wait(300)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = versions(folder)
    assert sorted(before) == ["part-00000.parquet", "part-00001.parquet"]
    assert names(folder / "claims") == {"part-00002"} and not (folder / "summary.json").exists()
    dump(recipe)
    after = versions(folder)
    assert all(after[name] == version for name, version in before.items())
    assert stored(folder) == content(whole) and verify_dump(folder) == [] and not names(folder / "claims")


def test_two_workers_on_one_dump_in_a_store_make_each_shard_once(
    store: ObjectStore, tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12], path="s3://bucket/shared")
    monkeypatch.setattr(store_leases, "_WAIT_SECONDS", 0.05)
    puts, create = [], object_store.create

    def counted(path: RemotePath, data: bytes) -> bool:
        puts.append(path.name)
        return create(path, data)

    monkeypatch.setattr(object_store, "create", counted)
    workers = [threading.Thread(target=dump, args=(recipe,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(name for name in puts if name.endswith(".parquet")) == sorted(content(whole))
    assert stored(remote("s3://bucket/shared")) == content(whole)


def test_a_claim_of_another_holds_until_it_is_given_back_or_over(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = remote("s3://bucket/claims")
    with StoreClaims(folder) as one, StoreClaims(folder) as two:
        assert one.take(0) and one.take(0) and one.take(1) and not two.take(0)
        one.give_back(0)
        assert two.take(0) and not one.take(0)
        monkeypatch.setattr(store_leases, "LEASE_SECONDS", -1.0)
        assert two.take(1)
        monkeypatch.undo()
        one.renew()
        assert not one.take(0)
    assert not names(folder / "claims")


@pytest.mark.parametrize("error", [psutil.AccessDenied, psutil.NoSuchProcess])
def test_a_holder_that_proc_hides_is_alive_and_one_that_ended_is_not(
    error: type[psutil.Error], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under hidepid=1 and hidepid=2 a process of another user's is seen so."""
    ended = subprocess.Popen(["true"])
    ended.wait()

    def hidden(pid: int) -> None:
        raise error(pid)

    monkeypatch.setattr(psutil, "Process", hidden)
    assert store_leases._is_alive(os.getpid(), 0.0) and store_leases._is_alive(1, 0.0)
    assert not store_leases._is_alive(ended.pid, 0.0)


def test_a_claim_that_is_kept_is_written_anew(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = remote("s3://bucket/kept")
    with StoreClaims(folder) as claims:
        claims.take(0)
        monkeypatch.setattr(store_leases, "LEASE_SECONDS", 0.0)
        object_store.remove(folder / "claims" / "part-00000")
        claims.renew()
        assert names(folder / "claims") == {"part-00000"}


@pytest.mark.parametrize("place", ["local", "store"])
def test_the_first_commit_of_a_shard_wins_and_a_failed_one_leaves_nothing(
    store: ObjectStore, tmp_path: Path, place: str
) -> None:
    folder: Location = tmp_path if place == "local" else remote("s3://bucket/first")

    def commit(text: str, first: bool) -> None:
        with committed(folder / "shard", first) as path:
            path.write_text(text, encoding="utf-8")

    with pytest.raises(KeyboardInterrupt), committed(folder / "shard") as path:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert not names(folder)
    commit("one", True)
    commit("two", True)
    assert (folder / "shard").read_text(encoding="utf-8") == "one"
    commit("three", False)
    assert (folder / "shard").read_text(encoding="utf-8") == "three" and names(folder) == {"shard"}


def test_stores_that_cannot_hold_a_dump_in_the_making_are_refused_by_name(
    store: ObjectStore, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"hf://datasets/a/b: a dump cannot be made there.*bld push"):
        dump(write_recipe(tmp_path, model, TEXTS[:2], path="hf://datasets/a/b"))
    with pytest.raises(StoreError, match=r"s3://other/d/.* cannot be written: .*AWS_ACCESS_KEY_ID"):
        dump(write_recipe(tmp_path, model, TEXTS[:2], path="s3://other/d"))
    monkeypatch.setattr(object_store, "create", object_store.replace)
    with pytest.raises(ValueError, match=r"s3://bucket/old: this store overwrites existing objects"):
        dump(write_recipe(tmp_path, model, TEXTS[:2], path="s3://bucket/old"))
