"""The teacher's vocabulary beside a dump: what is written is what is read, whatever was there before."""

from pathlib import Path

import pytest

from schemas import dump_files
from schemas.token_vocabulary import read_vocabulary, write_vocabulary

TOKENS = (b"a", b"\xe2\x82", None, b"\x00", b"a")


def test_what_is_written_is_read_and_written_once(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, TOKENS)
    before = (tmp_path / dump_files.VOCABULARY).stat()
    write_vocabulary(tmp_path, TOKENS)
    assert read_vocabulary(tmp_path) == list(TOKENS)
    assert (tmp_path / dump_files.VOCABULARY).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("left", ["another teacher's", "damaged", "empty"])
def test_a_file_that_another_dump_left_behind_is_replaced(tmp_path: Path, left: str) -> None:
    path = tmp_path / dump_files.VOCABULARY
    write_vocabulary(tmp_path, (b"b", *TOKENS[1:]))
    if left != "another teacher's":
        path.write_bytes(path.read_bytes()[:-20] if left == "damaged" else b"")
        with pytest.raises(ValueError, match="is damaged"):
            read_vocabulary(tmp_path)
    write_vocabulary(tmp_path, TOKENS)
    assert read_vocabulary(tmp_path) == list(TOKENS)
