"""Python files of the operator's own: a recipe names one in place of an engine, an interface, an objective or a
student's tokenizer.

A dump's recipe travels with it, and opening a dump runs nothing: what has to be known of an engine before it is started
is read off its file (`read_call`), which only stage 1 runs, to start it.
"""

import ast
import difflib
import hashlib
import runpy
import sys
import traceback
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.runtime import log

SUFFIX = ".py"
# What files of one's own import by the names of 0.1, which had no rooms. They go on under these for a release.
_MOVED = {
    "pipeline.source": ("pipeline.sources.resolve",),
    "pipeline.tokenizer_bytes": ("pipeline.tokenization.byte_tokenizer",),
    "pipeline.tokenizer_convert": ("pipeline.tokenization.file_formats",),
    "stage2_student.batches": ("stage2_student.data.examples", "stage2_student.data.micro_batch"),
    "stage2_student.objectives": ("stage2_student.losses.objectives",),
}


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


def run_file(file: str, wanted: str, example: str = "stage2_student/interfaces/README.md") -> Any:
    """Run a file, and return what it defines as `wanted`. Raises ValueError, naming file and line, where it cannot.

    What it imports may lie beside it or in the current folder too; what is installed, and this project, come first.

    Args:
        example: the page that has one of such a file.
    """
    path = _existing(file, wanted)
    for folder in (str(path.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        _provide_moved(path)
        found = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:
        raise ValueError(describe_fault(file, error)) from error
    if wanted not in found:
        raise ValueError(f"{file} defines no `{wanted}`; {example} has an example")
    return found[wanted]


def read_call(file: str, wanted: str, function: str, example: str) -> dict[str, Any]:
    """The keywords of `wanted = function(keyword=value, ...)` at the top level of a file, which is not run.

    Raises ValueError where there is no such line, or it holds anything but plain values.
    """
    path = _existing(file, wanted)
    try:
        body = ast.parse(path.read_bytes(), filename=str(path)).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(describe_fault(file, error)) from error
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if wanted not in [target.id for target in targets if isinstance(target, ast.Name)]:
            continue
        call = getattr(node, "value", None)
        try:
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == function and not call.args:
                return {word.arg or "**": ast.literal_eval(word.value) for word in call.keywords}
        except ValueError:
            pass  # a value that only running it would tell
        raise ValueError(
            f"{file}, line {node.lineno}: `{wanted}` must be {function}(keyword=value, ...) with plain values, for it is read "
            "without running the file"
        )
    raise ValueError(f"{file} defines no `{wanted}`; {example} has an example")


def describe_fault(file: str, error: BaseException) -> str:
    """What a file was ended by, with the last of its lines that was run."""
    path = str(Path(file).expanduser())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    return f"{file}, line {line}: {type(error).__name__}: {error}"


def _existing(file: str, wanted: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{file} is not a file (from {Path.cwd()}); it should define `{wanted}`")
    return path


def _provide_moved(path: Path) -> None:
    """Let the file import modules by the names that they had before they moved, and warn of each."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    asked = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            asked |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for old in sorted(asked & _MOVED.keys()):
        package, name = old.rsplit(".", 1)
        module = ModuleType(old)
        for new in _MOVED[old]:
            vars(module).update({key: value for key, value in vars(import_module(new)).items() if key[:2] != "__"})
        sys.modules[old] = module
        setattr(import_module(package), name, module)
        log.warning(
            f"{path}: {old} has moved to {' and '.join(_MOVED[old])}; the next release knows the new name alone"
        )


def sha256(file: str) -> str:
    """Of its content: what a run's identity knows of it."""
    return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
