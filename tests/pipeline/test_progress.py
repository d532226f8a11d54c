"""Progress on a terminal and in a file."""

import io

from rich.console import Console

from pipeline.progress import Progress


def test_a_file_gets_one_line_at_the_end_and_none_in_a_short_run() -> None:
    out = io.StringIO()
    with Progress(2, 100, Console(file=out)) as progress:
        progress.update(documents=1, text_bytes=60, tokens=20)
        assert out.getvalue() == ""
        progress.update(documents=1, text_bytes=40, tokens=10)
        progress.update(stored_bytes=50)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("2/2 documents") and "0.50 stored/text byte" in line


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Progress(1, 10, Console(file=out, force_terminal=True, width=160)) as progress:
        progress.update(documents=1, text_bytes=10, tokens=3)
    assert "1/1 documents" in out.getvalue()
