"""Finding a dump complete costs nothing, and no change of its inputs goes unnoticed."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.corpus.documents import Corpus
from pipeline.sources import file_hash
from pipeline.sources.file_hash import known_sha256
from schemas.manifest import Manifest
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_run import TEXTS, content, dump, write_recipe
from tests.support.tiny import tiny_model

READERS = (
    "pipeline.corpus.documents.Corpus.placed",
    "pipeline.sources.file_hash.known_sha256",
    "stage1_teacher.dump.summary.check_seal",
    "stage1_teacher.dump.run.load_tokenizer",
    "stage1_teacher.dump.job.open_teacher",
)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record by name what is read of the corpus, the weights and the shards from now on."""
    found: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **keys: object) -> object:
            found.append(name.rpartition(".")[2])
            return real(*arguments, **keys)

        return run

    for name in READERS:
        module, _, attribute = name.rpartition(".")
        owner = Corpus if attribute == "placed" else __import__(module, fromlist=["_"])
        monkeypatch.setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    return found


def test_a_complete_dump_is_found_complete_without_reading_anything(
    tmp_path: Path, model: Path, reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:6])
    folder = dump(recipe)
    assert {"placed", "known_sha256", "check_seal", "load_tokenizer", "open_teacher"} <= set(reads)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    reads.clear()
    for worker in ((0, 1), (1, 4)):
        dump(recipe, worker=worker)
        assert "complete, and its inputs are unchanged" in capsys.readouterr().err
    assert reads == [] and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert str(tmp_path) not in (folder / "inputs.json").read_text()  # which goes where the dump goes


def test_whatever_changes_is_found_though_the_dump_is_complete(tmp_path: Path, reads: list[str]) -> None:
    model = tiny_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model, TEXTS[:6])
    folder = dump(recipe)
    first = Manifest.load(folder).shards[0].path(folder)

    def found() -> set[str]:
        reads.clear()
        dump(recipe)
        return set(reads)

    weights = model / "model.safetensors"
    os.utime(
        weights, ns=(1, 1)
    )  # the same weights, rewritten: they are compared; neither corpus nor shard is read again
    assert "known_sha256" in found() and not {"placed", "check_seal"} & set(reads) and found() == set()
    first.unlink()
    assert {"open_teacher", "check_seal"} <= found() and found() == set()
    (folder / "summary.json").unlink()
    assert "check_seal" in found() and "open_teacher" not in reads and found() == set()
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        found()
    first.unlink()
    assert "open_teacher" in found()
    write_recipe(tmp_path, model, TEXTS[:9])  # a longer corpus
    assert "open_teacher" in found() and json.loads((folder / "summary.json").read_text())["documents"] == 9
    assert found() == set() and verify_dump(folder) == []
    with pytest.raises(ValueError, match=r"sparsity\.top_k"):
        dump(recipe, "dump.top_k=3")
    write_recipe(tmp_path, model, ["another", *TEXTS[1:9]])
    with pytest.raises(ValueError, match=r"corpus\.sha256 differs"):
        found()
    write_recipe(tmp_path, model, TEXTS[:9])
    weights.write_bytes((tiny_model(tmp_path / "other", seed=1) / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"teacher\.weights_sha256"):
        found()


def test_a_shard_that_is_damaged_with_its_size_kept_is_named_though_the_dump_was_complete(
    tmp_path: Path, model: Path, reads: list[str]
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:2])
    folder = dump(recipe)
    shard = Manifest.load(folder).shards[0].path(folder)
    sound = shard.read_bytes()
    shard.write_bytes(sound[:100] + bytes([sound[100] ^ 1]) + sound[101:])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged.*delete it and run the same command again"):
        dump(recipe)
    shard.write_bytes(sound)
    dump(recipe)
    reads.clear()
    dump(recipe)
    assert reads == []


def test_a_file_that_comes_to_a_folder_of_files_is_found(tmp_path: Path, model: Path, reads: list[str]) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:6])
    source = tmp_path / "texts"
    source.mkdir()
    (tmp_path / "corpus.jsonl").rename(source / "a.jsonl")
    folder = dump(recipe, f"corpus.source={source}")
    reads.clear()
    dump(recipe, f"corpus.source={source}")
    assert reads == []
    (source / "b.txt").write_text("one more")
    dump(recipe, f"corpus.source={source}")
    assert len(Manifest.load(folder).shards) and json.loads((folder / "summary.json").read_text())["documents"] == 7


def test_a_corpus_that_changes_while_it_is_dumped_is_not_noted_as_what_was_dumped(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    from stage1_teacher.dump import run as module

    finish = module.finish

    def grows(job: module.DumpJob) -> None:
        finish(job)
        write_recipe(tmp_path, model, TEXTS[:5])

    monkeypatch.setattr(module, "finish", grows)
    folder = dump(recipe)
    monkeypatch.undo()
    assert not (folder / "inputs.json").exists()
    dump(recipe)
    assert json.loads((folder / "summary.json").read_text())["documents"] == 5


def test_a_dump_of_before_there_was_such_a_note_gets_one(tmp_path: Path, model: Path, reads: list[str]) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    folder = dump(recipe)
    before = content(folder)
    for damage in (Path.unlink, lambda note: note.write_text("{")):  # one that is damaged is as good as none
        damage(folder / "inputs.json")
        reads.clear()
        dump(recipe)
        assert "known_sha256" in reads and not {"placed", "check_seal"} & set(reads) and content(folder) == before
        reads.clear()
        dump(recipe)
        assert reads == []


def test_a_large_file_is_hashed_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hash, "_SMALL_BYTES", 10)
    hashed: list[Path] = []
    real = file_hash.sha256_of
    monkeypatch.setattr(file_hash, "sha256_of", lambda path: hashed.append(path) or real(path))
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 100)
    assert known_sha256(path) == known_sha256(path) == real(path)
    assert len(hashed) == 2  # it has just been written, and may be written again within the same tick
    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    assert [known_sha256(path) for _ in range(3)] == [real(path)] * 3 and len(hashed) == 3
    path.write_bytes(b"y" * 100)
    os.utime(path, (long_ago + 1, long_ago + 1))
    assert known_sha256(path) == real(path) and len(hashed) == 4
    [*kept] = (tmp_path / "cache" / "hashes").iterdir()
    for file in kept:
        file.write_text("damaged")
    assert known_sha256(path) == real(path) and len(hashed) == 5


def test_a_file_of_the_same_size_and_time_as_before_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hash, "_SMALL_BYTES", 10)
    path, other = tmp_path / "weights", tmp_path / "other"
    for file, letter in ((path, b"x"), (other, b"y")):
        file.write_bytes(letter * 100)
        os.utime(file, (1e9, 1e9))  # as an archive's files have it
    assert known_sha256(path) == file_hash.sha256_of(path)
    other.replace(path)
    assert known_sha256(path) == file_hash.sha256_of(path)
    path.write_bytes(b"z" * 100)
    os.utime(path, (1e9, 1e9))
    assert known_sha256(path) == file_hash.sha256_of(path)


def test_a_corpus_that_is_edited_with_its_size_and_time_kept_is_found(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:2])
    dump(recipe)
    corpus = tmp_path / "corpus.jsonl"
    before, text = corpus.stat(), corpus.read_text()
    corpus.write_text(text.replace("number 0", "number 9", 1))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert corpus.stat().st_size == before.st_size and corpus.read_text() != text
    with pytest.raises(ValueError, match=r"corpus\.sha256 differs"):
        dump(recipe)


def test_a_hubs_cache_tells_the_hash_of_its_blobs_by_their_names(tmp_path: Path) -> None:
    name = "ab" * 32
    for folder in ("blobs", "snapshots"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"weights")
    (tmp_path / "blobs" / "0123").write_bytes(b"a small file, by git's hash")
    for link, blob in (("model.safetensors", name), ("config.json", "0123")):
        (tmp_path / "snapshots" / link).symlink_to(tmp_path / "blobs" / blob)
    assert known_sha256(tmp_path / "snapshots" / "model.safetensors") == name
    small = tmp_path / "snapshots" / "config.json"
    assert known_sha256(small) == file_hash.sha256_of(small)
