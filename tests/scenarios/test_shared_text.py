"""Text that several engines and processes write, in a folder or a store: what one engine writes, whichever dies."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from schemas.storage import object_store
from schemas.storage.atomic import writer_name
from schemas.storage.locations import RemotePath, StoreError, location, names
from schemas.text_corpus import TextManifest, text_shards
from stage1_teacher.coordination import store_leases
from stage1_teacher.coordination.shard_work import ShardProgress
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.generation.base import Draw, Drawn
from stage1_teacher.generation.dry_run import print_plan
from stage1_teacher.generation.huggingface import TransformersGenerator
from stage1_teacher.generation.run import run_generate
from stage1_teacher.generation.writer import writer_section
from stage1_teacher.processes import child as child_module
from stage1_teacher.processes.local_engines import LocalEngines, machine_engines
from stage1_teacher.processes.shard_queue import ShardQueue
from tests.scenarios.test_store_dump import stored
from tests.stage1_teacher.dump.test_run import content
from tests.stage1_teacher.generation.test_run import rows_of, texts, write_recipe
from tests.support.ascii_models import ascii_model
from tests.support.object_store import ObjectStore, cut_off
from tests.support.tiny import END_OF_TEXT, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = texts([f"the thing {i} and é" for i in range(11)] + ["in a " * 40])
SETTINGS: dict[str, Any] = {"completions": 2, "shard_prompts": 2}
ON_TWO = ("placement.engines=2",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_model(tmp_path_factory.mktemp("ascii"), tiny_tokenizer(), END_OF_TEXT)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return what one engine writes: six shards, and one prompt that is left out."""
    recipe = write_recipe(tmp_path_factory.mktemp("alone"), model, PROMPTS, **SETTINGS)
    run_generate(load_recipe(recipe))
    return recipe.parent / "text"


def stored_rows(folder: RemotePath) -> list[dict[str, Any]]:
    tables = stored(folder)
    return [row for name in sorted(tables) for row in tables[name].to_pylist()]


def summary_of(folder: Path) -> str:
    return (folder / "summary.json").read_text()


def test_two_engines_of_which_one_is_killed_amid_a_shard_write_what_one_does(
    alone: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    collect = LocalEngines._collect

    def troubled(engines: LocalEngines, queue: ShardQueue | None) -> Iterator[ShardProgress]:
        working = [child for child in engines._children if child.ready and child.attempts]
        if working and not killed:
            killed.append(working[0].number)
            shard = next(iter(working[0].attempts)).shard.plan.path(tmp_path / "text")
            writer = writer_name().removesuffix(str(os.getpid())) + str(working[0].pid)
            shard.with_suffix(f".{writer}.partial").write_bytes(b"half")  # what a kill within a write leaves
            os.kill(working[0].pid, signal.SIGKILL)
        yield from collect(engines, queue)

    monkeypatch.setattr(LocalEngines, "_collect", troubled)
    recipe = load_recipe(write_recipe(tmp_path, model, PROMPTS, **SETTINGS), list(ON_TWO))
    run_generate(recipe, connect=machine_engines)
    folder = tmp_path / "text"
    assert rows_of(folder) == rows_of(alone) and summary_of(folder) == summary_of(alone)
    assert not list(folder.rglob("*.partial"))
    said = capsys.readouterr().err
    assert f"engine {killed[0]} is lost: killed by SIGKILL; it is started again" in said
    assert "2 engines\n" in said and said.count("complete;") == 1 and "12/12 prompts" in said


def test_an_engine_writes_by_the_section_from_which_it_is_written(alone: Path) -> None:
    """The process of an engine looks the writer up again, from a recipe that names it as its teacher."""
    student = f"student={{model: x, path: {alone}, end: '{END_OF_TEXT}', trust_remote_code: true}}"
    for overrides in ([], ["generate.writer=student", student], ["teacher.max_tokens=99", "teacher.license=mit"]):
        recipe = load_recipe(alone.parent / "recipe.yaml", overrides)
        section = writer_section(recipe)
        assert writer_section(recipe.with_values(teacher=section)) == section


def test_one_prompt_keeps_one_of_four_engines_and_a_worker_without_a_shard_writes_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child_module, "_COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))  # none is started
    path = write_recipe(tmp_path, model, PROMPTS[:1], **SETTINGS)
    recipe = load_recipe(path, ["placement.engines=4"])
    print_plan(recipe)
    assert "1 shard is to be written by 4 engines, of which 1 engine will do" in capsys.readouterr().out
    print_plan(recipe, (1, 4))
    assert "0 shards are to be written by worker 1 of 4, with one engine" in capsys.readouterr().out
    run_generate(recipe, worker=(1, 4))
    assert "1 shard is missing; other processes write the rest" in capsys.readouterr().err
    run_generate(recipe, connect=machine_engines)
    assert '"completions": 2,' in summary_of(tmp_path / "text")
    print_plan(recipe)
    assert "1 of 1 shard there" in capsys.readouterr().out
    for override in ("generate.seed=1", "generate.shard_prompts=7", "generate.prompts.max_bytes=3"):
        with pytest.raises(ValueError, match=r"text holds other text: (sampling\.s|prompts\.max_bytes)"):
            print_plan(load_recipe(path, [override]))


def test_processes_that_start_at_once_write_each_completion_once(alone: Path, tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, PROMPTS, **SETTINGS)
    command = [sys.executable, "-m", "pipeline", "generate", str(recipe)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert rows_of(tmp_path / "text") == rows_of(alone)
    assert "complete;" in "".join(said)


def test_text_in_a_store_is_that_of_a_folder_and_is_dumped_from_there(
    store: ObjectStore, alone: Path, tmp_path: Path, model: Path
) -> None:
    address = "s3://bucket/text"
    path = write_recipe(tmp_path, model, PROMPTS, **SETTINGS)
    overrides = [f"generate.path={address}", f"corpus.source={address}"]
    recipe = load_recipe(path, overrides)
    run_generate(recipe)
    folder = location(address)
    assert isinstance(folder, RemotePath)
    assert stored_rows(folder) == rows_of(alone)
    assert TextManifest.load(folder) == TextManifest.load(alone)
    assert {"corpus.json", "recipe.yaml", "summary.json", "README.md"} < names(folder) and not names(folder / "claims")
    run_generate(recipe, connect=machine_engines)  # complete: nothing is written
    with pytest.raises(ValueError, match=r"s3://bucket/text holds other text: sampling\.seed: 0 there, 1 here"):
        run_generate(load_recipe(path, [*overrides, "generate.seed=1"]))

    run_teacher(load_recipe(path, [*overrides, f"dump.path={tmp_path / 'from_store'}"]))
    local = load_recipe(path, [f"corpus.source={alone}", f"dump.path={tmp_path / 'from_folder'}"])
    run_teacher(local)
    assert content(tmp_path / "from_store") == content(tmp_path / "from_folder")
    with pytest.raises(ValueError, match=r"is a shard of the text written in s3://bucket/text; give that folder"):
        Corpus(recipe.corpus.model_copy(update={"source": f"{address}/shards/part-00000.parquet"}))
    with pytest.raises(ValueError, match=r"s3://bucket/nothing: unknown kind of file"):
        Corpus(recipe.corpus.model_copy(update={"source": "s3://bucket/nothing"}))


def test_a_process_killed_in_an_upload_leaves_no_shard_and_the_next_writes_what_is_missing(
    store: ObjectStore, alone: Path, tmp_path: Path, model: Path
) -> None:
    folder = location("s3://bucket/killed")
    assert isinstance(folder, RemotePath)
    recipe = write_recipe(tmp_path, model, PROMPTS, **SETTINGS, path=str(folder))
    command = [sys.executable, "-m", "pipeline", "generate", str(recipe)]
    with cut_off(store, b"PUT /bucket/killed/shards/part-00002.parquet", after_bytes=1000) as (environment, reached):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL)
        assert reached.wait(300)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert names(folder / "shards") == {"part-00000.parquet", "part-00001.parquet"}
    with pytest.raises(ValueError, match=r"s3://bucket/killed is not complete: 4 of 6 shards"):
        text_shards(folder)
    run_generate(load_recipe(recipe))
    assert stored_rows(folder) == rows_of(alone) and not names(folder / "claims")


def test_two_processes_on_one_store_write_each_shard_once(
    store: ObjectStore, alone: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model, PROMPTS, **SETTINGS, path="s3://bucket/shared")
    monkeypatch.setattr(store_leases, "_WAIT_SECONDS", 0.05)
    puts, create = [], object_store.create

    def counted(path: RemotePath, data: bytes) -> bool:
        puts.append(path.name)
        return create(path, data)

    turns, draw = threading.Lock(), TransformersGenerator._generate

    def in_turn(generator: TransformersGenerator, of_one: Draw) -> Drawn:
        with turns:  # threads share torch's random numbers, as processes do not
            return draw(generator, of_one)

    monkeypatch.setattr(TransformersGenerator, "_generate", in_turn)
    monkeypatch.setattr(object_store, "create", counted)
    workers = [threading.Thread(target=run_generate, args=(load_recipe(recipe),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    folder = location("s3://bucket/shared")
    assert isinstance(folder, RemotePath)
    assert sorted(name for name in puts if name.endswith(".parquet")) == sorted(names(folder / "shards"))
    assert stored_rows(folder) == rows_of(alone)


def test_a_store_that_cannot_hold_text_is_refused_by_name(
    store: ObjectStore, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, model, PROMPTS[:2], **SETTINGS)
    with pytest.raises(ValueError, match=r"hf://datasets/a/b: text cannot be made there.*Give a local generate\.path"):
        run_generate(load_recipe(path, ["generate.path=hf://datasets/a/b"]))
    with pytest.raises(StoreError, match=r"s3://other/d/.* cannot be written: .*AWS_ACCESS_KEY_ID"):
        run_generate(load_recipe(path, ["generate.path=s3://other/d"]))
    with pytest.raises(ValueError, match="an address must hold no user"):
        load_recipe(path, ["generate.path=s3://key:secret@bucket/d"])
    monkeypatch.setattr(object_store, "create", object_store.replace)
    with pytest.raises(ValueError, match=r"s3://bucket/old: this store overwrites.*Give a local generate\.path"):
        run_generate(load_recipe(path, ["generate.path=s3://bucket/old"]))


def test_prompts_that_change_while_they_are_answered_are_noticed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, model, PROMPTS[:4], **SETTINGS)
    recipe = load_recipe(path)
    source = Path(recipe.generate.prompts.source) if recipe.generate else tmp_path
    reader = Corpus.reader

    def edited(corpus: Corpus) -> Any:
        source.write_text(source.read_text().replace("thing 2", "thing 9"))
        return reader(corpus)

    monkeypatch.setattr(Corpus, "reader", edited)
    with pytest.raises(ValueError, match=r"the prompts have changed since .* shard 1 holds others \(2 to 4\)"):
        run_generate(recipe)
    assert [path.name for path in (tmp_path / "text" / "shards").glob("*.parquet")] == ["part-00000.parquet"]
    assert pq.read_table(tmp_path / "text" / "shards" / "part-00000.parquet").num_rows > 0
