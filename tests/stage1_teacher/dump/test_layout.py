"""Dumps of many shards: in folders of at most a thousand, with the plan beside the manifest; older ones in one folder.

A folder here holds two shards.
"""

import json
from pathlib import Path

import pytest

from pipeline.dumps import hub
from pipeline.dumps.clean import dump_leftovers
from pipeline.dumps.completeness import dump_faults
from pipeline.dumps.view import complete_shards, documents
from schemas import dump_files, manifest
from schemas.manifest import Manifest
from stage1_teacher.dump.merge import merge_dumps
from stage1_teacher.verification.verify import verify_dump
from stage2_student.data.dump_join import OpenDump
from tests.pipeline.dumps.test_hub import FakeHub
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe


@pytest.fixture(autouse=True)
def small_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_files, "FOLDER_SHARDS", 2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("shards/**/*.parquet")}


def contents(folder: Path) -> list[bytes]:
    """Return the shards' contents by number, wherever they lie."""
    return [content for _, content in sorted((Path(name).name, content) for name, content in files(folder).items())]


def in_one_folder(monkeypatch: pytest.MonkeyPatch, recipe: Path, *overrides: str) -> Path:
    """Make a dump as an earlier release did."""
    with monkeypatch.context() as patched:
        patched.setattr(dump_files, "FOLDER_SHARDS", 1000)
        folder = dump(recipe, *overrides)
    assert all(len(Path(name).parts) == 2 for name in files(folder))
    assert isinstance(json.loads((folder / "manifest.json").read_text())["shards"], list)
    return folder


def test_a_dump_in_folders_is_made_resumed_extended_merged_copied_and_read(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "a", model, TEXTS[:10], audit_documents=0)
    folder = dump(recipe)
    flat = in_one_folder(monkeypatch, write_recipe(tmp_path / "flat", model, TEXTS[:10], audit_documents=0))
    assert contents(folder) == contents(flat) and len(contents(folder)) >= 4
    assert {"shards/part-00000.parquet", "shards/001/part-00002.parquet"} <= files(folder).keys()
    assert json.loads((folder / "manifest.json").read_text())["shards"]["num_shards"] == len(contents(folder))
    before = files(folder)
    for name in ("shards/part-00001.parquet", "shards/001/part-00003.parquet"):
        (folder / name).unlink()
    (folder / "shards/001/part-00003.gone-1.partial").write_bytes(b"half")
    assert [left.path.name for left in dump_leftovers(folder)] == ["part-00003.gone-1.partial"]
    assert len(complete_shards(folder)) == len(before) - 2 and dump_faults(folder)
    dump(recipe)
    assert files(folder) == before and not list(folder.rglob("*.partial"))
    write_recipe(tmp_path / "a", model, TEXTS[:14], audit_documents=0)
    dump(recipe)
    assert len(list(folder.glob("plan-*.parquet"))) == 1 and len(files(folder)) > len(before)
    assert [one.doc_id for one in documents(folder)] == [str(number) for number in range(14)]
    assert len(OpenDump(folder).shards) == len(files(folder)) and verify_dump(folder) == []
    fake = FakeHub(tmp_path / "hub")
    hub.push(folder, "a/b", api=fake)
    hub.pull("a/b", tmp_path / "pulled", api=fake)
    assert files(tmp_path / "pulled") == files(folder) and verify_dump(tmp_path / "pulled") == []
    more = dump(write_recipe(tmp_path / "b", model, TEXTS[14:18], audit_documents=0))
    merge_dumps(tmp_path / "merged", [folder, more])
    assert verify_dump(tmp_path / "merged") == []
    assert contents(tmp_path / "merged") == contents(folder) + contents(more)


def test_a_dump_begun_in_one_folder_stays_in_it_when_resumed_and_extended_and_merges(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "a", model, TEXTS[:8])
    folder = in_one_folder(monkeypatch, recipe)
    before = files(folder)
    (folder / "shards/part-00002.parquet").unlink()
    dump(recipe)
    assert files(folder) == before
    write_recipe(tmp_path / "a", model, TEXTS[:12])
    dump(recipe)
    assert len(files(folder)) > len(before) and all(len(Path(name).parts) == 2 for name in files(folder))
    assert verify_dump(folder) == []
    more = dump(write_recipe(tmp_path / "b", model, TEXTS[12:15]))
    with monkeypatch.context() as patched:
        patched.setattr(dump_files, "FOLDER_SHARDS", 1000)
        merge_dumps(tmp_path / "merged", [folder, more])
    merged = files(tmp_path / "merged")
    (tmp_path / "merged/shards/part-00003.parquet").unlink()
    merge_dumps(tmp_path / "merged", [folder, more])
    assert files(tmp_path / "merged") == merged
    merge_dumps(tmp_path / "new", [folder, more])
    assert contents(tmp_path / "new") == list(contents(tmp_path / "merged")) and verify_dump(tmp_path / "new") == []
    assert Manifest.load(tmp_path / "new").identity == Manifest.load(tmp_path / "merged").identity


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_a_plan_that_is_not_the_manifests_is_refused(tmp_path: Path, model: Path, what: str) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:12]))
    [path] = folder.glob("plan-*.parquet")
    if what == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    manifest._last_plan.clear()
    with pytest.raises(ValueError, match=r"plan-[0-9a-f]{16}\.parquet is (missing|damaged)"):
        Manifest.load(folder)
