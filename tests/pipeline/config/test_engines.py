"""The table of engines, and that no other module distinguishes engines."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.config import TeacherConfig
from pipeline.config.engines import ENGINES, other_engine

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")


def test_no_module_compares_an_engines_name() -> None:
    """A new engine is a line of the table, and its module."""
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                sides = [node.left, *node.comparators]
                named = [side.value for side in sides if isinstance(side, ast.Constant) and side.value in ENGINES]
                found += [f"{path.relative_to(ROOT)}:{node.lineno}"] if named else []
            if isinstance(node, ast.Call) and re.search(r"engine\w*(\.name)?\.startswith$", ast.unparse(node.func)):
                found += [f"{path.relative_to(ROOT)}:{node.lineno}"] if ast.unparse(node.args[0]) != "name" else []
    assert not found


def test_an_unknown_engine_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="'transformer' is no engine; did you mean 'transformers'"):
        TeacherConfig(model="m", engine="transformer")
    with pytest.raises(ValueError, match="'sglang' is no engine; known are vllm, transformers, openai"):
        TeacherConfig(model="m", engine="sglang")
    assert TeacherConfig(model="m", engine="not/there.py").engine == "not/there.py"  # looked into when it is used


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_module_has_what_the_registry_asks_for(engine: str) -> None:
    spec = ENGINES[engine]
    assert spec.module is not None
    module = import_module(spec.module)
    assert callable(module.make_engine) and callable(module.engine_name)
    assert callable(getattr(module, "longest_window", None)) == spec.served


def test_the_other_engine_to_try_is_one_that_loads_weights_here() -> None:
    tried = [other_engine(name) for name in ("vllm", "vllm-0.32.0", "transformers", "transformers-5.1", "mine.py-00")]
    assert tried == ["transformers", "transformers", "vllm", "vllm", "vllm"]
