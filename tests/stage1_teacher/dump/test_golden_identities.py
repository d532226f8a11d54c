"""Dumps begun by an earlier release continue under this one, and under one with more keys.

Differences are refused by name.
"""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from pipeline.config.loading import load_recipe
from pipeline.dumps import hub
from pipeline.dumps.card import write_card
from pipeline.runtime import dtypes
from pipeline.sources.file_hash import weights_sha256
from schemas.manifest import Manifest, write_json
from stage1_teacher.dump.begun import as_begun
from stage1_teacher.dump.merge import merge_dumps
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.verification.verify import verify_dump
from tests.pipeline.dumps.test_hub import FakeHub
from tests.support.added_keys import OF_A_DUMP, use_added_keys
from tests.support.golden_identities import DUMPS, RECIPES, TEXTS, lay_out, write_texts
from tests.support.old_names import with_new_names, with_old_names

NAMES = list(RECIPES)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    lay_out(folder)
    return folder


@pytest.fixture
def work(laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill the current folder with models, texts, recipes and the release's manifests.

    The manifests have this machine's hashes.
    """
    work = Path(shutil.copytree(laid_out, tmp_path / "work"))
    monkeypatch.chdir(work)
    for name in NAMES:
        manifest = json.loads((DUMPS / f"manifest-arithmetic-2-{name}.json").read_text(encoding="utf-8"))
        teacher = manifest["identity"]["teacher"]
        assert teacher["model"] == RECIPES[name]["teacher"]["model"]
        loaded = load_tokenizer(load_recipe(work / f"{name}.yaml"))
        # As libraries write them here; what the recipe decides is the release's.
        teacher["weights_sha256"] = weights_sha256(teacher["model"], None)
        teacher["tokenizer_sha256"] = loaded.tokenizer.sha256
        teacher["engine"] = f"transformers-{transformers.__version__}"
        if loaded.chat is not None:
            teacher["template_sha256"] = loaded.chat.template.sha256
        Path(name).mkdir()
        write_json(Path(name) / "manifest.json", manifest)
    return work


def bld_teacher(name: str, *overrides: str) -> Manifest:
    recipe = load_recipe(f"{name}.yaml", overrides)
    run_teacher(recipe)
    return Manifest.load(Path(recipe.dump.path))


@pytest.mark.parametrize("keys", ["this release's keys", "more keys"])
@pytest.mark.parametrize("name", NAMES)
def test_a_dump_that_a_release_began_is_resumed_verified_extended_pushed_and_merged(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, keys: str
) -> None:
    if keys == "more keys":
        use_added_keys(monkeypatch)
    before, dump = Manifest.load(Path(name)), Path(name)
    assert bld_teacher(name) == before
    assert verify_dump(dump) == []
    fake = FakeHub(tmp_path / "hub")
    hub.push(dump, "a/b", api=fake)
    write_texts(work, 8)
    grown = bld_teacher(name)
    assert grown.identity == {**before.identity, "corpus": grown.identity["corpus"]} and len(grown.shards) >= len(
        before.shards
    )
    assert sum(s.num_documents for s in grown.shards) == sum(s.num_documents for s in before.shards) + 2
    assert verify_dump(dump) == []
    hub.push(dump, "a/b", api=fake)
    other = work / "more.jsonl"
    source = Path(f"{'plain' if name == 'default' else 'chats'}.jsonl")
    write_texts(work, len(TEXTS))
    other.write_text("".join(f"{line}\n" for line in source.read_text(encoding="utf-8").splitlines()[9:]), "utf-8")
    bld_teacher(name, "dump.path=new", f"corpus.source={other.name}")
    merge_dumps(Path("merged"), [dump, Path("new")])
    assert verify_dump(Path("merged")) == []
    assert Manifest.load(Path("merged")).identity.keys() == before.identity.keys()


def test_another_value_of_a_key_that_came_later_is_refused_by_its_name(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_added_keys(monkeypatch)
    for key, named in OF_A_DUMP.items():
        with pytest.raises(ValueError, match=rf"holds another dump: {named}: 'as ever' there, 'new' here\. "):
            bld_teacher("everything", f"{key}=new")
    write_texts(work, 8)
    bld_teacher("default")
    bld_teacher("default", "dump.path=new", "dump.covering.method=new", "corpus.skip=7")
    with pytest.raises(ValueError, match=r"cannot be merged: they differ in covering\.method: 'as ever' there"):
        merge_dumps(Path("merged"), [Path("default"), Path("new")])


def test_a_dump_goes_on_in_the_dtype_it_was_begun_in_on_a_machine_that_would_begin_it_in_another(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = Manifest.load(Path("default")).identity["teacher"]["dtype"]
    here = {"bfloat16": "float32", "float32": "bfloat16"}[stored]
    monkeypatch.setattr(dtypes, "cpu_build", lambda: here == "float32")
    monkeypatch.setattr(dtypes, "slow_bfloat16", lambda: True)
    dtypes.natural_dtype.cache_clear()
    try:
        recipe = load_recipe("default.yaml")
        assert recipe.teacher.dtype == here and as_begun(recipe).teacher.dtype == stored
        assert f"default: continues in {stored}, in which it was begun; a new dump here would be in {here}" in (
            capsys.readouterr().err
        )
        asked = load_recipe("default.yaml", [f"teacher.dtype={here}", "dump.path=default"])
        assert as_begun(asked).teacher.dtype == here
        with pytest.raises(ValueError, match=rf"holds another dump: teacher\.dtype: '{stored}' there, '{here}' here"):
            run_teacher(asked)
        assert as_begun(load_recipe("default.yaml", ["dump.path=fresh"])).teacher.dtype == here
    finally:
        dtypes.natural_dtype.cache_clear()


def test_a_merge_into_another_merges_folder_is_refused_by_name(work: Path) -> None:
    for path, skip in (("one", 0), ("two", 2), ("three", 4)):
        bld_teacher("default", f"dump.path={path}", f"corpus.skip={skip}", "corpus.limit=2")
    merge_dumps(Path("merged"), [Path("one"), Path("two")])
    with pytest.raises(ValueError, match=r"merged holds another dump: corpus\.sha256: '.*they hold other documents"):
        merge_dumps(Path("merged"), [Path("one"), Path("three")])
    assert Path("merged/summary.json").exists()


def test_a_dump_begun_under_the_old_names_of_keys_goes_on_under_the_new_ones_and_its_stored_recipe_is_read_in_silence(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, operators, stored = (
        Manifest.load(Path("everything")),
        Path("everything.yaml"),
        Path("everything/recipe.yaml"),
    )
    assert "merge_after" in operators.read_text()
    operators.write_text(with_new_names(operators.read_text()))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"holds another dump: covering\.rejoin_after_tokens: 2 there, 3 here\. "):
        bld_teacher("everything", "dump.covering.rejoin_after_tokens=3")
    assert bld_teacher("everything") == before
    stored.write_text(with_old_names(stored.read_text()))
    assert "merge_after: 2" in stored.read_text() and "most_engines" in stored.read_text()
    assert verify_dump(Path("everything"), 1) == []
    write_card(Path("everything"))
    bld_teacher("everything", "dump.path=new", "corpus.skip=0", "corpus.limit=1")
    merge_dumps(Path("merged"), [Path("everything"), Path("new")])
    merged = Path("merged/recipe.yaml")
    assert load_recipe(merged) == load_recipe(stored, ["dump.path=merged"]) and "merge_after" not in merged.read_text()
    assert "is called" not in capsys.readouterr().err
