"""Dumps extended and merged: existing shards stay byte for byte, and a mismatch is refused by name."""

import hashlib
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from pipeline.config.loading import load_recipe
from pipeline.dumps.completeness import dump_faults
from schemas.manifest import Manifest
from stage1_teacher.dump.merge import check_mergeable, merge_dumps
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe
from tests.support.readable_dumps import IDENTITY, finish, make_record, write_dump


def files(folder: Path) -> dict[str, str]:
    """Return a hash of each shard file's content."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "shards").glob("*.parquet")}


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.parquet")}


def test_an_extended_dump_has_the_very_files_of_one_made_at_once(tmp_path: Path, model: Path) -> None:
    # Without an audit: the choice of audited documents depends on all of them, and their figures lie in the shards.
    at_once = dump(write_recipe(tmp_path / "once", model, TEXTS[:14], audit_documents=0))
    grown = dump(write_recipe(tmp_path / "grown", model, TEXTS[:8], audit_documents=0))
    before, times = Manifest.load(grown), stamps(grown)
    (grown / "recipe.yaml").unlink()
    dump(write_recipe(tmp_path / "grown", model, TEXTS[:14], audit_documents=0))
    after = Manifest.load(grown)
    assert (
        after.shards[: len(before.shards) - 1] == before.shards[:-1]
        and after.shards[: len(before.shards)] != before.shards
    )
    kept = [name for name, time in stamps(grown).items() if times.get(name) == time]
    assert sorted(kept) == sorted(times)[:-1]
    assert files(grown) == files(at_once)
    assert after == Manifest.load(at_once) and verify_dump(grown) == [] and dump_faults(grown) == []
    assert json.loads((grown / "summary.json").read_text())["documents"] == 14
    assert "14" in (grown / "README.md").read_text()


def test_an_extension_that_is_killed_after_any_of_its_steps_is_taken_up_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:4]))
    longer = write_recipe(tmp_path, model, TEXTS[:6])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("schemas.manifest.Manifest.save", "stage1_teacher.dump.run.make_missing"):
        monkeypatch.setattr(step, killed)
        with pytest.raises(KeyboardInterrupt):
            dump(longer)
        monkeypatch.undo()
        assert not (folder / "summary.json").exists() and dump_faults(folder)
    dump(longer)
    assert dump_faults(folder) == [] and verify_dump(folder) == []


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (TEXTS[:5], "fewer documents: 5 here, 8 there"),
        (["another", *TEXTS[1:12]], r"documents 0 to \d+ \(shard 0\)"),
        ([*TEXTS[:7], "another", *TEXTS[8:12]], r"documents \d+ to 7 "),
    ],
)
def test_a_corpus_that_is_no_extension_is_refused_with_the_reason(
    tmp_path: Path, model: Path, texts: list[str], why: str
) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:8]))
    before = files(folder)
    write_recipe(tmp_path, model, texts)
    with pytest.raises(ValueError, match=rf"corpus\.sha256 differs.*{why}.*bld merge"):
        dump(tmp_path / "recipe.yaml")
    assert files(folder) == before and dump_faults(folder) == []


def test_a_shard_of_the_old_plan_that_comes_late_is_found(tmp_path: Path, model: Path) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:4]))
    late = folder / "shards" / Manifest.load(folder).shards[-1].path(folder).name
    old = late.read_bytes()
    longer = write_recipe(tmp_path, model, TEXTS[:5])
    dump(longer)
    late.write_bytes(old)
    with pytest.raises(ValueError, match="holds other documents than planned; delete it"):
        dump(longer)


def test_merged_dumps_are_one_that_reads_and_verifies(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (
        dump(write_recipe(tmp_path / "a", model, TEXTS[:5])),
        dump(write_recipe(tmp_path / "b", model, TEXTS[5:9])),
    )
    out = tmp_path / "merged"
    summary = merge_dumps(out, [one, two])
    merged = Manifest.load(out)
    assert [shard.first_document for shard in merged.shards][len(Manifest.load(one).shards)] == 5
    assert summary["documents"] == 9 and verify_dump(out) == [] and dump_faults(out) == []
    assert sorted(files(out).values()) == sorted([*files(one).values(), *files(two).values()])
    assert "document ids occur more than once" in capsys.readouterr().err  # both count rows from 0
    assert [origin["documents"] for origin in summary["merged_from"]] == [5, 4]
    (out / "summary.json").unlink()
    next((out / "shards").glob("*.parquet")).unlink()
    assert merge_dumps(out, [one, two]) == summary  # taken up again
    with pytest.raises(ValueError, match="holds another dump"):
        merge_dumps(out, [two, one])


def with_another_engine(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a dump whose last shard comes from an engine of another version, accepted by an operator."""
    folder = dump(recipe)
    monkeypatch.setattr("transformers.__version__", "9.9.9")
    Manifest.load(folder).shards[-1].path(folder).unlink()
    dump(recipe, accept_engine="transformers-9.9.9")
    monkeypatch.undo()
    assert verify_dump(folder) == []
    return folder


def test_engines_that_were_accepted_stay_accepted_in_a_merged_dump(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = with_another_engine(write_recipe(tmp_path / "a", model, TEXTS[:4]), monkeypatch)
    two = dump(write_recipe(tmp_path / "b", model, TEXTS[4:6]))
    for number, dumps in enumerate(([one, two], [two, one])):
        out = tmp_path / f"merged-{number}"
        merge_dumps(out, dumps)
        merged = Manifest.load(out)
        assert merged.accepted_engines == ("transformers-9.9.9",) and verify_dump(out) == []
        merged.model_copy(update={"accepted_engines": ()}).save(out)  # as a release that forgot them began it
        merge_dumps(out, dumps)
        assert verify_dump(out) == []


def test_dumps_of_engines_of_which_one_accepts_the_others_are_joined_and_all_stay_accepted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by(version: str, name: str, first: int, **options: str) -> Path:
        monkeypatch.setattr("transformers.__version__", version)
        recipe = write_recipe(tmp_path / name, model, TEXTS[first : first + 2])
        run_teacher(load_recipe(recipe), **options)
        return tmp_path / name / "dump"

    one, two, three = by("1", "a", 0), by("2", "b", 2), by("3", "c", 4)
    Manifest.load(two).shards[-1].path(two).unlink()
    by("1", "b", 2, accept_engine="transformers-1")
    monkeypatch.undo()
    for number, dumps in enumerate(([one, two], [two, one])):
        out = tmp_path / f"merged-{number}"
        merge_dumps(out, dumps)
        merged = Manifest.load(out)
        engine = merged.identity["teacher"]["engine"]
        assert engine == Manifest.load(dumps[0]).identity["teacher"]["engine"]
        assert {engine, *merged.accepted_engines} == {"transformers-1", "transformers-2"}
        assert verify_dump(out) == [] and dump_faults(out) == []
    refused = r"differ in teacher\.engine: 'transformers-\d' there, .*--accept-engine transformers-\d"
    for dumps in permutations([one, two, three]):
        with pytest.raises(ValueError, match=refused):
            merge_dumps(tmp_path / "out", dumps)
    assert not (tmp_path / "out").exists()
    merge_dumps(tmp_path / "out", [one, two, three], accept_engine=["transformers-3"])
    assert Manifest.load(tmp_path / "out").accepted_engines == ("transformers-2", "transformers-3")
    assert verify_dump(tmp_path / "out") == []


def test_engines_that_were_accepted_stay_accepted_in_a_dump_that_grows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_another_engine(write_recipe(tmp_path, model, TEXTS[:4]), monkeypatch)
    longer = write_recipe(tmp_path, model, TEXTS[:6])
    dump(longer)
    assert Manifest.load(folder).accepted_engines == ("transformers-9.9.9",) and verify_dump(folder) == []
    engine = Manifest.load(folder).identity["teacher"]["engine"]
    monkeypatch.setattr("transformers.__version__", "9.9.9")  # which is accepted, so that it may make it longer too
    dump(write_recipe(tmp_path, model, TEXTS[:9]))
    assert Manifest.load(folder).identity["teacher"]["engine"] == engine
    assert json.loads((folder / "summary.json").read_text())["documents"] == 9 and verify_dump(folder) == []


def test_dumps_that_cannot_be_one_are_refused_by_what_differs(tmp_path: Path, model: Path) -> None:
    one = dump(write_recipe(tmp_path / "a", model, TEXTS[:3]))
    other = dump(write_recipe(tmp_path / "b", model, TEXTS[3:5], top_k=3))
    half = dump(write_recipe(tmp_path / "c", model, TEXTS[5:7]))
    (half / "summary.json").unlink()
    same = dump(write_recipe(tmp_path / "d", model, TEXTS[:3]))
    out = tmp_path / "out"
    for dumps, why in (
        ([one, other], r"differ in sparsity\.top_k: 16 there, 3 here"),
        ([one, half], r"c/dump is not complete: .*summary\.json is missing"),
        ([one, same], "hold the same documents"),
        ([one], "give two or more"),
        ([one, out, one], "is one of the dumps"),
    ):
        with pytest.raises(ValueError, match=why):
            merge_dumps(out, dumps)
        assert not out.exists()


def test_a_dump_named_twice_is_refused_and_one_that_repeats_itself_is_not(tmp_path: Path) -> None:
    identity = dict(IDENTITY) | {"teacher": {"model": "t", "engine": "e"}}
    one, other = (
        finish(write_dump(tmp_path / name, [[make_record(name, b"x")], [make_record(name, b"y")]], identity=identity))
        for name in ("one", "other")
    )
    (tmp_path / "link").symlink_to(one)
    for again in (one, tmp_path / "link", tmp_path / "other" / ".." / "one"):
        with pytest.raises(ValueError, match=rf"^{again} is named twice.*name it once"):
            check_mergeable(tmp_path / "out", [one, other, again])
    with pytest.raises(ValueError, match=r"one \(shard 0\) and .*other \(shard 0\) hold the same documents"):
        check_mergeable(tmp_path / "out", [one, other])
    manifest = Manifest.load(other)
    repeated = [replace(shard, sha256="the same text twice") for shard in manifest.shards]
    manifest.model_copy(update={"shards": tuple(repeated)}).save(other)
    assert len(check_mergeable(tmp_path / "out", [one, other])) == 2
