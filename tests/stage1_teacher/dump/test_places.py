"""A dump is planned once: a resume and other workers go to their documents directly, and notice a changed corpus."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.corpus import rows
from pipeline.corpus.documents import Corpus
from schemas import dump_files
from schemas.manifest import Manifest
from stage1_teacher.verification.verify import verify_dump
from tests.stage1_teacher.dump.test_extend import files
from tests.stage1_teacher.dump.test_run import TEXTS, dump, write_recipe


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that every line of JSON parsed from here on is named in."""
    named: list[str] = []
    parse = rows._json_row
    monkeypatch.setattr(rows, "_json_row", lambda line, where: named.append(where) or parse(line, where))
    return named


def lose(folder: Path, index: int) -> None:
    Manifest.load(folder).shards[index].path(folder).unlink()


def test_a_resume_reads_the_missing_shards_documents_and_nothing_else(
    tmp_path: Path, model: Path, parsed: list[str]
) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:14]))
    before, planned = files(folder), len(parsed)
    last = Manifest.load(folder).shards[-1]
    lose(folder, -1)
    dump(tmp_path / "recipe.yaml")
    assert files(folder) == before and planned > 14
    assert len(parsed) - planned == last.num_documents


def test_another_worker_reads_its_own_shards_alone(tmp_path: Path, model: Path, parsed: list[str]) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:14])
    folder = dump(recipe, worker=(0, 2))
    planned = len(parsed)
    dump(recipe, worker=(1, 2))
    own = [shard for shard in Manifest.load(folder).shards if shard.index % 2]
    assert len(parsed) - planned == sum(shard.num_documents for shard in own) and verify_dump(folder) == []


def test_a_dump_of_an_earlier_release_is_planned_once_more_and_then_noted(
    tmp_path: Path, model: Path, parsed: list[str]
) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:8]))
    before = files(folder)
    for more in (8, 0):
        if more:
            (folder / dump_files.PLACES).unlink()
        lose(folder, 0)
        parsed.clear()
        dump(tmp_path / "recipe.yaml")
        assert len(parsed) == more + Manifest.load(folder).shards[0].num_documents and files(folder) == before


@pytest.mark.parametrize("damage", [b"", b"PAR1 and nothing else PAR1", None])
def test_a_note_that_is_damaged_or_of_another_plan_is_made_again(
    tmp_path: Path, model: Path, damage: bytes | None, parsed: list[str]
) -> None:
    folder, other = (dump(write_recipe(tmp_path / name, model, TEXTS[n : n + 6])) for n, name in enumerate("ab"))
    before = files(folder)
    (folder / dump_files.PLACES).write_bytes((other / dump_files.PLACES).read_bytes() if damage is None else damage)
    lose(folder, 0)
    parsed.clear()
    dump(tmp_path / "a/recipe.yaml")
    assert files(folder) == before and len(parsed) > 6


def test_rows_that_filters_leave_out_are_known_without_the_rows_before(
    tmp_path: Path, model: Path, parsed: list[str]
) -> None:
    texts = [text for pair in zip(TEXTS[:10], TEXTS[3:13], strict=True) for text in pair]
    recipe = write_recipe(tmp_path, model, texts)
    folder = dump(recipe, "corpus.unique=true")
    before = files(folder)
    assert Manifest.load(folder).corpus_counts["left out: a duplicate"] == 7
    for index in range(len(before)):
        lose(folder, index)
        parsed.clear()
        dump(recipe, "corpus.unique=true")
        assert files(folder) == before and len(parsed) < 20


def test_a_corpus_that_changed_is_noticed_though_it_was_planned_before(tmp_path: Path, model: Path) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:8]))
    corpus = tmp_path / "corpus.jsonl"
    before, text = corpus.stat(), corpus.read_text()
    lose(folder, -1)
    corpus.write_text(text.replace("number 0", "number 9", 1))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"corpus\.sha256 differs"):
        dump(tmp_path / "recipe.yaml")


def test_a_corpus_that_changes_after_it_was_planned_is_noticed_by_each_shards_hash(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dump(write_recipe(tmp_path, model, TEXTS[:8]))
    lose(folder, -1)
    reader = Corpus.reader

    def late(corpus: Corpus) -> object:
        path = tmp_path / "corpus.jsonl"
        path.write_text(path.read_text().replace("number 7", "number 9"))
        return reader(corpus)

    monkeypatch.setattr(Corpus, "reader", late)
    with pytest.raises(ValueError, match=r"the corpus has changed since the dump was planned: shard"):
        dump(tmp_path / "recipe.yaml")


def test_a_dump_of_compressed_lines_has_the_content_of_one_of_plain_lines(tmp_path: Path, model: Path) -> None:
    plain, packed = (write_recipe(tmp_path / name, model, TEXTS[:10]) for name in ("plain", "packed"))
    text = (tmp_path / "packed/corpus.jsonl").read_bytes()
    (tmp_path / "packed/corpus.jsonl").write_bytes(gzip.compress(text))
    folder = dump(packed, worker=(1, 3))
    for worker in ((0, 3), (2, 3)):
        dump(packed, worker=worker)
    assert files(folder) == files(dump(plain))


def test_of_processes_that_start_at_once_one_plans_and_the_others_wait(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:10])
    command = [sys.executable, "-m", "pipeline", "teacher", str(recipe)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum("is not read to plan" in one for one in said) == 1, said
    assert verify_dump(tmp_path / "dump") == []
