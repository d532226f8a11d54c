"""Plug-ins: Python files that a recipe names in place of an engine, an interface, an objective or a tokenizer.

A dump's recipe travels with it, and opening a dump runs no code: what must be known about an engine before it starts is
read from its file without running it (`read_call`). Only stage 1 runs the file, to start the engine.
"""

import ast
import difflib
import hashlib
import runpy
import sys
import traceback
from collections.abc import Collection
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.runtime import log

SUFFIX = ".py"
_OURS = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
# Names that plug-ins import modules by since 0.1, before the packages were split. They work for one more release.
_MOVED = {
    "pipeline.source": ("pipeline.sources.resolve",),
    "pipeline.tokenizer_bytes": ("pipeline.tokenization.byte_tokenizer",),
    "pipeline.tokenizer_convert": ("pipeline.tokenization.file_formats",),
    "stage2_student.batches": ("stage2_student.data.examples", "stage2_student.data.micro_batch"),
    "stage2_student.objectives": ("stage2_student.losses.objectives",),
}
# Modules that have become packages of the same name: where the names went that such a file may import from them.
_SPLIT = {"stage2_student.losses": ("stage2_student.data.examples", "stage2_student.losses.divergences")}


def is_own(name: str) -> bool:
    """Return whether a recipe's value names a plug-in file."""
    return name.endswith(SUFFIX)


def check_name(name: str, known: Collection[str], key: str) -> str:
    """Return `name` if it is known or a plug-in file. Raises ValueError that names the closest known name."""
    if name in known or is_own(name):
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
    raise ValueError(f"{name!r} is no {key}; {hint} One of your own is a Python file, named with its {SUFFIX}")


def run_file(file: str, name: str, example: str = "stage2_student/interfaces/README.md") -> Any:
    """Run a file and return what it defines as `name`. Raises ValueError, naming file and line, if that fails.

    The file may also import modules beside it or in the current folder; installed packages and this project come first.

    Args:
        example: the page with an example of such a file.
    """
    path = _existing(file, name)
    for folder in (str(path.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        _provide_moved(path)
        definitions = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:
        raise ValueError(describe_fault(file, error)) from error
    if name not in definitions:
        raise ValueError(f"{file} defines no `{name}`; {example} has an example")
    return definitions[name]


def read_call(file: str, name: str, function: str, example: str) -> dict[str, Any]:
    """Read the keywords of `name = function(keyword=value, ...)` at the top level of a file, without running it.

    Raises ValueError if there is no such line, or if it holds anything but plain values.
    """
    path = _existing(file, name)
    try:
        body = ast.parse(path.read_bytes(), filename=str(path)).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(describe_fault(file, error)) from error
    for node in body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if name not in [target.id for target in targets if isinstance(target, ast.Name)]:
            continue
        call = getattr(node, "value", None)
        try:
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == function and not call.args:
                return {word.arg or "**": ast.literal_eval(word.value) for word in call.keywords}
        except ValueError:
            pass  # a value that only running the file would give
        raise ValueError(
            f"{file}, line {node.lineno}: `{name}` must be {function}(keyword=value, ...) with plain values, because "
            "it is read without running the file"
        )
    raise ValueError(f"{file} defines no `{name}`; {example} has an example")


def describe_fault(file: str, error: BaseException) -> str:
    """Describe the error that ended a file, with the last of its lines that was run."""
    path = str(Path(file).expanduser())
    moved = ""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in _OURS:
        moved = "; modules of this project have moved since the last release, pipeline/architecture.md has the tree"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    return f"{file}, line {line}: {type(error).__name__}: {error}{moved}"


def _existing(file: str, name: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{file} is not a file (from {Path.cwd()}); it should define `{name}`")
    return path


def _provide_moved(path: Path) -> None:
    """Let the file import modules by the names they had before they moved, with a warning for each."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for old in sorted(imported & _MOVED.keys()):
        package, name = old.rsplit(".", 1)
        module = ModuleType(old)
        for new in _MOVED[old]:
            vars(module).update({key: value for key, value in vars(import_module(new)).items() if key[:2] != "__"})
        sys.modules[old] = module
        setattr(import_module(package), name, module)
        log.warning(f"{path}: {old} has moved to {' and '.join(_MOVED[old])}; the next release knows only the new name")
    for old in sorted(imported & _SPLIT.keys()):
        vars(import_module(old))["__getattr__"] = partial(_moved_name, path, old)


def _moved_name(path: Path, old: str, name: str) -> Any:
    """Return what `old`, a package that was a module, defined as `name`; called if the package lacks the name."""
    for new in () if name.startswith("_") else _SPLIT[old]:
        if name in vars(module := import_module(new)):
            log.warning(f"{path}: {old}.{name} has moved to {new}; the next release knows only the new name")
            return vars(module)[name]
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def sha256(file: str) -> str:
    """Hash the file's content; a run's identity holds this hash."""
    return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
