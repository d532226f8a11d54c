"""Opening of the engine that a recipe names: one of `pipeline.config.engines.ENGINES`, or a file of the operator's own.

No other module of this folder imports this one. A module of the table, or a file, defines

    make_engine(request: EngineRequest) -> Engine | ListingEngine

and a module of the table also `engine_name(teacher, placement) -> str` and, if it is served,
`longest_window(teacher, placement)`.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.config import EngineSpec, PlacementConfig, TeacherConfig
from pipeline.config.engines import EXAMPLE
from pipeline.runtime.dtypes import installed
from pipeline.runtime.plugins import describe_fault, is_own, run_file, sha256
from stage1_teacher.engines.base import Engine, EngineRequest, ListingEngine

_HASH_DIGITS = 16  # in the name of an operator's own engine


def open_engine(request: EngineRequest) -> Engine | ListingEngine:
    """Open the engine that the recipe names, with its model loaded.

    Raises ValueError for an operator's own file that is faulty, or does not give what its `ENGINE` declares.
    """
    teacher = request.teacher
    if not is_own(teacher.engine):
        opened: Engine | ListingEngine = _module(teacher.engine_spec).make_engine(request)
        return opened
    make = run_file(teacher.engine, "make_engine", EXAMPLE)
    try:
        engine = make(request)
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(describe_fault(teacher.engine, error)) from error
    _check_members(engine, teacher)
    try:
        engine.name, engine.cannot_branch = engine_name(teacher, request.placement), None
    except AttributeError as error:
        raise ValueError(
            f"{teacher.engine}: make_engine returns a {type(engine).__name__} whose `name` and `cannot_branch` "
            "cannot be set; return an object that allows it (no frozen dataclass, no tuple, no __slots__ without them)"
        ) from error
    checked: Engine | ListingEngine = engine
    return checked


def engine_name(teacher: TeacherConfig, placement: PlacementConfig) -> str:
    """Return the engine's name for a dump's identity: with its version, or the hash of an operator's own file."""
    if not is_own(teacher.engine):
        return str(_module(teacher.engine_spec).engine_name(teacher, placement))
    versions = [f"{package}-{_version(teacher.engine, package)}" for package in teacher.engine_spec.packages]
    return "-".join([Path(teacher.engine).name, *versions, sha256(teacher.engine)[:_HASH_DIGITS]])


def longest_window(teacher: TeacherConfig, placement: PlacementConfig) -> int | None:
    """Return the maximum window of a served teacher, in tokens; None if unknown, as for an operator's own file."""
    if is_own(teacher.engine):
        return None
    longest: int | None = _module(teacher.engine_spec).longest_window(teacher, placement)
    return longest


def _module(spec: EngineSpec) -> Any:
    """Import an engine's module, only when needed: that takes seconds, and it may not be installed."""
    assert spec.module is not None
    return import_module(spec.module)


def _version(file: str, package: str) -> str:
    version = installed(package)
    if version is None:
        raise ValueError(f"{file}: ENGINE names the package {package}, which is not installed here")
    return version


def _check_members(engine: Any, teacher: TeacherConfig) -> None:
    """Raise ValueError if an operator's own engine lacks a required member."""
    spec = teacher.engine_spec
    kind = Engine if spec.whole_softmax else ListingEngine
    # Set by us, or not used.
    optional = {"name", "cannot_branch"} | (set() if spec.branches else {"branches", "shared_tokens"})
    members = (name for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_"))
    missing = [name for name in members if name not in optional and not hasattr(engine, name)]
    if missing:
        raise ValueError(
            f"{teacher.engine}: make_engine returns a {type(engine).__name__} without {', '.join(missing)}, which "
            f"stage1_teacher.engines.base.{kind.__name__} has"
        )
