"""Students of chats with reasoning and calls: each renders the conversation itself.

It learns what the teacher was asked, or says why not.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import CorpusConfig
from pipeline.config.evaluated import EvaluatedModel
from pipeline.config.loading import load_recipe
from pipeline.corpus.regions import ChatParts, TextParts
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.conversation import Excerpt
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard
from schemas.storage.locations import location
from stage1_teacher.dump.run import run_teacher
from stage2_student.data.encode import Pieces, TurnsLeftOut, count_pieces, encode_records
from stage2_student.data.examples import NO_LABEL, Encoded, Masks, make_example
from stage2_student.evaluation.bits_per_byte import run_eval
from stage2_student.launch.launch import launch_student
from stage2_student.training.held_out import _from_json, _to_json
from tests.scenarios.test_chat_dump import write_recipe
from tests.scenarios.test_turn_dump import row
from tests.support.chat_turns import CALLED, REASONED, answer, load_turns, result, talk, turn_model, user
from tests.support.small_dumps import make_recipe

MASKS = Masks(max_doubt=1.0, max_token_end=1.0)
OTHER_MERGES = ["t h", "a n", "o n"]
OTHERWISE = "the chat template writes reasoning or calls otherwise than the teacher's"
ROWS = [row(REASONED), row(CALLED)]


def dump_by(folder: Path, name: str) -> Path:
    """Make a dump of both conversations, as far as that family's template writes them."""
    model = turn_model(folder / "teacher", name)
    run_teacher(load_recipe(write_recipe(folder, model, ROWS), ["teacher.max_tokens=1024", "dump.audit_documents=0"]))
    return folder / "dump"


def records_of(dump: Path) -> list[Record]:
    return [record for shard in Manifest.load(dump).shards for record in read_shard(shard.path(dump))]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump_by(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump_by(tmp_path_factory.mktemp("qwen2_5"), "qwen2_5")


def learned(name: str, records: list[Record]) -> list[str]:
    """Return for each record the bytes of the student's labels, END as a bar, or why it is left out."""
    chat = load_turns(name, OTHER_MERGES)
    found = []
    end = chat.end_of_turn()
    assert end is not None
    for encoded in encode_records(records, chat.tokenizer, 2048, chat):
        if not isinstance(encoded, Encoded):
            found.append(encoded)
            continue
        example = make_example(encoded, 77, end, None, MASKS)
        assert example.tokens_L.tolist() == [encoded.start, *encoded.tokens.tolist()]
        labels = [label for label in example.labels_L.tolist() if label != NO_LABEL]
        spelled = b"".join(chat.tokenizer.token_bytes[label] or b"\xff" for label in labels)
        realised = example.entry_symbols_PE == example.symbols_P[:, None]
        assert realised.any(axis=1).all()  # each position has the entries of its own byte
        order = np.lexsort((example.offset_P, example.state_P))
        assert bytes(example.symbols_P[order].tolist()) == spelled
        found.append(spelled.replace(b"\xff", b"|").decode())
    return found


def test_a_student_of_the_same_template_learns_all_that_was_dumped(qwen3: Path) -> None:
    records = records_of(qwen3)
    assert learned("qwen3", records) == [r.realised().tobytes().replace(b"\xff", b"|").decode() for r in records]
    assert learned("qwen3", records)[0] == "<think>\nin and\n</think>\n\nand yes é|"


def test_a_student_whose_template_agrees_on_calls_learns_these_and_the_rest_is_counted(qwen3: Path) -> None:
    found = learned("qwen2_5", records_of(qwen3))
    call = '<tool_call>\n{"name": "look", "arguments": {"where": "an \\"é\\"", "n": 3}}\n</tool_call>|'
    assert found[3:] == [call, "yes, 7|", "no|"]
    assert found[:2] == ["the chat template leaves out the reasoning"] * 2 and found[2] == "thing|"


def test_a_student_whose_template_writes_calls_otherwise_is_told_so(qwen3: Path, qwen2_5: Path) -> None:
    assert learned("llama3_1", records_of(qwen3))[3:] == [OTHERWISE, "yes, 7|", "no|"]
    [record] = records_of(qwen2_5)  # one record of three turns, of which one differs
    assert learned("llama3_1", [record]) == [OTHERWISE] and learned("smollm3", [record]) == [OTHERWISE]
    chat = load_turns("llama3_1")
    [counted] = count_pieces([record], chat.tokenizer, chat, None)  # it is used without that turn
    assert isinstance(counted, Pieces) and counted.left_out == (TurnsLeftOut(OTHERWISE, 1, record.segments[0].length),)
    assert list(count_pieces([record], chat.tokenizer, chat, None, by_turn=False)) == [OTHERWISE]


def test_a_student_that_drops_what_came_earlier_finds_the_turns_of_one_rendering(qwen2_5: Path) -> None:
    [record] = records_of(qwen2_5)
    assert learned("qwen3", [record]) == [record.realised().tobytes().replace(b"\xff", b"|").decode()]


def test_a_run_counts_what_it_leaves_out_by_name_and_learns_the_rest(qwen3: Path, tmp_path: Path) -> None:
    model = turn_model(tmp_path / "student", "qwen2_5", seed=1, merges=OTHER_MERGES)
    train = {
        "steps": 2,
        "warmup_steps": 0,
        "batch_tokens": 1200,
        "micro_batch_tokens": 1200,
        "max_tokens": 1024,
        "save_every": 2,
    }
    assert launch_student(make_recipe(qwen3, model, tmp_path / "run", train)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["left_out"]) == {"the chat template leaves out the reasoning"}  # each time that their turn came
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]  # of more than an epoch
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)


def test_the_teacher_itself_is_no_distance_from_its_dump_and_all_models_are_scored_on_the_same_turns(
    qwen3: Path, tmp_path: Path
) -> None:
    teacher = EvaluatedModel("teacher", ModelSource(str(qwen3.parent / "teacher")), "<|im_start|>")
    more = row(talk(user("the?"), answer("", n=1), result("7"), answer("and"), tools=True))
    source = tmp_path / "held_out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in [*ROWS, more]), encoding="utf-8")
    corpora = {"held_out": CorpusConfig(source=str(source), field="messages")}
    alone = run_eval([teacher], corpora, location(str(qwen3)))["teacher"]
    assert alone["dump"]["records"] == 6 and alone["dump"]["jsd_nats"] < 3e-3 and alone["dump"]["left_out"] == {}
    supervised = sum(s.length for record in records_of(qwen3) for s in record.segments)
    call = '<tool_call>\n{"name": "look", "arguments": {"n": 1}}\n</tool_call>'
    figures = alone["held_out"]
    assert figures["num_documents"] == 8 and figures["num_bytes"] == supervised + len(call) + len("and")
    assert figures["left_out"] == {}
    llama = EvaluatedModel("llama", ModelSource(str(turn_model(tmp_path / "llama", "llama3_1"))), "<s>")
    both = run_eval([teacher, llama], corpora)
    for job in ("teacher", "llama"):
        assert both[job]["held_out"]["num_bytes"] == len("thing") + len("yes, 7no") + len("and")
        assert both[job]["held_out"]["left_out"] == {
            "llama: the chat template leaves out the reasoning": 2,
            "the models' chat templates write reasoning or calls differently": 2,
        }


def test_ranks_tell_each_other_a_turn_as_it_is() -> None:
    parts = (TextParts(b"and \xc3\xa9", ((0, 1), (2, 5))), ChatParts(({"role": "user", "content": "the?"},), (1, 3)))
    for text in (b"and \xc3\xa9", ({"role": "user", "content": "the?"},), Excerpt(CALLED, 2), *parts):
        assert _from_json(json.loads(json.dumps(_to_json(text)))) == text
