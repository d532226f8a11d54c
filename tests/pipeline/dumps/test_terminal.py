"""`bld inspect` on a dump whose figures are known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.dumps import positions, search, statistics, terminal, view
from pipeline.reports.document_page import write_page
from pipeline.tokenization.conversation import Conversation
from schemas.record import Segment
from schemas.token_alternatives import TokenAlternatives
from schemas.token_vocabulary import write_vocabulary
from tests.support.readable_dumps import IDENTITY, cut_positions, make_dump, make_record, varied_record, write_dump


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return make_dump(tmp_path / "dump")


def test_the_summary_counts_documents_once_whatever_their_windows(dump: Path) -> None:
    summary = statistics.dump_statistics(dump)
    assert (summary["documents"], summary["records"]) == (3, 4)
    assert (summary["shards_done"], summary["shards_planned"]) == (2, 3)
    assert summary["text_bytes"] == 6 + 5 + 4 + 1
    assert summary["positions"] == summary["text_bytes"] + 3  # three documents end


def test_the_summary_gives_the_targets_one_bit_per_byte_and_a_quarter_of_tail(dump: Path) -> None:
    summary = statistics.dump_statistics(dump)
    assert summary["target_bits_per_byte"] == pytest.approx(1.0, abs=1e-3)
    assert summary["mean_tail"] == pytest.approx(0.25, abs=1e-3)
    assert summary["entry_count_positions"] == {2: summary["positions"]}
    assert summary["mean_token_end"] == pytest.approx(0.25)


def test_offsets_of_a_later_window_are_those_of_the_document(dump: Path) -> None:
    found = list(view.find_document(dump, "beta").positions())
    assert [p.offset for p in found] == list(range(10))
    assert [p.token_starts for p in found[:5]] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [(0x61, "a"), (0x20, "␠"), (0x0A, "\\n"), (0xC3, "c3"), (0x00, "00"), (0xFF, "END"), (0x7F, "7f")],
)
def test_symbols_are_readable(symbol: int, name: str) -> None:
    assert terminal.symbol_name(symbol) == name


def test_the_table_is_aligned_and_plain_when_piped(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(dump, terminal.Selection("alpha"), top=1, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 7  # a header, six bytes, END
    assert "\x1b" not in "".join(lines)
    shares = ["0.2500", "0.0000", "0.2500", "0.0000"]  # of the tail first
    assert lines[1].split() == ["0", "|", "a", "1.00", *shares, "a", "0.5000", "|a␠|", "-1.00", "nats"]
    assert len({line.index(".") for line in lines[1:]}) == 1


def test_json_holds_every_entry(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(dump, terminal.Selection("gamma"), top=1, as_json=True)
    (first, end) = json.loads(capsys.readouterr().out)["positions"]
    assert [symbol for symbol, _ in first["symbols"]] == [ord("x"), ord("y")]
    assert end["realised"] == 255
    terminal.show(dump, top=1, as_json=True)
    assert json.loads(capsys.readouterr().out)["documents"] == 3


@pytest.fixture
def token_dump(tmp_path: Path) -> Path:
    """Write a document with two tokens, and what the ids of its alternatives spell."""
    record = make_record("alpha", b"abc")
    found = TokenAlternatives(
        np.array([0, 3, 5]),
        np.array([7, 2, 9, 1, 3], dtype=np.int32),
        np.log([0.5, 0.25, 0.125, 0.75, 0.125]).astype(np.float32),
        np.array([9, 1], dtype=np.int32),
        np.log([0.125, 0.75]).astype(np.float32),
        np.log([0.01, 0.25, 0.5]).astype(np.float32),
    )
    identity = IDENTITY | {"tokens": {"top_k": 3, "min_prob": 0.0}}
    dump = write_dump(tmp_path / "tokens", [[replace(record, tokens=found)]], identity=identity)
    write_vocabulary(dump, [None, b"c", b"<b>", b"\xc3", None, None, None, b" a", None, b"ab"])
    return dump


def test_alternatives_of_a_token_are_shown_under_its_first_byte_and_the_end_token_at_the_end(
    token_dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.show(token_dump, terminal.Selection("alpha"), top=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 3
    assert lines[2].split("  ")[5:] == ["tokens", "|␠a| 0.5000", "|ab| 0.1250", "tail 0.1250", "end token 0.0100"]
    assert lines[5].split() == ["tokens", "|c|", "0.7500", "tail", "0.1250", "end", "token", "0.2500"]
    assert lines[7].split() == ["tokens", "end", "token", "0.5000"]
    terminal.show(token_dump, terminal.Selection(find="c"), top=2)
    assert "|c| 0.7500  <c3> 0.1250" in capsys.readouterr().out
    terminal.show(token_dump, terminal.Selection("alpha"), as_json=True)
    first, second, _, _ = json.loads(capsys.readouterr().out)["positions"]
    assert "tokens" not in second and first["tokens"]["own"] == 9
    assert first["tokens"]["alternatives"][1] == {"id": 2, "bytes": [*b"<b>"], "probability": pytest.approx(0.25)}
    summary = statistics.dump_statistics(token_dump)
    assert (summary["alternatives_per_token"], summary["mean_alternative_tail"]) == pytest.approx((2.5, 0.125))
    text = write_page(token_dump, view.find_document(token_dump, "alpha"), tmp_path / "a.html").read_text()
    assert "[" + '["|␣a|",0.5,0],["|\\u003cb\\u003e|",0.25,0],["|ab|",0.125,1]]' in text.replace(", ", ",")


def test_an_unknown_document_is_answered_with_near_ids(dump: Path) -> None:
    with pytest.raises(ValueError, match=r"no document 'alpa'; the most similar ids: 'alpha'"):
        view.find_document(dump, "alpa")


def test_a_summary_of_a_dump_without_shards_is_empty(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (dump / "shards").iterdir():
        path.unlink()
    terminal.show(dump, top=1, as_json=False)
    assert "left out: empty" in capsys.readouterr().out


def test_windows_that_overlap_are_one_document_and_equal_names_are_two(tmp_path: Path) -> None:
    records = [
        make_record("0", b"hello y", has_end=False),
        replace(make_record("0", b"lo you"), window_start=3),
        make_record("0", b"another of that name"),
    ]
    found = list(view.documents(write_dump(tmp_path / "dump", [records])))
    assert [document.text for document in found] == [b"hello you", b"another of that name"]


def test_entropy_and_surprise_are_those_of_the_slow_way(tmp_path: Path) -> None:
    record = varied_record("0", seed=3)
    decoded = positions.decode(record)
    for index, position in enumerate(positions.positions(record)):
        probabilities = [probability for _, probability in position.symbols]
        classes = [*probabilities, max(0.0, 1 - sum(probabilities))]
        assert position.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in classes if p > 0), abs=1e-9)
        assert position.surprise_bits == pytest.approx(-math.log2(dict(position.symbols)[position.realised]))
        assert decoded.surprise_bits_P[index] == position.surprise_bits


def test_the_worst_are_those_that_sorting_all_finds(tmp_path: Path) -> None:
    records = [varied_record(str(i), seed=i, document=b"some text of number %d" % i) for i in range(12)]
    dump = write_dump(tmp_path / "dump", [records[:5], records[5:]])
    every = sorted(
        (
            (p.surprise_bits, document.doc_id, p.offset)
            for document in view.documents(dump)
            for p in document.positions()
        ),
        key=lambda found: -found[0],
    )
    worst = search.worst_positions(dump, 6)
    assert [place.bits for place in worst] == [bits for bits, *_ in every[:6]]
    assert {(place.doc_id, place.offset) for place in worst} <= {
        found[1:] for found in every if found[0] >= every[5][0]
    }
    documents = search.worst_documents(dump, 12)
    assert [d.bits for d in documents] == sorted((d.bits for d in documents), reverse=True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a b", b"a b"), (r"\n\x00\\", b"\n\0\\"), ("é", b"\xc3\xa9"), (r"\xc3", b"\xc3"), (r"\q", b"\\q")],
)
def test_what_is_looked_for_may_be_any_bytes(text: str, wanted: bytes) -> None:
    assert terminal.search_bytes(text) == wanted


def test_find_sees_across_windows_and_overlaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_record("doc", b"aaxa", has_end=False)
    second = replace(make_record("doc", b"xaaay"), window_start=2)
    second = cut_positions(second, start=2)  # bytes 4 on are its own
    dump = write_dump(tmp_path / "dump", [[first, second]])
    found = list(search.find(dump, b"aa"))
    assert [occurrence.offset for occurrence in found] == [0, 3, 4]
    assert [[p.offset for p in occurrence.positions] for occurrence in found] == [[0, 1], [3, 4], [4, 5]]
    terminal.show(dump, terminal.Selection(find="aa"))
    said = capsys.readouterr().out
    assert "doc at 3: aaxaaay" in said and "more" not in said
    terminal.show(dump, terminal.Selection(find="zz"))
    assert "does not occur in" in capsys.readouterr().out


def test_the_summary_draws_its_histograms(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = statistics.dump_statistics(dump)
    assert summary["entropy_bits_positions"]["1-1.5"] == 0 and summary["entropy_bits_positions"]["1.5-2"] == 19
    assert sum(summary["column_bytes"].values()) <= summary["stored_bytes"]
    terminal.show(dump)
    said = capsys.readouterr().out
    assert "positions by entropy, bits" in said and "100.0% " + "█" * 40 in said
    assert next(terminal.bars({"a": 1, "b": 16})).endswith(" ██▌")


@pytest.mark.parametrize(
    "asked", [["--worst", "2", "--find", "a"], ["--html", "x.html", "--json"], ["--doc", "a", "--worst", "1"]]
)
def test_views_that_exclude_each_other_are_refused(
    dump: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bld", "inspect", str(dump), *asked])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1


def test_a_chat_is_shown_message_by_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roles, lengths = ("user", "assistant", "user", "assistant"), (2, 3, 1, 2)
    record = make_record("chat", b"7 bytes")
    record = replace(
        record,
        document=b"q?yestno",
        segments=(Segment(2, 3, True), Segment(6, 2, True)),
        teacher_token_lengths=np.array([2, 3, 1, 2], dtype=np.int32),
        teacher_token_logprobs=np.array([0, -1, 0, -1], dtype=np.float32),
        message_roles=roles,
        message_lengths=lengths,
        symbols=np.array([s for c in b"yes\xffno\xff" for s in (c, ord("x"))], dtype=np.uint8),
        **{name: getattr(record, name)[:7] for name in ("entry_counts", "dropped", "token_end", "doubt")},
        logprobs=record.logprobs[:14],
    )
    dump = write_dump(tmp_path / "dump", [[record]])
    terminal.show(dump, terminal.Selection("chat"), top=1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["user:", "assistant:", *"2345", "user:", "assistant:", *"678"]
    assert [line[1 + ("|" in line)] for line in lines if line[0] in "2345678"] == [
        "y",
        "e",
        "s",
        "END",
        "n",
        "o",
        "END",
    ]
    assert lines[5][1:3] == ["|", "END"] and "nats" not in lines[5]
    terminal.show(dump, terminal.Selection("chat"), as_json=True)
    assert [m["content"] for m in json.loads(capsys.readouterr().out)["messages"]] == ["q?", "yes", "t", "no"]
    assert statistics.dump_statistics(dump)["teacher_tokens"] == 2
    write_page(dump, terminal.chosen_document(dump, None, 1), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    marks = [text.index(mark) for mark in (">user<", ">assistant<", 'id="b2"', 'id="e5"', 'id="b6"', 'id="e8"')]
    assert marks == sorted(marks)


def test_a_record_shows_the_conversation_that_its_turns_were_said_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"id": "c1", "name": "look", "arguments": {"where": "in"}}
    messages = (
        {"role": "user", "content": "the é?"},
        {"role": "assistant", "content": "", "reasoning": "so\nit is", "tool_calls": [call]},
        {"role": "tool", "content": "6", "tool_call_id": "c1"},
        {"role": "assistant", "content": "abcd"},
    )
    tools = ({"type": "function", "function": {"name": "look"}},)
    record = replace(
        make_record("chat", b"abcd"),
        message_roles=("assistant",),
        message_lengths=(4,),
        conversation=Conversation(messages, tools).to_json(),
    )
    dump = write_dump(
        tmp_path / "dump", [[record, make_record("plain", b"and")]], identity={**IDENTITY, "corpus": {"turns": 2}}
    )
    terminal.show(dump, terminal.Selection("chat"), as_json=True)
    assert json.loads(capsys.readouterr().out)["conversations"] == [{"messages": list(messages), "tools": list(tools)}]
    terminal.show(dump, terminal.Selection("chat"))
    said = capsys.readouterr().out
    for part in (
        "conversation of 4 messages, the last 1",
        "reasoning so⏎it␠is | calls look",
        "tool to c1: 6",
        "user: the␠é?",
    ):
        assert part in said
    terminal.show(dump, terminal.Selection("plain"), as_json=True)
    assert "conversations" not in json.loads(capsys.readouterr().out)
