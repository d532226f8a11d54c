"""Imports of `pipeline` and `schemas` as they are installed beside this package, whatever the current folder holds.

A script's own folder comes first on Python's path, and `pipeline` and `schemas` are names that others use too. What is
imported here stays: a later `import pipeline` anywhere in the process is ours.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

NAMES = ("schemas", "pipeline")


def import_ours(root: Path) -> None:
    """Import the packages from a folder. Raises ImportError if another package of that name has been imported."""
    for name in NAMES:
        if name in sys.modules:
            _check(sys.modules[name], root)
            continue
        spec = PathFinder.find_spec(name, [str(root)])
        if spec is None or spec.loader is None:
            raise ImportError(f"{root} has no package {name}: install byte-level-distillation again")
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def _check(module: ModuleType, root: Path) -> None:
    folders = [Path(path).resolve() for path in getattr(module, "__path__", ())]
    if folders != [(root / module.__name__).resolve()]:
        where = getattr(module, "__file__", None) or ", ".join(map(str, folders))
        raise ImportError(
            f"stage2_student needs its own package {module.__name__}, but {where} has been imported under that "
            "name: import stage2_student in a process that does not need the other, or rename the other"
        )
