"""Chats of which a student's template writes only some turns as they are stored.

These are learned, and the others counted by name.

The slow twin renders with transformers alone, once for each turn, as the student would see it when the turn comes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.runtime.huggingface import load_model
from pipeline.tokenization.assistant_turns import OTHERWISE
from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation, Excerpt
from pipeline.tokenization.special_ids import SpecialIds
from schemas.record import Record, Segment
from stage1_teacher.inputs.chat_windows import cut_chat
from stage1_teacher.inputs.turn_windows import cut_conversation
from stage2_student.data.align import with_segments
from stage2_student.data.encode import TurnsLeftOut, count_pieces, encode_pieces, encode_records
from stage2_student.data.examples import NO_LABEL, Example
from stage2_student.evaluation.asked_positions import asked_positions
from stage2_student.evaluation.divergence import ByteModel
from tests.scenarios.test_turn_dump import expected_targets
from tests.support.chat_turns import CALLED, answer, load_turns, result, talk, turn_model, turn_tokenizer, user
from tests.support.chats import CHAT_FAMILIES, chat, load_chat
from tests.support.small_dumps import make_record
from tests.support.stored_turns import (
    ENDS,
    as_it_comes,
    example_of,
    pieces_of,
    random_talk,
    record_of,
    rows_of,
    rows_of_messages,
    text_of,
)

OTHER_MERGES = ["t h", "a n", "o n", "i n"]
NO_REASONING = "the chat template leaves out the reasoning"
LATER = "the chat template writes an earlier turn otherwise once the chat goes on"
PAIRS = [(teacher, student) for teacher in ("qwen3", "qwen2_5", "smollm3") for student in ENDS if teacher != student]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_turn_that_both_templates_write_alike_is_learned_once_behind_the_students_own_rendering(
    teacher: str, student: str
) -> None:
    theirs, ours, wrapped = (
        load_turns(teacher),
        load_turns(student, OTHER_MERGES),
        turn_tokenizer(student, OTHER_MERGES),
    )
    end = theirs.end_of_turn()
    assert end is not None
    rng = np.random.default_rng()
    seen = Counter[str]()
    for _ in range(8):
        conversation = random_talk(rng, reasoning=0.0 if teacher == "qwen2_5" else 0.4)
        try:
            pieces = cut_conversation("c", conversation, theirs, [end], 100_000)
        except ChatError:
            continue
        for record in (record_of(piece, rng) for piece in pieces):
            whole = Conversation.from_json(record.conversation)
            first = len(whole.messages) - len(record.message_roles)
            edges = [0, *accumulate(record.message_lengths)]
            stored = [record.document[a:b].decode() for a, b in pairwise(edges)]
            rows = rows_of_messages(record)
            written = {number: as_it_comes(whole, first + number, student, wrapped) for number in rows}
            alike = [number for number in rows if written[number][1] == stored[number]]
            found = pieces_of(record, ours, None)
            if isinstance(found, str):
                assert not alike, (found, stored)
                seen["left out"] += 1
                continue
            encoded, counted = found
            examples = [example_of(one, ours) for one in encoded]
            assert sorted(row for example in examples for row in rows_of(example)) == sorted(
                row for number in alike for row in rows[number]
            )  # each once
            assert sum(turns for _, turns, _ in counted.left_out) == len(rows) - len(alike)
            assert sum(num_bytes for _, _, num_bytes in counted.left_out) == sum(
                len(stored[number].encode()) for number in rows if number not in alike
            )
            assert counted.renderings == len(examples)
            for example in examples:
                check_rendering(example, ours, written, stored, rows, whole, first, student, wrapped)
            seen["parted" if counted.left_out else "whole"] += 1
            seen["several"] += counted.renderings > 1
    assert seen


def check_rendering(
    example: Example,
    ours: ChatTokenizer,
    written: dict[int, tuple[str, str]],
    stored: Sequence[str],
    rows: dict[int, list[int]],
    whole: Conversation,
    first: int,
    student: str,
    wrapped: Any,
) -> None:
    """Check that the tokens are the last turn's rendering, with each learned turn in one run of tokens.

    Its END follows it.
    """
    here = rows_of(example)
    numbers = [number for number in rows if rows[number][0] in here]
    last = numbers[-1]
    prompt, said = written[last]
    text = wrapped.decode(example.tokens_L.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == prompt + said + ENDS[student]
    states = np.flatnonzero(example.labels_L != NO_LABEL)
    runs = np.split(states, np.flatnonzero(np.diff(states) > 1) + 1)
    assert len(runs) == len(numbers)
    for number, run in zip(numbers, runs, strict=True):
        tokens = example.labels_L[run].tolist()
        assert tokens == example.tokens_L[run + 1].tolist() and tokens[-1] == ours.end_of_turn()
        assert b"".join(ours.tokenizer.token_bytes[token] or b"" for token in tokens[:-1]).decode() == stored[number]
        before = wrapped.decode(example.tokens_L[: run[0] + 1].tolist(), skip_special_tokens=False)
        assert before.count(ENDS[student]) == written[number][0].count(
            ENDS[student]
        )  # it is that turn, and no other like it


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_contents_that_a_template_strips_are_context_as_it_writes_them_and_the_others_are_learned(family: str) -> None:
    loaded = load_chat(family, [*OTHER_MERGES, "Ċ a"])
    rng = np.random.default_rng()
    blanks = ["", "", " ", "\n"]
    for _ in range(15):
        words = rng.choice(["the", "and é", "an\nthing", "in <|im_end|>", "7"], 8)
        said = [
            f"{rng.choice(blanks) if i % 2 else ''}{w}{rng.choice(blanks) if i % 2 else ''}"
            for i, w in enumerate(words)
        ]
        messages = chat(*said)
        edges = [0, *accumulate(len(text.encode()) for text in said)]
        segments = [
            Segment(edges[i], edges[i + 1] - edges[i], True) for i in (3, 5, 7)
        ]  # the first turn is an earlier window's
        made = make_record("c", "".join(said).encode(), rng, segments)
        logprobs = made.logprobs.copy()
        logprobs[::4] = -(np.arange(made.num_positions) + 1) / 256
        record = replace(
            made,
            logprobs=logprobs,
            message_roles=tuple(m["role"] for m in messages),
            message_lengths=tuple(len(text.encode()) for text in said),
        )
        strips = CHAT_FAMILIES[family].strips
        written = [
            m | {"content": m["content"].strip()} if strips and m["role"] == "assistant" else m for m in messages
        ]
        kept = [i for i in (3, 5, 7) if written[i] == messages[i]]
        found = pieces_of(record, loaded, None)
        if not kept:
            assert found == "the chat template strips what the assistant says"
            continue
        assert not isinstance(found, str)
        [encoded], counted = found
        example, rows = example_of(encoded, loaded), rows_of_messages(record)
        # The same chat as the template writes it, of which all turns are whole.
        expected = loaded.encode(written)
        stop = max(
            t.last + (t.end_token is not None) for t in expected.turns if written[t.message] == messages[t.message]
        )
        assert example.tokens_L.tolist() == expected.tokens[:stop]
        asked = [
            rows[turn.message][turn.start - starts_at + offset]
            for starts in [[0, *accumulate(len(m["content"].encode()) for m in written)]]
            for turn in expected.turns
            if turn.message in kept
            for starts_at in [starts[turn.message]]
            for offset in range(turn.end - turn.start + (turn.end_token == loaded.end_of_turn()))
        ]
        assert sorted(rows_of(example)) == sorted(asked)
        left = [i for i in (3, 5, 7) if i not in kept]
        reason = "the chat template strips what the assistant says"
        num_bytes = sum(len(said[i].encode()) for i in left)
        assert counted.left_out == ((TurnsLeftOut(reason, len(left), num_bytes),) if left else ())


REASONED = talk(
    user("the?"), answer("and", "in and"), user("in?"), answer("no", "so"), user("an?"), answer("thing", "the")
)


def long_record(rng: np.random.Generator) -> Record:
    """Make a record for SmolLM3, which keeps earlier reasoning: three turns, the middle one long."""
    messages = [dict(message) for message in REASONED.messages]
    messages[3]["content"] = "and thing " * 30 + "no"
    smollm3 = load_turns("smollm3")
    end = smollm3.end_of_turn()
    assert end is not None
    [piece] = cut_conversation("c", talk(*messages), smollm3, [end], 100_000)
    return record_of(piece, rng)


def test_a_student_whose_template_drops_earlier_reasoning_learns_each_turn_in_its_own_rendering_long_ones_cut() -> None:
    rng, qwen3 = np.random.default_rng(0), load_turns("qwen3", OTHER_MERGES)
    record = long_record(rng)
    whole, pieces = pieces_of(record, qwen3, None), pieces_of(record, qwen3, 64)
    assert not isinstance(whole, str) and not isinstance(pieces, str)
    assert whole[1].renderings == pieces[1].renderings == len(whole[0]) == 3 and whole[1].left_out == ()
    assert len(pieces[0]) > 4 and max(pieces[1].tokens) <= 64
    rows = [Counter(row for one in found for row in rows_of(example_of(one, qwen3))) for found, _ in (whole, pieces)]
    assert rows[0] == rows[1] == Counter(range(record.num_positions))
    [strict] = encode_records([record], qwen3.tokenizer, 10**9, qwen3)
    assert strict == LATER


def test_a_run_that_began_with_whole_chats_leaves_out_what_it_left_out() -> None:
    rng, qwen3, llama = np.random.default_rng(0), load_turns("qwen3"), load_turns("llama3_1")
    qwen2 = load_turns("qwen2_5")
    end = qwen2.end_of_turn()
    assert end is not None
    called = talk(
        user("the?"), answer("", where="an"), result("7"), answer("yes"), user("in?"), answer("no"), tools=True
    )
    [piece] = cut_conversation("c", called, qwen2, [end], 100_000)
    for record, loaded, reason in ((long_record(rng), qwen3, LATER), (record_of(piece, rng), llama, OTHERWISE)):
        assert list(count_pieces([record], loaded.tokenizer, loaded, 64, by_turn=False)) == [reason]
        assert list(encode_pieces([record], loaded.tokenizer, loaded, 64, by_turn=False)) == [reason]
        assert not isinstance(pieces_of(record, loaded, 64), str)


def test_reasoning_in_a_content_that_the_teacher_took_for_text_is_learned_by_a_template_that_writes_it_so() -> None:
    """A teacher without reasoning (Qwen2.5) has dumped contents alone.

    Qwen3's template takes the reasoning out, and writes it anew.
    """
    rng, qwen2, qwen3 = np.random.default_rng(0), load_turns("qwen2_5"), load_turns("qwen3")
    end = qwen2.end_of_turn()
    assert end is not None
    inside = "<think>\nin and\n</think>\n\nand"
    [piece] = cut_chat("c", chat("the?", inside, "in?", "<think>so</think>no", "an?", inside), qwen2, [end], 100_000)
    record = record_of(piece, rng)
    assert record.conversation == ""
    found = pieces_of(record, qwen3, None)
    assert not isinstance(found, str)
    rows = rows_of_messages(record)
    learned = sorted(row for one in found[0] for row in rows_of(example_of(one, qwen3)))
    assert learned == sorted(rows[1] + rows[5]) and found[1].renderings == 2
    assert found[1].left_out == (TurnsLeftOut(OTHERWISE, 1, len("<think>so</think>no")),)


def test_targets_of_a_record_of_some_segments_are_those_of_the_whole_one() -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        edges = np.sort(rng.choice(np.arange(1, 40), 7, replace=False))
        segments = [Segment(int(a), int(b - a), bool(rng.integers(2))) for a, b in pairwise(edges)][::2]
        record = make_record("c", b"the and thing " * 3, rng, segments)
        kept = rng.random(len(segments)) < 0.5
        rows = [
            row
            for row, keep in zip(
                range(record.num_positions), np.repeat(kept, [s.num_positions for s in segments]), strict=True
            )
            if keep
        ]
        found = with_segments(record, kept.tolist())
        assert found.segments == tuple(s for s, keep in zip(segments, kept, strict=True) if keep)
        assert with_segments(text_of(record), kept.tolist()).segments == found.segments
        for column in ("entry_counts", "dropped", "token_end", "doubt"):
            assert getattr(found, column).tolist() == [getattr(record, column)[row] for row in rows]
        starts = np.cumsum(record.entry_counts.astype(int)) - record.entry_counts
        entries = [e for row in rows for e in range(starts[row], starts[row] + record.entry_counts[row])]
        for column in ("symbols", "logprobs"):
            assert getattr(found, column).tolist() == [getattr(record, column)[entry] for entry in entries]
        changed = {"segments", "entry_counts", "dropped", "token_end", "doubt", "symbols", "logprobs"}
        assert all(getattr(found, f.name) is getattr(record, f.name) for f in fields(record) if f.name not in changed)


def test_a_model_is_asked_about_each_turn_in_the_rendering_that_it_would_have_read(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), turn_model(tmp_path / "qwen3", "qwen3")
    smollm3, qwen3 = load_turns("smollm3"), ChatTokenizer.load(str(folder))
    ends = [loaded.end_of_turn() for loaded in (smollm3, qwen3)]
    assert ends[0] is not None and ends[1] is not None
    [piece] = cut_conversation("c", REASONED, smollm3, [ends[0]], 100_000)
    record = record_of(piece, rng)
    model = load_model(str(folder), torch.float32).eval()
    predicted = ByteModel(model, qwen3.tokenizer, SpecialIds(0, (ends[1],)), qwen3).predict(record)
    assert predicted.asked_P.all() and len(predicted.probs_PV) == record.num_positions
    texts = [record.document[segment.start : segment.start + segment.length] for segment in record.segments]
    expected = [
        expected_targets(folder, Excerpt(REASONED.until(index + 1), 2), text)
        for index, text in zip((1, 3, 5), texts, strict=True)
    ]
    np.testing.assert_allclose(predicted.probs_PV, np.concatenate(expected), rtol=0, atol=1e-4)


def test_turns_that_a_model_cannot_be_asked_about_are_counted_by_name_and_those_around_are_asked() -> None:
    rng, qwen2, llama = np.random.default_rng(0), load_turns("qwen2_5"), load_turns("llama3_1")
    end, its_end = qwen2.end_of_turn(), llama.end_of_turn()
    assert end is not None and its_end is not None
    [piece] = cut_conversation("c", CALLED, qwen2, [end], 100_000)
    record = record_of(piece, rng)
    asked_P, left_out = asked_positions(record, llama.tokenizer, llama, [its_end])
    rows = rows_of_messages(record)
    assert np.flatnonzero(asked_P).tolist() == rows[3] + rows[5] and left_out == {1: OTHERWISE}
    assert np.flatnonzero(~asked_P).tolist() == rows[1]
