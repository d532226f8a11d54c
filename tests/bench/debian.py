"""Files out of Debian packages, unpacked into the cache without installing anything; needs apt-get and dpkg-deb.

The cache holds `debian/<sha256>/`, absent or complete.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from pipeline.sources.pypi import cache_folder, sha256_of
from schemas.storage.atomic import first_folder


class DebianPackage(NamedTuple):
    """A Debian package; `sha256` is the .deb's, in hex."""

    name: str
    version: str
    sha256: str


# Of Debian 12 (bookworm).
MANPAGES_RU = DebianPackage(
    "manpages-ru", "4.18.1-1", "5d5821dad5840652ba9c1c6b85bdc785c1fc52148a71c18fab6658c9659244c0"
)
MANPAGES_JA = DebianPackage(
    "manpages-ja", "0.5.0.0.20221215+dfsg-1", "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743"
)
MANPAGES_ZH = DebianPackage(
    "manpages-zh", "1.6.4.0-1", "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1"
)


def unpacked(package: DebianPackage) -> Path:
    """Return the folder of a package's files.

    Raises ValueError if apt-get cannot download it or its content differs.
    """
    folder = cache_folder() / "debian" / package.sha256
    if folder.exists():
        return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ValueError(f"{package.name} is a Debian package; apt-get and dpkg-deb are needed to fetch it")
    with first_folder(folder) as ready, tempfile.TemporaryDirectory() as scratch:
        deb = _download(package, Path(scratch))
        subprocess.run(["dpkg-deb", "-x", str(deb), str(ready)], check=True)
    return folder


def _download(package: DebianPackage, scratch: Path) -> Path:
    wanted = f"{package.name}={package.version}"
    done = subprocess.run(["apt-get", "download", wanted], cwd=scratch, capture_output=True, text=True, check=False)
    found = list(scratch.glob("*.deb"))
    if done.returncode or len(found) != 1:
        raise ValueError(
            f"apt-get could not download {wanted}:\n{done.stderr[-1000:]}\nIt is of Debian 12: run `apt-get update`, "
            "or add that release to apt's sources."
        )
    have = sha256_of(found[0])
    if have != package.sha256:
        raise ValueError(f"{found[0].name} has sha256 {have}, but {package.sha256} is pinned: do not use it")
    return found[0]
