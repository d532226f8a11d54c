"""Cached hashes of large files: not every process computes them again while size and times stay the same."""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download

from pipeline.sources.pypi import cache_folder, sha256_of
from schemas.storage.atomic import committed

_SMALL_BYTES = 1 << 20  # faster to read than to look up
_SETTLED_SECONDS = 2.0  # a file just written may be written again within a tick of its time stamp
_BLOB = re.compile(r"[0-9a-f]{64}")


def file_state(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Return the properties of a file that change with its content: size, times, and inode.

    The modification time alone is not enough: weights of one architecture have one size, and `cp -p`, `rsync -a` or an
    archive may put others in their place with the same modification time. The change time cannot be set.
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def known_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    The hub's cache names a large file's blob by it. Any other large file is hashed once, and the hash is cached under
    its path and `file_state`.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return real.name
    stat = real.stat()
    if stat.st_size < _SMALL_BYTES:
        return sha256_of(real)
    key = hashlib.sha256(f"{real}\0{file_state(stat)}".encode()).hexdigest()
    cached = cache_folder() / "hashes" / key
    with suppress(OSError):
        if _BLOB.fullmatch(digest := cached.read_text(encoding="ascii")):
            return digest
    digest = sha256_of(real)
    if time.time() - stat.st_mtime > _SETTLED_SECONDS and file_state(real.stat()) == file_state(stat):
        with suppress(OSError):  # an unwritable cache only costs time
            cached.parent.mkdir(parents=True, exist_ok=True)
            with committed(cached) as partial:
                partial.write_text(digest, encoding="ascii")
    return digest


def weights_sha256(model: str, revision: str | None) -> str:
    """Return a hash over the model's config.json and safetensors files, by name; a hub model is downloaded first."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    if len(files) < 2:
        raise ValueError(
            f"{folder} holds no .safetensors file, and only safetensors are read. Convert it with save_pretrained."
        )
    for file in files:
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(known_sha256(file)))
    return digest.hexdigest()
