"""Written corpora: resume, refusal of other settings, what is counted, and what a dump makes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config import CorpusConfig
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from pipeline.dumps.licence import card_licence
from schemas.record import Record, Segment
from schemas.shard import read_shard
from schemas.text_corpus import TextManifest, text_shards
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.generation.dry_run import print_plan
from stage1_teacher.generation.prompts import TOO_LONG
from stage1_teacher.generation.run import run_generate
from stage1_teacher.verification.verify import verify_dump
from tests.support.ascii_models import ascii_model
from tests.support.chat_turns import turn_tokenizer
from tests.support.tiny import END_OF_TEXT, tiny_tokenizer

TEXTS = [f"the thing {i} and é" for i in range(7)]
LONG = "in a " * 40


def write_recipe(folder: Path, model: Path, rows: list[dict[str, Any]], **generate: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = {"source": str(source), **generate.pop("prompts", {})}
    recipe = {
        "corpus": {"source": str(folder / "text"), "field": prompts.get("field", "text")},
        "teacher": {
            "model": str(model), "engine": "transformers", "dtype": "float32", "max_tokens": 64, "overlap_tokens": 8,
            **({} if "field" in prompts else {"start": END_OF_TEXT, "end": [END_OF_TEXT]}),
        },
        "dump": {"path": str(folder / "dump")},
        "generate": {
            "path": str(folder / "text"), "prompts": prompts, "max_new_tokens": 12, "max_prompt_tokens": 40,
            "shard_prompts": 3, **generate,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def generate(recipe: Path, *overrides: str, worker: tuple[int, int] = (0, 1)) -> Path:
    run_generate(load_recipe(recipe, list(overrides)), worker)
    return recipe.parent / "text"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in text_shards(folder) for row in pq.read_table(path).to_pylist()]


def texts(contents: list[str]) -> list[dict[str, Any]]:
    return [{"text": content} for content in contents]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_model(tmp_path_factory.mktemp("ascii"), tiny_tokenizer(), END_OF_TEXT)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return a written corpus that no test may change: of seven prompts, and one that is too long."""
    rows = texts([*TEXTS, LONG])
    return generate(write_recipe(tmp_path_factory.mktemp("written"), model, rows, completions=2))


def test_a_corpus_holds_each_prompt_with_its_completions(written: Path) -> None:
    summary = json.loads((written / "summary.json").read_text())
    found = rows_of(written)
    assert summary["prompts"] == 8
    assert summary["completions"] == 14
    assert summary["kept"] == len(found)
    assert summary["left_out_prompts"] == {TOO_LONG: {"number": 1, "first": "7"}}
    assert len(found) + sum(c["number"] for c in summary["left_out_completions"].values()) == 14
    assert len(found) >= 10
    for row in found:
        prompt = TEXTS[int(row["prompt_id"])]
        assert row["doc_id"] == f"{row['prompt_id']}/{row['completion']}"
        assert row["text"].startswith(prompt)
        completion = row["text"].encode()[len(prompt.encode()) :]
        assert (row["segment_starts"], row["segment_lengths"]) == ([len(prompt.encode())], [len(completion)])
        assert row["segment_has_end"] == [row["is_finished"]]
        assert row["is_finished"] or row["num_tokens"] == 12
    assert len({row["seed"] for row in found}) == len(found)
    assert {row["is_finished"] for row in found} == {True, False}


def test_the_card_states_the_writers_licence_and_what_was_left_out(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, texts([*TEXTS[:1], LONG]))
    card = generate(recipe, "teacher.license=apache-2.0") / "README.md"
    assert card_licence(card) == "apache-2.0"
    assert f"left out: {TOO_LONG}" in card.read_text().replace("\\", "")


def test_what_is_written_depends_neither_on_shards_nor_on_other_prompts(
    written: Path, tmp_path: Path, model: Path
) -> None:
    recipe = write_recipe(tmp_path, model, [{"text": t, "id": str(i)} for i, t in enumerate(TEXTS)][3:5])
    other = generate(recipe, "generate.shard_prompts=1", "generate.prompts.id_field=id", "generate.completions=2")
    expected = [row for row in rows_of(written) if row["prompt_id"] in ("3", "4")]
    assert rows_of(other) == expected


def test_another_seed_writes_other_text_and_the_same_folder_refuses_it(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, texts(TEXTS[:3]))
    folder = generate(recipe)
    first = rows_of(folder)
    for override, named in (
        ("generate.seed=1", "sampling.seed: 0 there, 1 here"),
        ("generate.temperature=0.5", "sampling.temperature: 1.0 there, 0.5 here"),
        ("generate.prompts.limit=2", "prompts.sha256"),
    ):
        with pytest.raises(ValueError, match=named):
            generate(recipe, override)
    assert rows_of(folder) == first
    other = generate(recipe, "generate.seed=1", f"generate.path={tmp_path / 'other'}").parent / "other"
    assert [row["text"] for row in rows_of(other)] != [row["text"] for row in first]


def test_a_corpus_killed_at_any_moment_resumes_to_the_same_shards(written: Path, tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, texts([*TEXTS, LONG]), completions=2)
    shards = tmp_path / "text" / "shards"
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "generate", str(recipe)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600  # of a machine that does much else
    while not list(shards.glob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(shards.glob("*.parquet"))) > 0
    (shards / f"part-00002.{process.pid}.partial").write_bytes(b"half")
    folder = generate(recipe)
    assert not list(shards.glob("*.partial"))
    assert rows_of(folder) == rows_of(written)


def test_two_workers_write_what_one_does(written: Path, tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, texts([*TEXTS, LONG]), completions=2)
    folder = generate(recipe, worker=(0, 2))
    assert not (folder / "summary.json").exists()
    with pytest.raises(ValueError, match=r"not complete: 1 of 3 shards"):
        text_shards(folder)
    generate(recipe, worker=(1, 2))
    assert rows_of(folder) == rows_of(written)


def test_duplicates_are_counted_and_greedy_text_is_asked_for_once(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, texts(TEXTS[:2]), completions=3, top_k=1)
    folder = generate(recipe)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["left_out_completions"]["the same as an earlier completion of its prompt"]["number"] == 4
    with pytest.raises(ValueError, match="temperature 0 always gives the same one"):
        load_recipe(recipe, ["generate.temperature=0"])


def test_a_dump_of_it_supervises_what_was_written(written: Path, tmp_path: Path) -> None:
    recipe = load_recipe(written.parent / "recipe.yaml", [f"dump.path={tmp_path / 'dump'}"])
    run_teacher(recipe)
    assert verify_dump(tmp_path / "dump") == []
    records = dump_records(tmp_path / "dump")
    by_id = {row["doc_id"]: row for row in rows_of(written)}
    assert {record.doc_id for record in records} == by_id.keys()
    for record in records:
        row = by_id[record.doc_id]
        assert record.document == row["text"].encode()
        assert record.segments == (
            Segment(row["segment_starts"][0], row["segment_lengths"][0], row["segment_has_end"][0]),
        )
    identity = json.loads((tmp_path / "dump" / "manifest.json").read_text())["identity"]
    assert identity["corpus"]["supervise"] == "what was written"


def dump_records(dump: Path) -> list[Record]:
    return [record for path in sorted((dump / "shards").glob("*.parquet")) for record in read_shard(path)]


def test_a_selection_applies_to_what_was_written_alone(written: Path) -> None:
    config = load_recipe(written.parent / "recipe.yaml", ["corpus.supervise={pattern: '[a-z]+'}"]).corpus
    for document in Corpus(config).documents():
        row = next(row for row in rows_of(written) if row["doc_id"] == document.doc_id)
        assert document.segments
        assert all(s.start >= row["segment_starts"][0] for s in document.segments)
        assert all(document.text[s.start : s.start + s.length].isalpha() for s in document.segments)


def test_chats_are_answered_and_their_last_turn_is_dumped(tmp_path: Path) -> None:
    model = ascii_model(tmp_path / "model", turn_tokenizer("qwen3"), "<|im_end|>")
    said = [("user", "the?"), ("assistant", "and"), ("user", "<|im_end|> in?"), ("assistant", "dropped")]
    rows: list[dict[str, Any]] = [{"messages": [{"role": role, "content": content} for role, content in said]}] * 4
    rows.append({"messages": [{"role": "assistant", "content": "nothing before"}]})
    recipe = write_recipe(
        tmp_path, model, rows, prompts={"field": "messages"}, completions=2, max_prompt_tokens=60, reasoning="none"
    )
    folder = generate(recipe, "teacher.max_tokens=256")
    found = rows_of(folder)
    assert found
    for row in found:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user", "assistant"]
        assert row["messages"][2]["content"] == "<|im_end|> in?"
        assert row["messages"][3]["content"] not in ("", "dropped")
        assert row["supervised_messages"] == [3]
    run_teacher(load_recipe(recipe, ["teacher.max_tokens=256"]))
    assert verify_dump(tmp_path / "dump") == []
    for record in dump_records(tmp_path / "dump"):
        row = next(row for row in found if row["doc_id"] == record.doc_id)
        if record.segments:
            said_last = record.document[record.segments[0].start :].decode()
            assert said_last in row["messages"][3]["content"]
            assert record.segments[-1].has_end == row["is_finished"]
    with pytest.raises(ValueError, match=r"holds chats: set corpus\.field: messages"):
        Corpus(load_recipe(recipe, ["corpus.field=text"]).corpus)


def test_a_dry_run_says_what_would_be_written(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(load_recipe(written.parent / "recipe.yaml"))
    said = capsys.readouterr().out
    assert "2 of each prompt, of at most 12 tokens" in said and "in all: 16 completions, at most 192 tokens" in said
    assert "3 of 3 shards there" in said


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["generate=null"], "no generate section"),
        (["generate.writer=student"], "no student section"),
        (["generate.writer=student", "student={model: x, path: /nonexistent}"], "bld student"),
        (["generate.max_new_tokens=600"], "has 512 positions"),
        (["generate.engine=openai"], "needs placement.base_url"),
        (["generate.prompts.supervise={pattern: a}"], "a prompt is context as a whole"),
        (["generate.stop=['']"], "at least 1 character|a stop text is empty"),
        (["generate.completions=2", "generate.temperature=0"], "temperature 0 always gives the same one"),
    ],
)
def test_a_recipe_that_cannot_be_written_is_refused(written: Path, overrides: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        run_generate(load_recipe(written.parent / "recipe.yaml", overrides))


def test_written_text_is_no_dump_and_a_dump_is_no_place_for_it(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it holds text that `bld generate` wrote"):
        verify_dump(written)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a dump"):
        run_generate(load_recipe(written.parent / "recipe.yaml", [f"generate.path={tmp_path}"]))


def test_a_shard_alone_is_no_source_of_text(written: Path) -> None:
    for source in (written / "shards", written / "shards" / "part-00000.parquet", f"{written}/shards/*.parquet"):
        with pytest.raises(ValueError, match="is a shard of the text written in"):
            Corpus(CorpusConfig(source=str(source)))


def test_a_damaged_shard_is_named(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, texts(TEXTS[:1]))
    folder = generate(recipe)
    [path] = text_shards(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged"):
        generate(recipe)


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text('{"text_version": 9, "identity": {}, "shards": []}')
    with pytest.raises(ValueError, match="newer bld"):
        TextManifest.load(tmp_path)
