"""Python files of the operator's own: a recipe names one in place of an interface, an objective or a student's tokenizer.

Only `student` and `train` take them. A dump's recipe travels with it, and opening a dump runs nothing.
"""

import difflib
import hashlib
import runpy
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

SUFFIX = ".py"


def is_own(name: str) -> bool:
    """Whether a recipe's value names a file of the operator's own."""
    return name.endswith(SUFFIX)


def check_name(name: str, known: Collection[str], key: str) -> str:
    """`name`, if it is known or a file's. Raises ValueError naming the nearest that is known."""
    if name in known or is_own(name):
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
    raise ValueError(f"{name!r} is no {key}; {hint} One of your own is a Python file, named with its {SUFFIX}")


def run_file(file: str, wanted: str) -> Any:
    """Run a file, and return what it defines as `wanted`. Raises ValueError, naming file and line, where it cannot."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{file} is not a file (from {Path.cwd()}); it should define `{wanted}`")
    try:
        found = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        raise ValueError(f"{file}, line {line}: {type(error).__name__}: {error}") from error
    if wanted not in found:
        raise ValueError(f"{file} defines no `{wanted}`; stage2_student/interfaces/README.md has an example")
    return found[wanted]


def sha256(file: str) -> str:
    """Of its content: what a run's identity knows of it."""
    return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
