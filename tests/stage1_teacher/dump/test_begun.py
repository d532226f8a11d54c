"""Settings that a dump was begun with hold to its end; old dumps continue unchanged.

Differences are reported or refused by name.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Document
from pipeline.dumps.view import find_document
from pipeline.sources.file_hash import weights_sha256
from schemas import ARITHMETIC, SCHEMA_VERSION, levels
from schemas.manifest import Manifest, write_json
from schemas.record import Record
from schemas.shard import read_shard
from stage1_teacher.dump.merge import merge_dumps
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.verification.verify import verify_dump
from tests.schemas.test_stored_entries import assert_equal
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.stage1_teacher.verification.test_verify import rewrite, with_column

GOLDEN = Path(__file__).with_name("golden")
EVERYTHING = {"top_k": 256, "min_prob": 0.0}


def begun_by_the_first_release(folder: Path, model: Path, name: str) -> Path:
    """Write a recipe, and in its dump's folder the manifest that commit c6908ab wrote of it.

    Values that depend on the machine are this machine's.
    """
    settings = EVERYTHING if name == "everything" else {}
    recipe = write_recipe(folder, model, TEXTS[:6], audit_documents=0, **settings)
    manifest = json.loads((GOLDEN / f"manifest-arithmetic-1-{name}.json").read_text(encoding="utf-8"))
    teacher = load_tokenizer(load_recipe(recipe))
    manifest["identity"]["teacher"] |= {
        "model": str(model),
        "weights_sha256": weights_sha256(str(model), None),
        "tokenizer_sha256": teacher.tokenizer.sha256,
        "engine": f"transformers-{transformers.__version__}",
    }
    (folder / "dump").mkdir()
    write_json(folder / "dump" / "manifest.json", manifest)
    return recipe


def records(folder: Path) -> list[Record]:
    return [record for path in sorted((folder / "shards").glob("*.parquet")) for record in read_shard(path)]


@pytest.mark.parametrize("name", ["default", "everything"])
def test_a_dump_that_the_first_release_began_is_resumed_extended_verified_and_merged_under_its_arithmetic(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    recipe = begun_by_the_first_release(tmp_path / "old", model, name)
    before = Manifest.load(tmp_path / "old" / "dump")
    folder = dump(recipe)
    assert "continues with arithmetic 1, with which it was begun" in capsys.readouterr().err
    assert Manifest.load(folder) == before and "arithmetic" not in before.identity
    found = records(folder)
    assert all(np.isin(record.logprobs, levels.LOGPROBS).all() for record in found)
    assert all(np.isin(record.doubt, levels.STORED_SHARES).all() for record in found)
    assert verify_dump(folder) == [] and verify_dump(folder, against_teacher=2) == []
    settings = EVERYTHING if name == "everything" else {}
    dump(write_recipe(tmp_path / "old", model, TEXTS[:9], audit_documents=0, **settings))
    assert json.loads((folder / "summary.json").read_text())["documents"] == 9 and verify_dump(folder) == []
    other = write_recipe(tmp_path / "new", model, TEXTS[9:12], audit_documents=0, **settings)
    new = dump(other)
    with pytest.raises(ValueError, match=rf"arithmetic: 1 there, {ARITHMETIC} here.*settings \(dump.arithmetic=1\)"):
        merge_dumps(tmp_path / "merged", [folder, new])
    shutil.rmtree(new)
    dump(other, "dump.arithmetic=1")
    merge_dumps(tmp_path / "merged", [folder, new])
    assert verify_dump(tmp_path / "merged") == []
    assert "arithmetic" not in Manifest.load(tmp_path / "merged").identity


def test_a_new_dump_names_the_newest_arithmetic_and_another_is_refused_by_name(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    folder = dump(recipe)
    assert Manifest.load(folder).identity["arithmetic"] == ARITHMETIC
    with pytest.raises(ValueError, match=f"holds another dump: arithmetic: {ARITHMETIC} there, 1 here"):
        dump(recipe, "dump.arithmetic=1")
    manifest = Manifest.load(folder)
    manifest.model_copy(update={"identity": manifest.identity | {"arithmetic": ARITHMETIC + 1}}).save(folder)
    with pytest.raises(
        ValueError, match=f"begun with arithmetic {ARITHMETIC + 1}; this release knows 1 to {ARITHMETIC}"
    ):
        dump(recipe)


def test_a_dump_that_stores_everything_is_the_teachers_targets_to_float32(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:6], audit_documents=0, **EVERYTHING)
    folder = dump(recipe)
    assert Manifest.load(folder).identity["coding"] == levels.EXACT and verify_dump(folder, against_teacher=6) == []
    loaded = load_recipe(recipe)
    teacher = open_teacher(loaded, *load_tokenizer(loaded))
    worst = 0.0
    for record in records(folder):
        window = cut_document(Document(record.doc_id, record.document, None), teacher.tokenizer, 64, 8)[0]
        [targets] = teacher.targets([window], teacher.run_engine([window]))
        stored_PV = np.empty((record.num_positions, 256))
        np.put_along_axis(
            stored_PV, record.symbols.reshape(-1, 256).astype(int), record.logprobs.reshape(-1, 256), axis=1
        )
        worst = max(worst, np.abs(np.exp(stored_PV) - targets.probs_PV).max())
        expected_PV = np.log(np.maximum(targets.probs_PV, np.exp(levels.MIN_LOGPROB)))
        np.testing.assert_allclose(
            stored_PV, expected_PV, rtol=1e-4, atol=1e-4
        )  # another batch's rounding of its logits
        np.testing.assert_allclose(record.teacher_token_logprobs, targets.token_logprobs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(record.dropped, targets.dropped_P, atol=1e-5)
        np.testing.assert_allclose(record.doubt, targets.doubt_P, atol=1e-5)
    assert worst < 1e-5
    teacher.engine.close()


def test_a_dump_that_says_it_stores_everything_and_does_not_is_found(tmp_path: Path, model: Path) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:2], audit_documents=0, **EVERYTHING))

    def less_of_the_first(table: pa.Table) -> pa.Table:
        rows = table["other_logprobs"].to_pylist()
        rows[0][:255] = [value - 1e-3 for value in rows[0][:255]]
        return with_column(table, "other_logprobs", rows)

    def one_symbol_less(table: pa.Table) -> pa.Table:
        for name in ("other_logprobs", "other_symbols", "other_counts"):
            rows = table[name].to_pylist()
            rows[0] = [rows[0][0] - 1, *rows[0][1:]] if name == "other_counts" else rows[0][:254] + rows[0][255:]
            table = with_column(table, name, rows)
        return table

    [path] = (folder / "shards").glob("*.parquet")
    sound = path.read_bytes()
    for change, said in (
        (less_of_the_first, "all symbols of position 0 sum to 0.999"),
        (one_symbol_less, "position 0 lacks symbols, but the dump stores all"),
    ):
        path.write_bytes(sound)
        rewrite(path, change)
        assert any(said in fault for fault in verify_dump(folder)), said


def versions(folder: Path) -> list[int]:
    """Return the format version of each shard."""
    return [
        int(pq.read_schema(path).metadata[b"bld.schema_version"]) for path in sorted(folder.glob("shards/*.parquet"))
    ]


@pytest.mark.parametrize(("version", "tokens"), [(1, None), (2, {"top_k": 4, "min_prob": 0.0})])
def test_a_dump_goes_on_in_the_version_of_the_format_that_it_was_begun_in(
    version: int, tokens: dict[str, object] | None, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = dump(write_recipe(tmp_path / "newest", model, TEXTS[:9], audit_documents=0, tokens=tokens))
    recipe = write_recipe(tmp_path / "old", model, TEXTS[:6], audit_documents=0, tokens=tokens)
    manifest = json.loads((dump(recipe) / "manifest.json").read_text())
    shutil.rmtree(tmp_path / "old" / "dump")
    (tmp_path / "old" / "dump").mkdir()
    write_json(tmp_path / "old" / "dump" / "manifest.json", manifest | {"schema_version": version})
    old = dump(recipe)
    first = Manifest.load(old).shards[0].path(old)
    before = first.read_bytes()
    first.unlink()
    assert dump(recipe) == old and first.read_bytes() == before
    write_recipe(tmp_path / "old", model, TEXTS[:9], audit_documents=0, tokens=tokens)  # a longer corpus
    dump(recipe)
    assert set(versions(old)) == {version} == {Manifest.load(old).schema_version}
    assert set(versions(newest)) == {SCHEMA_VERSION} == {Manifest.load(newest).schema_version}
    for ours, theirs in zip(records(old), records(newest), strict=True):
        assert_equal(ours, theirs)
    others = dump(write_recipe(tmp_path / "others", model, TEXTS[9:12], audit_documents=0, tokens=tokens))
    assert "versions" not in capsys.readouterr().err
    merge_dumps(tmp_path / "merged", [old, others])
    assert f"versions {version} and 3" in capsys.readouterr().err
    assert set(versions(tmp_path / "merged")) == {version, SCHEMA_VERSION}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert '"entry_counts"' in card and '"other_counts"' in card and f"`bld.schema_version` is {version}, the" in card
    assert Manifest.load(tmp_path / "merged").schema_version == SCHEMA_VERSION
    assert verify_dump(old) == verify_dump(tmp_path / "merged") == []
    assert find_document(tmp_path / "merged", "2", nth=2).text == records(others)[2].document


def test_python_code_of_a_model_is_part_of_the_identity_where_it_runs(tmp_path: Path, model: Path) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    (own / "modeling_own.py").write_text("SCALE = 1.0\n")
    recipe = write_recipe(tmp_path, own, TEXTS[:3])
    folder = dump(recipe, "teacher.trust_remote_code=true")
    assert "code_sha256" in Manifest.load(folder).identity["teacher"]
    (own / "modeling_own.py").write_text("SCALE = 2.0\n")
    with pytest.raises(ValueError, match=r"holds another dump: teacher\.code_sha256"):
        dump(recipe, "teacher.trust_remote_code=true")
    shutil.rmtree(folder)
    assert "code_sha256" not in Manifest.load(dump(recipe)).identity["teacher"]  # it does not run


def test_a_resume_with_another_tokenizers_library_says_so_and_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:6])
    folder = dump(recipe)
    metadata = pq.read_schema(Manifest.load(folder).shards[0].path(folder)).metadata
    assert json.loads(metadata[b"bld.libraries"]).keys() == {"tokenizers", "transformers", "jinja2"}
    before = content(folder)
    Manifest.load(folder).shards[-1].path(folder).unlink()
    capsys.readouterr()
    monkeypatch.setattr("stage1_teacher.dump.begun.version", lambda name: "0.1")
    dump(recipe)
    assert "part-00000.parquet was made with other libraries (tokenizers" in capsys.readouterr().err
    assert content(folder).keys() == before.keys() and verify_dump(folder) == []
