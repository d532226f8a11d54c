"""`bld clean`: what killed processes left half written, and the cache. Shown first, removed only when asked."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from psutil import pid_exists

from pipeline.runtime.format import binary_size
from pipeline.sources.pypi import cache_folder
from schemas import dump_files
from schemas.manifest import Manifest
from schemas.storage.atomic import writer_name


class Leftover(NamedTuple):
    """A file or folder that may go. `owner` is who may still write it, in words, None where nobody does."""

    path: Path
    what: str
    num_bytes: int
    owner: str | None = None


def clean(dumps: Sequence[Path], cache: bool, yes: bool) -> list[Leftover]:
    """List what may go, with its size; with `yes`, remove it. Returns what was, or would be, removed."""
    found = [left for dump in dumps for left in dump_leftovers(dump)] + (cache_leftovers() if cache else [])
    for left in found:
        note = f"; kept: {left.owner}" if left.owner is not None else ""
        print(f"{binary_size(left.num_bytes):>10}  {left.path}  ({left.what}{note})")
    going = [left for left in found if left.owner is None]
    if yes:
        for left in going:
            _remove(left.path)
    done = "removed" if yes else "would go; --yes removes them"
    total = binary_size(sum(left.num_bytes for left in going))
    print(f"{len(going)} leftovers, {total}, {done}" if going else "nothing to clean")
    return going


def dump_leftovers(dump: Path) -> list[Leftover]:
    """Half-written files of a dump, and what a hub's client keeps about a transfer. Raises ValueError where it is no
    dump.
    """
    Manifest.load(dump)
    partials = sorted(
        part for folder in (".", dump_files.SHARDS, dump_files.COSTS) for part in (dump / folder).glob("*.partial")
    )
    found = [Leftover(path, "half written", path.stat().st_size, _writer(path)) for path in partials]
    transfer = dump / ".cache" / "huggingface"
    return found + (
        [Leftover(transfer, "a transfer's book-keeping", tree_bytes(transfer))] if transfer.exists() else []
    )


def cache_leftovers() -> list[Leftover]:
    """The parts of our own cache (BLD_CACHE); all of it is fetched or made again when it is needed."""
    folder = cache_folder()
    parts = [
        path for kind in ("archives", "files", "converted", "hashes") for path in sorted((folder / kind).glob("*"))
    ]
    return [Leftover(path, f"cache, {path.parent.name}", tree_bytes(path)) for path in parts]


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(inner.lstat().st_size for inner in path.rglob("*") if inner.is_symlink() or inner.is_file())


def _writer(partial: Path) -> str | None:
    """Who may still write a partial file by its name, `part-00003.HOST-4711.partial`; None for a process of this
    machine that is gone.
    """
    host, _, number = (partial.suffixes[-2] if len(partial.suffixes) > 1 else "").removeprefix(".").rpartition("-")
    if not number.isdigit():
        return None
    if host != writer_name().rpartition("-")[0]:
        return f"process {number} of {host} may be writing it; `bld teacher` removes it when nobody is"
    return f"process {number} is writing it" if pid_exists(int(number)) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
