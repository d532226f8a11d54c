"""Students of chats: each renders the conversation from the shard alone, with its own template.

All learn the same bytes.
"""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.evaluated import EvaluatedModel
from pipeline.config.loading import load_recipe
from pipeline.covering.covering import Covering, exp_logits
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, document_of
from schemas import END
from schemas.manifest import Manifest
from schemas.record import Record, Segment
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import NO_LABEL, Encoded, Example, Masks, make_example
from stage2_student.data.micro_batch import Layout, collate
from stage2_student.evaluation.bits_per_byte import run_eval
from stage2_student.interfaces.base import StudentShape
from stage2_student.interfaces.token_marginal.interface import TokenMarginal
from stage2_student.launch.launch import launch_student
from stage2_student.losses.alm import chunk_bounds, chunk_tensors
from stage2_student.model.initial_student import end_tokens, export_start, student_tokenizer
from tests.support.chats import CHAT_FAMILIES, chat, chat_model, load_chat
from tests.support.scoring import score
from tests.support.small_dumps import make_recipe, make_record
from tests.support.tiny import tiny_model

MASKS = Masks(max_doubt=1.0, max_token_end=1.0)
CHAT = chat("the thing?", "and yes é", "in?", "\n\nan\nand", system="and so")


def chat_record(messages: list[dict[str, str]], cut: int = 0) -> Record:
    """Every turn is supervised, from its `cut`-th byte on."""
    segments, at = [], 0
    for message in messages:
        size = len(message["content"].encode())
        if message["role"] == "assistant":
            segments.append(Segment(at + cut, size - cut, True))
        at += size
    record = make_record("c", document_of(messages), np.random.default_rng(0), segments)
    return replace(
        record,
        message_roles=tuple(message["role"] for message in messages),
        message_lengths=tuple(len(message["content"].encode()) for message in messages),
    )


def example_of(loaded: ChatTokenizer, record: Record) -> Example:
    [encoded] = encode_records([record], loaded.tokenizer, 512, loaded)
    assert isinstance(encoded, Encoded)
    end = loaded.end_of_turn()
    assert end is not None
    return make_example(encoded, 77, end, 10, MASKS)


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_labels_and_bytes_are_what_the_assistant_says_and_the_end_of_its_turn(name: str, cut: int) -> None:
    loaded = load_chat(name)
    messages = CHAT if not CHAT_FAMILIES[name].strips else chat("the thing?", "and yes é", "in?", "an\nand")
    record = chat_record(messages, cut)
    example = example_of(loaded, record)
    tokens = loaded.encode(messages).tokens
    assert example.tokens_L.tolist() == tokens  # the template's own start: no other is put before
    end = loaded.tokenizer.token_id(CHAT_FAMILIES[name].end)
    labelled = [(state, label) for state, label in enumerate(example.labels_L.tolist()) if label != NO_LABEL]
    assert all(label == tokens[state + 1] for state, label in labelled)
    assert [label for _, label in labelled].count(end) == 2 and labelled[-1] == (len(tokens) - 2, end)
    # The bytes of the labels are those of the byte positions, and lie in the segments.
    of_labels = b"".join(loaded.tokenizer.token_bytes[label] or b"\xff" for _, label in labelled)
    order = np.lexsort((example.offset_P, example.state_P))
    assert bytes(example.symbols_P[order].tolist()) == of_labels
    parts = of_labels.split(b"\xff")[:-1]
    for part, segment in zip(parts, record.segments, strict=True):
        assert record.document[segment.start : segment.start + segment.length].endswith(part)
    assert example.num_bytes == sum(map(len, parts)) > 0
    if name not in ("mistral",) and cut == 0 and messages is not CHAT:
        assert b"".join(parts) == b"".join(m["content"].encode() for m in messages if m["role"] == "assistant")
    # Each position has the entries of its own byte: the made-up record stores the realised symbol first.
    assert (example.entry_symbols_PE[:, 0] == example.symbols_P).all()
    assert (example.symbols_P == END).sum() == 2


def test_chats_and_plain_text_train_side_by_side() -> None:
    loaded = load_chat("qwen")
    records = [make_record("p", b"the and", np.random.default_rng(1)), chat_record(CHAT)]
    examples = []
    for encoded in encode_records(records, loaded.tokenizer, 512, loaded):
        assert isinstance(encoded, Encoded)
        examples.append(make_example(encoded, 77, loaded.tokenizer.token_id("<|im_end|>"), 10, MASKS))
    assert examples[0].tokens_L[0] == 77 and examples[0].labels_L[-1] == examples[1].labels_L[-2]
    assert examples[1].tokens_L[0] == loaded.tokenizer.token_id("<|im_start|>")
    micro = collate(examples)
    assert micro.num_bytes == sum(example.num_bytes for example in examples)


def test_a_chat_that_the_students_template_changes_is_counted_under_its_reason() -> None:
    loaded = load_chat("gemma")
    records = [chat_record(chat("the", " and")), chat_record(chat("the", "and")), chat_record(chat("the" * 400, "and"))]
    strips, good, long = encode_records(records, loaded.tokenizer, 128, loaded)
    assert strips == "the chat template strips what the assistant says" and long == "longer than train.max_tokens"
    assert isinstance(good, Encoded)
    with pytest.raises(ValueError, match=r"give student\.chat_template"):
        encode_records(records, loaded.tokenizer, 512)


def test_chunks_of_a_chat_lie_in_its_turns_and_hold_all_of_them() -> None:
    """Chunks are tokens if both sides have one tokenizer and there is no threshold.

    Likelihoods of what lies between turns are in no chunk.
    """
    loaded = load_chat("qwen")
    messages = chat("the thing?", "and yes é", "in?", "an\nand")
    record = chat_record(messages)
    [encoded] = encode_records([record], loaded.tokenizer, 512, loaded)
    assert isinstance(encoded, Encoded)
    sizes, at = [], 0
    for turn in loaded.encode(messages).turns:
        tokens = loaded.encode(messages).tokens[turn.first : turn.last]
        sizes += [turn.start - at, *(len(loaded.tokenizer.token_bytes[token] or b"") for token in tokens)]
        at = turn.end
    lengths = np.array(sizes, dtype=np.int32)
    logprobs = -np.arange(len(lengths), dtype=np.float32)
    record = replace(record, teacher_token_lengths=lengths, teacher_token_logprobs=logprobs)
    encoded = replace(encoded, record=record)
    for bounds, segment in zip(chunk_bounds(encoded, 0.0), record.segments, strict=True):
        assert bounds[0] == segment.start and bounds[-1] == segment.start + segment.length
    found = chunk_tensors([encoded], Layout.of([encoded.num_tokens]), 0.0)
    gaps = [0, int(np.flatnonzero(np.cumsum(lengths) == record.segments[1].start)[0])]
    assert found["alm_teacher_C"].tolist() == [-i for i in range(len(lengths)) if i not in gaps]
    example = make_example(encoded, 77, loaded.tokenizer.token_id("<|im_end|>"), 10, MASKS)
    chunks = found["alm_chunk_BL"][0][torch.tensor(example.labels_L != NO_LABEL)].tolist()
    assert [chunk for chunk in chunks if chunk >= 0] == list(range(len(lengths) - 2)) and chunks.count(-1) == 2  # END


def test_token_marginal_reads_a_chat_as_the_covering_does() -> None:
    """The student's distributions at a chat's turns are those of a covering of the tokens between control tokens."""
    loaded = load_chat("qwen")
    end, width = loaded.tokenizer.token_id("<|im_end|>"), len(loaded.tokenizer.token_bytes)
    shape = StudentShape(16, width, loaded.tokenizer.token_bytes, loaded.tokenizer.prefix, (end,))
    interface = TokenMarginal(shape, max_dropped=1.0)
    [encoded] = encode_records([chat_record(CHAT)], loaded.tokenizer, 512, loaded)
    assert isinstance(encoded, Encoded)
    example = make_example(encoded, 77, end, None, MASKS)
    micro = collate([example])
    micro = replace(micro, extra=interface.prepare([encoded], [example], micro))
    generator = torch.Generator().manual_seed(0)
    hidden_BLD = torch.randn(1, len(example.tokens_L), 16, generator=generator, dtype=torch.float64)
    head = torch.randn(16, width, generator=generator, dtype=torch.float64) / 2
    found, _ = interface.marginals(hidden_BLD, micro, lambda hidden_ND: hidden_ND @ head)
    tokens, vocabulary = example.tokens_L.tolist(), interface.vocabulary
    control = [i for i, token in enumerate(tokens) if loaded.tokenizer.token_bytes[token] is None] + [len(tokens)]
    position = 0
    for first, last in pairwise(control):
        states = [i for i in range(first, last) if example.labels_L[i] != NO_LABEL]
        if not states:
            continue
        spelled = b"".join(loaded.tokenizer.token_bytes[token] or b"" for token in tokens[first + 1 : last])
        covering = Covering(vocabulary, tokens[first + 1 : last], spelled)
        logits_RC = (hidden_BLD[0, first:last] @ head).numpy()[:, vocabulary.order]
        targets = covering.targets(covering.reduce_rows(covering.offsets, exp_logits(logits_RC)))
        begin = int(covering.offsets[states[0] - first])
        wanted_PV = targets.probs_PV[begin:]
        ours_PV = found.logprobs_PV[position : position + len(wanted_PV) - 1].exp()  # bytes; ENDs come last
        np.testing.assert_allclose(ours_PV.numpy(), wanted_PV[:-1], atol=1e-9)
        position += len(wanted_PV) - 1
    assert position == int((example.symbols_P != END).sum()) > 0


def dump_of_chats(folder: Path, teacher: str) -> Path:
    """Make a dump with a tiny teacher of that family; return the path of the recipe."""
    chats = [chat("the thing?", "and yes é", f"in {i}?", "an\nand") for i in range(6)]
    model = chat_model(folder / "teacher", teacher)
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8")
    recipe = {
        "corpus": {"source": str(source), "field": "messages"},
        "teacher": {"model": str(model), "engine": "transformers", "dtype": "float32", "max_tokens": 256},
        "dump": {"path": str(folder / "dump"), "audit_documents": 0},
    }
    recipe["teacher"] |= {"overlap_tokens": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run_teacher(load_recipe(folder / "recipe.yaml", []))
    return folder / "dump"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump_of_chats(tmp_path_factory.mktemp("chats"), "llama3")


@pytest.mark.parametrize("name", ["qwen", "gemma", "mistral", "smollm2"])
def test_both_stages_supervise_the_same_bytes(dump: Path, name: str) -> None:
    """A student with another template and other merges learns the supervised bytes, to the turn's end."""
    loaded = load_chat(name, merges=["t h", "a n", "Ġ y", "o n"])
    records = [record for shard in Manifest.load(dump).shards for record in read_shard(shard.path(dump))]
    assert len(records) == 6
    for record in records:
        example = example_of(loaded, record)
        labels = [label for label in example.labels_L.tolist() if label != NO_LABEL]
        spelled = b"".join(loaded.tokenizer.token_bytes[label] or b"\xff" for label in labels)
        supervised = record.realised().tobytes()
        assert spelled == supervised if name != "mistral" else len(spelled) >= len(supervised) - 4
        realised = example.entry_symbols_PE == example.symbols_P[:, None]
        assert realised.any(axis=1).all()  # the shard stores what the document has at each position


def test_a_moved_student_takes_its_models_template_and_trains(dump: Path, tmp_path: Path) -> None:
    """A tokenizer without Qwen's template and control tokens gains both, and the export renders chats."""
    model, tokenizer = chat_model(tmp_path / "student", "qwen", seed=1), tiny_model(tmp_path / "other", merges=["o n"])
    run = tmp_path / "run"
    train = {"steps": 2, "batch_tokens": 300, "micro_batch_tokens": 300, "save_every": 1}
    recipe = make_recipe(dump, model, run, train, tokenizer=str(tokenizer))
    assert launch_student(recipe) == 0
    exported = AutoTokenizer.from_pretrained(run / "export")
    assert exported.apply_chat_template(CHAT, tokenize=False) == load_chat("qwen").template.apply(CHAT, [])
    loaded = ChatTokenizer.load(str(run / "export"))
    end = loaded.tokenizer.token_id("<|im_end|>")
    assert loaded.end_of_turn() == end == json.loads((run / "export" / "config.json").read_text())["eos_token_id"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    assert json.loads((run / "summary.json").read_text())["left_out"] == {}
    identity = json.loads((run / "identity.json").read_text())
    assert len(identity["student"]["template_sha256"]) == 64 and identity["student"]["end_id"] == end


def test_control_tokens_keep_their_rows_when_a_student_moves(dump: Path, tmp_path: Path) -> None:
    model, tokenizer = chat_model(tmp_path / "student", "qwen", seed=1), tiny_model(tmp_path / "other", merges=["o n"])
    recipe = make_recipe(dump, model, tmp_path / "run", {}, tokenizer=str(tokenizer))
    start = export_start(recipe, chats=True)
    old, new = ByteTokenizer.load(str(model)), ByteTokenizer.load(str(start))
    rows = [
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach() for folder in (model, start)
    ]
    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert (rows[0][old.token_id(name)] == rows[1][new.token_id(name)]).all()


def test_a_template_can_be_given_as_a_file_or_as_another_tokenizer(dump: Path, tmp_path: Path) -> None:
    model = chat_model(tmp_path / "student", "qwen")
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}", encoding="utf-8"
    )
    given: list[tuple[str, str]] = [
        (str(tmp_path / "own.jinja"), "<|im_start|>user: a<|im_end|>"),
        (str(chat_model(tmp_path / "gemma", "gemma")), "<start_of_turn>user\na<end_of_turn>\n"),
    ]
    for source, rendered in given:
        recipe = make_recipe(dump, model, tmp_path / "run", {}, chat_template=source)
        assert recipe.student is not None
        tokenizer, chats, wrapped = student_tokenizer(recipe.student, chats=True)
        assert chats is not None
        assert wrapped.apply_chat_template(chat("a"), tokenize=False).endswith(rendered)
        assert end_tokens(recipe.student, tokenizer, chats).end == chats.end_of_turn() is not None


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({}, "there is no chat template in .*, but the dump holds chats"),
        ({"end": "<|endoftext|>"}, "the student's chat template ends an assistant turn with another token"),
    ],
)
def test_a_student_without_template_or_with_another_end_is_refused(
    tmp_path: Path, student: dict[str, Any], message: str
) -> None:
    model = chat_model(tmp_path / "qwen", "qwen") if student else tiny_model(tmp_path / "plain")
    config = make_recipe(tmp_path, model, tmp_path, {}, **student).student
    assert config is not None
    with pytest.raises(ValueError, match=message):
        tokenizer, chats, _ = student_tokenizer(config, chats=True)
        end_tokens(config, tokenizer, chats)


def test_bits_per_byte_of_chats_are_those_of_what_the_assistant_says(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "model", "qwen")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = ChatTokenizer.load(str(folder))
    chats = [CHAT, chat("the", "in"), chat("the", "a" * 400)]
    nats, num_bytes = 0.0, 0
    for messages in chats:
        encoded = loaded.encode(messages)
        logprobs_LV = model(torch.tensor([encoded.tokens])).logits[0].detach().double().log_softmax(-1)
        for turn in encoded.turns:
            nats -= sum(float(logprobs_LV[at - 1, encoded.tokens[at]]) for at in range(turn.first, turn.last))
            num_bytes += turn.end - turn.start
    found = score(model, loaded.tokenizer, chats, 0, chat=loaded)
    assert found["bits_per_byte"] == pytest.approx(nats / (num_bytes * math.log(2)), rel=1e-5)
    assert found["num_bytes"] == num_bytes and found["left_out"] == {}


def test_a_teacher_has_no_divergence_to_its_own_dump_of_chats_and_another_model_has_some(dump: Path) -> None:
    teacher = dump.parent / "teacher"
    own = run_eval([EvaluatedModel("own", ModelSource(str(teacher)))], {}, dump)["own"]["dump"]
    records = [record for shard in Manifest.load(dump).shards for record in read_shard(shard.path(dump))]
    assert own["positions"] == sum(record.num_positions for record in records) and own["records"] == len(records)
    assert own["jsd_nats"] < 2e-3
    mistral = chat_model(dump.parent / "other", "mistral", seed=3)
    other = run_eval([EvaluatedModel("other", ModelSource(str(mistral)))], {}, dump)["other"]["dump"]
    assert other["jsd_nats"] > 0.01 and 0 < own["positions"] - other["positions"] <= 4 * len(records)
