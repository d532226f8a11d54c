"""`bld inspect` on a dump whose figures are known."""

import json
from pathlib import Path

import pytest

from pipeline import inspect
from tests.pipeline.dumps import make_dump


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return make_dump(tmp_path / "dump")


def test_the_summary_counts_documents_once_whatever_their_windows(dump: Path) -> None:
    summary = inspect.summarise(dump)
    assert (summary["documents"], summary["records"]) == (3, 4)
    assert (summary["shards_done"], summary["shards_planned"]) == (2, 3)
    assert summary["text_bytes"] == 6 + 5 + 4 + 1
    assert summary["positions"] == summary["text_bytes"] + 3  # three documents end


def test_the_summary_gives_the_targets_one_bit_per_byte_and_a_quarter_of_tail(dump: Path) -> None:
    summary = inspect.summarise(dump)
    assert summary["target_bits_per_byte"] == pytest.approx(1.0, abs=1e-3)
    assert summary["mean_tail"] == pytest.approx(0.25, abs=1e-3)
    assert summary["entry_count_positions"] == {2: summary["positions"]}
    assert summary["mean_token_end"] == pytest.approx(0.25)


def test_offsets_of_a_later_window_are_those_of_the_document(dump: Path) -> None:
    found = [p for record in inspect.document_records(dump, "beta") for p in inspect.positions(record)]
    assert [p.offset for p in found] == list(range(10))
    assert [p.token_starts for p in found[:5]] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [(0x61, "a"), (0x20, "␠"), (0x0A, "\\n"), (0xC3, "c3"), (0x00, "00"), (0xFF, "END"), (0x7F, "7f")],
)
def test_symbols_are_readable(symbol: int, name: str) -> None:
    assert inspect.symbol_name(symbol) == name


def test_the_table_is_aligned_and_plain_when_piped(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.show(dump, "alpha", top=1, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 7  # a header, six bytes, END
    assert "\x1b" not in "".join(lines)
    assert lines[1].split() == ["0", "|", "a", "0.2500", "0.0000", "0.2500", "0.0000", "a", "0.5000"]
    assert len({line.index(".") for line in lines[1:]}) == 1


def test_json_holds_every_entry(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.show(dump, "gamma", top=1, as_json=True)
    (first, end) = json.loads(capsys.readouterr().out)["positions"]
    assert [symbol for symbol, _ in first["symbols"]] == [ord("x"), ord("y")]
    assert end["realised"] == 255
    inspect.show(dump, None, top=1, as_json=True)
    assert json.loads(capsys.readouterr().out)["documents"] == 3


def test_an_unknown_document_is_answered_with_near_ids(dump: Path) -> None:
    with pytest.raises(ValueError, match=r"no document 'alpa'; the nearest ids: alpha"):
        inspect.document_records(dump, "alpa")


def test_a_summary_of_a_dump_without_shards_is_empty(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (dump / "shards").iterdir():
        path.unlink()
    inspect.show(dump, None, top=1, as_json=False)
    assert "left out: empty" in capsys.readouterr().out
