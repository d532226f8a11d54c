"""Dumps to a hub and back, against a fake one: a folder per repository, called as the real client is."""

import fnmatch
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pipeline.dumps import hub
from pipeline.dumps.completeness import dump_faults
from schemas.manifest import Manifest
from schemas.token_vocabulary import read_vocabulary, write_vocabulary
from tests.support.readable_dumps import IDENTITY, finish, make_dump, varied_record, with_tokens, write_dump

TOKEN = "hf_abcdefghijklmnop"


class FakeHub:
    """The calls that `hub` makes, on folders. Each call is bound to the real client's signature first."""

    repo_type = "dataset"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.listed: list[str] = []
        self.fail: Callable[[str, dict[str, Any]], None] = lambda name, arguments: None

    def _bind(self, name: str, *args: object, **kwargs: object) -> dict[str, Any]:
        arguments = inspect.signature(getattr(HfApi, name)).bind(None, *args, **kwargs).arguments
        assert arguments["repo_type"] == self.repo_type
        self.calls.append((name, arguments))
        self.fail(name, arguments)
        return arguments

    def create_repo(self, *args: object, **kwargs: object) -> str:
        arguments = self._bind("create_repo", *args, **kwargs)
        (self.root / arguments["repo_id"]).mkdir(parents=True, exist_ok=arguments["exist_ok"])
        return f"https://hub/datasets/{arguments['repo_id']}"

    def create_branch(self, *args: object, **kwargs: object) -> None:
        self._bind("create_branch", *args, **kwargs)

    def repo_info(self, *args: object, **kwargs: object) -> SimpleNamespace:
        arguments = self._bind("repo_info", *args, **kwargs)
        if not (self.root / arguments["repo_id"]).exists():
            raise RepositoryNotFoundError("404", response=response(404))
        return SimpleNamespace(sha="c0ffee" * 6, siblings=[SimpleNamespace(rfilename=name) for name in self.listed])

    def upload_folder(self, *args: object, **kwargs: object) -> None:
        arguments = self._bind("upload_folder", *args, **kwargs)
        copy(arguments["folder_path"], self.root / arguments["repo_id"], arguments["allow_patterns"])

    def snapshot_download(self, *args: object, **kwargs: object) -> str:
        arguments = self._bind("snapshot_download", *args, **kwargs)
        folder = Path(arguments["local_dir"])
        copy(self.root / arguments["repo_id"], folder, arguments["allow_patterns"])
        (folder / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        return str(folder)


def copy(source: Path, target: Path, patterns: list[str]) -> None:
    for path in sorted(Path(source).rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub/x"))


@pytest.fixture
def fake(tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path / "hub")


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    shards = [[varied_record(str(i), seed=i)] for i in range(3)]
    return finish(write_dump(tmp_path / "dump", shards))


def test_a_dump_comes_back_from_a_hub_as_it_went(fake: FakeHub, dump: Path, tmp_path: Path) -> None:
    (dump / "shards" / "part-00009.1.partial").write_bytes(b"half")
    assert "datasets/a/b" in hub.push(dump, "a/b", api=fake)
    got = tmp_path / "got"
    assert "3 documents in 3 shards" in hub.pull("a/b", got, api=fake)
    assert Manifest.load(got) == Manifest.load(dump) and dump_faults(got) == []
    names = {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "summary.json", "README.md", *(f"shards/part-0000{i}.parquet" for i in range(3))}
    assert not (got / ".cache").exists()


def test_what_the_tokens_of_a_dump_spell_comes_along_and_a_dump_without_it_is_incomplete(
    fake: FakeHub, tmp_path: Path
) -> None:
    records = [[with_tokens(varied_record("a", seed=1))]]
    dump = finish(write_dump(tmp_path / "dump", records, identity=IDENTITY | {"tokens": {"top_k": 4}}))
    with pytest.raises(ValueError, match=r"vocabulary\.parquet is missing"):
        hub.push(dump, "a/b", api=fake)
    write_vocabulary(dump, [None, b"a"])
    hub.push(dump, "a/b", api=fake)
    hub.pull("a/b", tmp_path / "got", api=fake)
    assert read_vocabulary(tmp_path / "got") == [None, b"a"]


def test_a_new_data_set_is_private_unless_asked_and_the_summary_goes_up_last(fake: FakeHub, dump: Path) -> None:
    hub.push(dump, "a/b", api=fake)
    hub.push(dump, "a/c", public=True, revision="next", api=fake)
    created = [arguments for name, arguments in fake.calls if name == "create_repo"]
    assert [arguments["private"] for arguments in created] == [True, False]
    uploads = [arguments for name, arguments in fake.calls if name == "upload_folder"]
    assert [("summary.json" in u["allow_patterns"], u["revision"]) for u in uploads] == [
        (False, None),
        (True, None),
        (False, "next"),
        (True, "next"),
    ]
    assert not any("token" in arguments for _, arguments in fake.calls)  # the client finds its own


def test_an_incomplete_or_spoiled_dump_is_not_pushed(fake: FakeHub, dump: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"summary\.json is missing.*2 of 3 shards.*bld teacher"):
        hub.push(make_dump(tmp_path / "half"), "a/b", api=fake)
    shard = dump / "shards" / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"part-00001\.parquet: its sha256 differs"):
        hub.push(dump, "a/b", api=fake)
    shard.unlink()
    with pytest.raises(ValueError, match=r"part-00001\.parquet is missing"):
        hub.push(dump, "a/b", api=fake)
    assert fake.calls == []


def test_a_push_that_is_cut_off_goes_on(fake: FakeHub, dump: Path, tmp_path: Path) -> None:
    def cut(name: str, arguments: dict[str, Any]) -> None:
        if name == "upload_folder" and "summary.json" in arguments["allow_patterns"]:
            raise httpx2.ConnectError("gone")

    fake.fail = cut
    with pytest.raises(ValueError, match=r"pushing .* to a/b: ConnectError: gone.*it resumes"):
        hub.push(dump, "a/b", api=fake)
    fake.fail = lambda *_: None
    with pytest.raises(ValueError, match="not a dump"):
        hub.pull("a/b", tmp_path / "got", api=fake)
    hub.push(dump, "a/b", api=fake)
    assert "checksums correct" in hub.pull("a/b", tmp_path / "got", api=fake)


def test_a_file_that_was_spoiled_on_the_way_is_named(fake: FakeHub, dump: Path, tmp_path: Path) -> None:
    hub.push(dump, "a/b", api=fake)
    stored = fake.root / "a/b/shards/part-00002.parquet"
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"part-00002\.parquet has \d+ bytes; the summary gives .*pull again"):
        hub.pull("a/b", tmp_path / "got", api=fake)


def test_another_dump_is_overwritten_neither_there_nor_here(fake: FakeHub, dump: Path, tmp_path: Path) -> None:
    hub.push(dump, "a/b", api=fake)
    other = finish(write_dump(tmp_path / "other", [[varied_record("0", seed=9)]]))
    with pytest.raises(ValueError, match="a/b holds another dump: its shards hold different documents"):
        hub.push(other, "a/b", api=fake)
    with pytest.raises(ValueError, match="holds another dump than a/b"):
        hub.pull("a/b", other, api=fake)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty and is not a dump"):
        hub.pull("a/b", tmp_path / "notes", api=fake)


def test_no_message_repeats_a_token(
    fake: FakeHub, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-form")

    def refuse(name: str, arguments: dict[str, Any]) -> None:
        raise HfHubHTTPError(
            f"401 for https://me:pw@hub/ with Bearer {TOKEN} and secret-of-another-form", response=response(401)
        )

    fake.fail = refuse
    with pytest.raises(ValueError, match="hub refused") as raised:
        hub.push(dump, "a/b", api=fake)
    said = str(raised.value) + "".join(capsys.readouterr())
    assert "401" in said and "hf auth login" in said
    assert TOKEN not in said and "secret-of" not in said and "me:pw" not in said
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_a_name_that_is_none_and_a_data_set_that_is_not_there_are_said(
    fake: FakeHub, dump: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give OWNER/NAME"):
        hub.push(dump, "just-a-name", api=fake)
    with pytest.raises(ValueError, match="no such repository"):
        hub.pull("a/nothing", tmp_path / "got", api=fake)


@pytest.mark.parametrize("name", ["shards/../../x.parquet", "/etc/x.parquet", "shards\\..\\x.parquet"])
def test_a_hub_that_lists_files_outside_the_folder_is_refused_before_anything_is_fetched(
    fake: FakeHub, dump: Path, tmp_path: Path, name: str
) -> None:
    hub.push(dump, "a/b", api=fake)
    fake.listed = ["manifest.json", name]
    with pytest.raises(ValueError, match="a/b lists a file outside its folder"):
        hub.pull("a/b", tmp_path / "got", api=fake)
    assert not (tmp_path / "got").exists() and fake.calls[-1][0] == "repo_info"
