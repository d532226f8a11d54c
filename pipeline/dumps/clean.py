"""`bld clean`: half-written files of killed processes, and the cache. Lists them; removes them only if asked to."""

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

_PARTIALS = ("*.partial", "*/*.partial")


class Leftover(NamedTuple):
    """A removable file or folder. `owner` names the process that may still be writing it; None if there is none."""

    path: Path
    what: str
    num_bytes: int
    owner: str | None = None


def clean(dumps: Sequence[Path], cache: bool, yes: bool) -> list[Leftover]:
    """List removable files with their sizes; remove them if `yes`. Returns what was, or would be, removed."""
    leftovers = [left for dump in dumps for left in dump_leftovers(dump)] + (cache_leftovers() if cache else [])
    for left in leftovers:
        note = f"; kept: {left.owner}" if left.owner is not None else ""
        print(f"{binary_size(left.num_bytes):>10}  {left.path}  ({left.what}{note})")
    removable = [left for left in leftovers if left.owner is None]
    if yes:
        for left in removable:
            _remove(left.path)
    done = "removed" if yes else "would be removed; use --yes to remove them"
    total = binary_size(sum(left.num_bytes for left in removable))
    print(f"{len(removable)} leftovers, {total}, {done}" if removable else "nothing to clean")
    return removable


def dump_leftovers(dump: Path) -> list[Leftover]:
    """List half-written files of a dump, and a hub client's records of a transfer.

    Raises ValueError if the folder is not a dump.
    """
    Manifest.load(dump)
    of_shards = [f"{name}/{pattern}" for name in (dump_files.SHARDS, dump_files.COSTS) for pattern in _PARTIALS]
    partials = sorted(part for pattern in ("*.partial", *of_shards) for part in dump.glob(pattern))
    leftovers = [Leftover(path, "half written", path.stat().st_size, _writer(path)) for path in partials]
    transfer = dump / ".cache" / "huggingface"
    return leftovers + (
        [Leftover(transfer, "records of a transfer", tree_bytes(transfer))] if transfer.exists() else []
    )


def cache_leftovers() -> list[Leftover]:
    """List the parts of the cache (BLD_CACHE); all of it is downloaded or made again when it is needed."""
    folder = cache_folder()
    parts = [
        path
        for kind in ("archives", "files", "converted", "hashes", "rows")
        for path in sorted((folder / kind).glob("*"))
    ]
    return [Leftover(path, f"cache, {path.parent.name}", tree_bytes(path)) for path in parts]


def tree_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder, without following links."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(inner.lstat().st_size for inner in path.rglob("*") if inner.is_symlink() or inner.is_file())


def _writer(partial: Path) -> str | None:
    """Return the process that may still be writing a partial file, from its name `part-00003.HOST-4711.partial`.

    None for a process of this machine that has ended.
    """
    host, _, number = (partial.suffixes[-2] if len(partial.suffixes) > 1 else "").removeprefix(".").rpartition("-")
    if not number.isdigit():
        return None
    if host != writer_name().rpartition("-")[0]:
        return f"process {number} of {host} may be writing it; `bld teacher` removes it when no process is writing it"
    return f"process {number} is writing it" if pid_exists(int(number)) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
