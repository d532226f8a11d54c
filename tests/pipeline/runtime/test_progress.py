"""Progress on a terminal and in a file."""

import io

import pytest
from rich.console import Console

from pipeline.runtime.counted import Counted
from pipeline.runtime.progress import Progress


def test_a_file_gets_one_line_at_the_end_and_none_in_a_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, 100, Console(file=io.StringIO())) as progress:
        progress.update(documents=1, text_bytes=60, tokens=20)
        assert capsys.readouterr().err == ""
        progress.update(documents=1, text_bytes=40, tokens=10)
        progress.update(stored_bytes=50)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2/2 documents" in line and "0.50 stored/text byte" in line


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Progress(1, 10, Console(file=out, force_terminal=True, width=160)) as progress:
        progress.update(documents=1, text_bytes=10, tokens=3)
    assert "1/1 documents" in out.getvalue()


def test_a_count_draws_a_bar_on_a_terminal_and_says_the_time_left_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    with Counted("tokens read", 8, Console(file=out, force_terminal=True, width=160)) as counted:
        counted.add(5)
    assert "tokens read" in out.getvalue() and "5/8" in out.getvalue()

    now = [0.0]
    monkeypatch.setattr("pipeline.runtime.counted.time.monotonic", lambda: now[0])
    with Counted("tokens read", 80, Console(file=io.StringIO())) as counted:
        counted.add(20)
        assert capsys.readouterr().err == ""
        now[0] = 12.0
        counted.add(20)
    assert "tokens read: 40 of 80, 12 s left" in capsys.readouterr().err


def test_the_time_left_for_prompts_is_told_by_their_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.runtime.progress.time.monotonic", lambda: now[0])
    with Progress(10, 1000, Console(file=io.StringIO()), unit="prompts") as progress:
        now[0] = 20.0
        progress.update(documents=4, text_bytes=900, tokens=2000, stored_bytes=70)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("4/10 prompts, 0.2 prompts/s, 100 tokens/s written, 30 s left")
