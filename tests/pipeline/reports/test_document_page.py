"""A document drawn as a page: its content, and how a browser renders it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.dumps import terminal
from pipeline.dumps.view import find_document
from pipeline.reports.document_page import Cell, cells, shade, token_edges, write_page
from schemas.record import Segment
from tests.support.browser import browser as browser
from tests.support.browser import open_page
from tests.support.readable_dumps import cut_positions, make_record, varied_record, write_dump

NASTY = (
    "</script><script>document.title='owned'</script> <b onclick=x>é & ü</b>\n\tZ\u0310 a\u202egro\x00 👩‍👧 \"q\""
).encode()
NASTY_ID = "<img src=x onerror=alert(1)>'\"&"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    dump = write_dump(tmp_path / "dump", [[varied_record(NASTY_ID, 1, NASTY)]])
    write_page(dump, terminal.chosen_document(dump, None, 1), tmp_path / "page.html")
    return tmp_path / "page.html"


class Reader(HTMLParser):
    """Elements and attributes of a page, and the text of the element with id `text`."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self._depth, self._marks = "", 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if self._depth or ("id", "text") in attrs:
            self._depth += 1
        self._marks += tag == "i"

    def handle_endtag(self, tag: str) -> None:
        self._depth -= bool(self._depth)
        self._marks -= tag == "i"

    def handle_data(self, data: str) -> None:
        if self._depth and not self._marks:
            self.text += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def test_everything_of_the_dump_is_escaped_and_nothing_is_fetched(page: Path) -> None:
    reader = read(page)
    assert reader.tags.count("script") == 2 and not {"img", "b onclick", "link", "iframe"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert "src" not in names and not {name for name in names if name.startswith("on")}
    assert all(str(value).startswith("#") or not value for name, value in reader.attributes if name == "href")
    assert not re.search(r"https?://|url\(|@import", page.read_text(encoding="utf-8"))


def test_the_text_is_all_there_but_what_prints_nothing_is_shown_by_its_code(page: Path) -> None:
    shown = read(page).text.rstrip("\n")
    assert shown == NASTY.decode().replace("\u202e", "").replace("\x00", "")
    assert '<i class="code">202E</i>' in page.read_text(encoding="utf-8")


def test_a_character_is_drawn_with_what_combines_with_it() -> None:
    text = "aZ\u0310é👩\u200d👧\n\u0301b"
    found = list(cells(text.encode()))
    assert [cell.text for cell in found] == ["a", "Z\u0310", "é", "👩\u200d👧", "\n", "\u0301", "b"]
    assert found[1] == Cell("Z\u0310", 1, 4) and found[-1].end == len(text.encode())
    assert list(cells(b"")) == []


def test_every_position_is_drawn_once_whatever_the_windows(tmp_path: Path) -> None:
    first = make_record("doc", "aé b".encode(), has_end=False)
    second = cut_positions(make_record("doc", b" b and on", window_start=3), start=2)
    dump = write_dump(tmp_path / "dump", [[first, second]])
    write_page(dump, terminal.chosen_document(dump, "doc", 1), tmp_path / "page.html")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', (tmp_path / "page.html").read_text())
    assert data
    drawn = [position["o"] for cell in json.loads(data[1]) for position in cell]
    assert drawn == list(range(len(" b and on") + 3 + 1))
    assert token_edges(find_document(dump, "doc")) == {0, 2, 4, 5, 7, 9, 11}


def test_the_end_of_each_segment_is_drawn_where_it_is(tmp_path: Path) -> None:
    record = make_record("chat", b"yes no")
    parts = (Segment(0, 3, True), Segment(4, 2, True))  # 4 + 3 positions, as many as before
    dump = write_dump(tmp_path / "dump", [[replace(record, segments=parts, **realised_entries(b"yes\xffno\xff"))]])
    write_page(dump, terminal.chosen_document(dump, None, 1), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="e3"' in text and text.index('id="b2"') < text.index('id="e3"') < text.index('id="b4"') < text.index(
        'id="e6"'
    )
    assert 'id="b3"' not in text  # the byte between them is not supervised


def realised_entries(realised: bytes) -> dict[str, np.ndarray]:
    return {"symbols": np.array([pair for byte in realised for pair in (byte, ord("x"))], dtype=np.uint8)}


def test_shades_rise_with_surprise() -> None:
    assert [shade(bits) for bits in (0.0, 0.3, 1.0, 9.0, 40.0, float("inf"))] == [0, 1, 3, 8, 9, 9]


def test_a_browser_shows_the_distribution_of_the_byte_that_is_asked_for(
    browser: str, page: Path, tmp_path: Path
) -> None:
    document = find_document(tmp_path / "dump", NASTY_ID)
    position = list(document.positions())[1]  # "/"
    shown, complaints = open_page(browser, page, "b1", tmp_path / "profile")
    assert not complaints
    panel = shown[shown.index('<aside id="panel"') :]
    panel = panel[: panel.index("</aside>")]
    assert f"{position.surprise_bits:.2f} bits" in panel and panel.count('class="row') == len(position.symbols) + 1
    assert "<title>owned" not in shown and "&lt;img src=x" in shown
