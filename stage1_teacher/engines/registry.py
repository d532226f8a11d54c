"""How the engine that a recipe names is opened: one of `pipeline.config.engines.ENGINES`, or a file of the operator's
own.

Nothing in this room imports this module. What opens an engine, a module of the table or a file, defines

    make_engine(request: EngineRequest) -> Engine | ListingEngine

and a module of the table besides `engine_name(teacher, placement) -> str` and, where it is served,
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

_HASH_DIGITS = 16  # of the name of an engine of one's own


def open_engine(request: EngineRequest) -> Engine | ListingEngine:
    """The engine that the recipe names, with its model loaded.

    Raises ValueError for a file of the operator's own that is faulty, or does not give what its `ENGINE` says.
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
    engine.name, engine.cannot_branch = engine_name(teacher, request.placement), None
    checked: Engine | ListingEngine = engine
    return checked


def engine_name(teacher: TeacherConfig, placement: PlacementConfig) -> str:
    """The engine with its version, as a dump's identity has it; of a file of one's own with the hash of its content."""
    if not is_own(teacher.engine):
        return str(_module(teacher.engine_spec).engine_name(teacher, placement))
    versions = [f"{package}-{_version(teacher.engine, package)}" for package in teacher.engine_spec.packages]
    return "-".join([Path(teacher.engine).name, *versions, sha256(teacher.engine)[:_HASH_DIGITS]])


def longest_window(teacher: TeacherConfig, placement: PlacementConfig) -> int | None:
    """The longest window that a served teacher takes, in tokens; None where that is not known, as of a file of one's
    own.
    """
    if is_own(teacher.engine):
        return None
    longest: int | None = _module(teacher.engine_spec).longest_window(teacher, placement)
    return longest


def _module(spec: EngineSpec) -> Any:
    """Imported only now: an engine takes seconds, and may not be installed."""
    assert spec.module is not None
    return import_module(spec.module)


def _version(file: str, package: str) -> str:
    version = installed(package)
    if version is None:
        raise ValueError(f"{file}: ENGINE names the package {package}, which is not installed here")
    return version


def _check_members(engine: Any, teacher: TeacherConfig) -> None:
    """Raise ValueError where an engine of one's own lacks what is asked of it."""
    spec = teacher.engine_spec
    kind = Engine if spec.hidden_states else ListingEngine
    ours = {"name", "cannot_branch"} | (
        set() if spec.branches else {"branches", "shared_tokens"}
    )  # set by us, or not used
    asked = [name for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_") and name not in ours]
    lacking = [name for name in asked if not hasattr(engine, name)]
    if lacking:
        raise ValueError(
            f"{teacher.engine}: make_engine gives a {type(engine).__name__} without {', '.join(lacking)}, which "
            f"stage1_teacher.engines.base.{kind.__name__} has"
        )
