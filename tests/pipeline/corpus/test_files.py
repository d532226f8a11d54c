"""Files that a source names, and the reading of those that are compressed."""

import bz2
import gzip
import lzma
import random
import re

import pytest
import zstandard

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus
from tests.support.corpus_files import corpus, lines, texts


def test_compressed_lines_read_like_plain_ones(tmp_path):
    content = lines(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"}).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content[:15]) + zstandard.compress(content[15:]))
    for name in ("c.jsonl", "c.jsonl.gz", "c.jsonl.zst"):
        assert texts(corpus(tmp_path / name)) == [b"a", b"b"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
@pytest.mark.parametrize("lost", [1, 20, 4000])
def test_a_compressed_file_that_is_cut_off_is_named_and_never_read_as_a_shorter_one(tmp_path, compress, lost):
    content = random.Random(0).randbytes(100_000).hex().encode()
    name = f"c.jsonl.{'gz' if compress is gzip.compress else 'zst'}"
    first = compress(b'{"text": "a"}\n') if name.endswith("zst") else b""
    (tmp_path / name).write_bytes(first + compress(b'{"text": "b"}\n{"text": "' + content + b'"}\n')[:-lost])
    with pytest.raises(ValueError, match=f"{re.escape(name)} cannot be read"):
        texts(corpus(tmp_path / name))


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress], ids=["gz", "zst", "bz2", "xz"]
)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.xz"])
def test_what_is_compressed_is_read_whatever_its_name_says(tmp_path, compress, name):
    content = lines(tmp_path / "plain.jsonl", {"text": "a"}, {"text": "b"}).read_bytes()
    (tmp_path / name).write_bytes(compress(content))
    assert texts(corpus(tmp_path / name)) == [b"a", b"b"]
    (tmp_path / name).write_bytes(compress(b""))
    with pytest.raises(ValueError, match=r"yields no usable document .*: it is empty"):
        texts(corpus(tmp_path / name))


class Hub:
    """A stand-in for a hub that gives this answer when it is asked for a data set."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def dataset_info(self, name: str, timeout: float) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", ["there is none", "no way there"])
def test_a_mistyped_folder_is_said_to_be_missing_at_once(tmp_path, monkeypatch, error):
    from httpx2 import ConnectError, Request, Response
    from huggingface_hub.errors import RepositoryNotFoundError

    answer = Response(404, request=Request("GET", "https://hub"))
    errors = {
        "there is none": RepositoryNotFoundError("none", response=answer),
        "no way there": ConnectError("refused"),
    }
    hub = Hub(errors[error])
    monkeypatch.setattr("pipeline.dumps.hub._api", lambda: hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file or folder 'data/trian' \(from .*data set of that name"):
        corpus("data/trian")
    assert hub.asked == 1


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    lines(tmp_path / "2.jsonl", {"text": "b"})
    lines(tmp_path / "1.jsonl", {"text": "a"})
    assert texts(corpus(tmp_path / "*.jsonl")) == [b"a", b"b"]


def test_links_to_folders_are_followed_and_lead_in_no_circle(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "deep" / "b.txt").write_text("b")
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (tmp_path / "in" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "d.txt").write_text("d")
    assert texts(corpus(tmp_path / "in")) == [b"a", b"b", b"c"]
    assert texts(corpus(tmp_path / "in/**/*.txt")) == [b"a", b"b", b"c"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert texts(corpus(tmp_path / "in")) == [b"a", b"b", b"c"]
    before = Corpus(CorpusConfig(source=str(tmp_path / "in")), 1)  # a dump that was begun so goes on so
    assert texts(before) == [b"d", b"a", b"b"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "data[1].txt").write_text("one")
    (tmp_path / "data1.txt").write_text("another")
    assert texts(corpus(tmp_path / "data[1].txt")) == [b"one"]
    assert texts(corpus(tmp_path / "dat?1.txt")) == [b"another"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "neither a file"),
        ("*.none", "no file matches"),
        ("a.bin", "unknown kind of file"),
        ("loop", "a symbolic link that leads nowhere"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_with_the_way_out(tmp_path, name, message):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / name)
