"""A folder that is absent or complete, whatever interrupts the one who fills it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def committed_folder(path: Path) -> Iterator[Path]:
    """A name to write to. What is written there becomes `path`, in place of what was there; after an exception nothing is left."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
