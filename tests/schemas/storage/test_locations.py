"""Dumps read directly from an object store."""

import shutil
from itertools import islice
from pathlib import Path

import pytest

from pipeline.config import DumpConfig, DumpRef
from pipeline.dumps import statistics, view
from schemas.manifest import Manifest
from schemas.storage.locations import RemotePath, StoreError, location, names
from stage1_teacher.verification.verify import verify_dump
from stage2_student.data.reader import DumpReader
from tests.support.object_store import SECRET, ObjectStore
from tests.support.small_dumps import make_dump


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dump(tmp_path_factory.mktemp("store") / "dump", 12, 3)


@pytest.fixture(scope="module")
def remote(store: ObjectStore, dump: Path) -> RemotePath:
    found = location(store.put(dump, "dumps/one") + "/")
    assert isinstance(found, RemotePath)
    return found


def test_a_remote_file_reads_as_the_local_one(dump: Path, remote: RemotePath) -> None:
    ours, theirs = (shard.path(place) for place in (dump, remote) for shard in Manifest.load(place).shards[:1])
    assert str(theirs) == "s3://bucket/dumps/one/shards/part-00000.parquet" and theirs.name == ours.name
    assert theirs.exists() and not (remote / "summary.json").exists() and not (remote / "no" / "folder").exists()
    assert theirs.stat().st_size == ours.stat().st_size
    with theirs.open("rb") as file:
        assert file.seek(-8, 2) == len(ours.read_bytes()) - 8 and file.read() == ours.read_bytes()[-8:]
    assert names(theirs.parent) == {"part-00000.parquet", "part-00001.parquet", "part-00002.parquet"}
    assert names(remote / "nothing") == names(dump / "nothing") == set()


def test_a_student_reads_a_remote_dump_as_the_local_one(dump: Path, remote: RemotePath) -> None:
    ours, theirs = DumpReader(dump, 1), DumpReader.of([DumpRef(path=str(remote))], "arithmetic", 1)
    for (one, at), (other, there) in islice(zip(ours.records(), theirs.records(), strict=True), 20):
        assert at == there and one.doc_id == other.doc_id and (one.logprobs == other.logprobs).all()


def test_inspect_sees_in_a_remote_dump_what_it_sees_in_the_local_one(dump: Path, remote: RemotePath) -> None:
    assert statistics.dump_statistics(remote) == statistics.dump_statistics(dump)
    assert view.find_document(remote, "d7").text == view.find_document(dump, "d7").text


def test_verify_finds_what_is_wrong_with_a_remote_dump(store: ObjectStore, dump: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dump, broken)
    (broken / "shards" / "part-00002.parquet").unlink()
    shard = broken / "shards" / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    (broken / "shards" / "part-00009.parquet").write_bytes(b"")
    faults = verify_dump(location(store.put(broken, "broken")))
    ours = verify_dump(broken)
    assert faults == [fault.replace(str(broken), "s3://bucket/broken") for fault in ours]
    told = "\n".join(faults)
    assert "part-00001.parquet: is damaged" in told and "part-00002.parquet: missing" in told and "00009" in told


def test_a_store_that_refuses_is_told_by_name_and_without_the_secret(store: ObjectStore) -> None:
    with pytest.raises(ValueError, match="s3://bucket/nothing is not a dump"):
        Manifest.load(location("s3://bucket/nothing"))
    with pytest.raises(StoreError, match=r"s3://other/dump/x cannot be read: .*AWS_ACCESS_KEY_ID") as caught:
        (location("s3://other/dump") / "x").open("rb")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["s3://key:hidden@bucket/dump", "s3://bucket/dump?secret_key=hidden", "s3://b/d#hidden"]
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="no user, password, query or fragment") as caught:
        location(text)
    assert "hidden" not in str(caught.value)
    with pytest.raises(ValueError, match="no user, password, query or fragment"):
        DumpConfig(path=text)


def test_addresses_that_are_not_read_are_refused() -> None:
    with pytest.raises(ValueError, match="ftp:// is not a supported store"):
        location("ftp://host/dump")
    with pytest.raises(ValueError, match="names no folder"):
        location("s3://")
    assert location("file:///a/b%20c") == location("/a/b c") == Path("/a/b c")
