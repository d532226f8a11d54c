"""The tree is what the design says, and its parts know only whom they may."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
TOP_LEVEL = {"pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md", *PACKAGES, "tests"}


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in it the import stands; `from a import b` gives `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def importers(name: str) -> list[str]:
    """Modules of the product that import `name` or what is under it."""
    found = [p for p in modules(*PACKAGES) if any(i == name or i.startswith(f"{name}.") for i in imports(p))]
    return [str(path.relative_to(ROOT)) for path in found]


def test_the_stages_meet_only_in_schemas_and_pipeline() -> None:
    assert not [name for name in importers("stage2_student") if name.startswith("stage1_teacher")]
    assert not [name for name in importers("stage1_teacher") if name.startswith("stage2_student")]


def test_only_the_roof_imports_a_stage() -> None:
    for stage in ("stage1_teacher", "stage2_student"):
        assert not [name for name in importers(stage) if not name.startswith((stage, "pipeline/cli/"))]


def test_nothing_imports_the_roof() -> None:
    assert [name for name in importers("pipeline.cli") if not name.startswith("pipeline/cli/")] == [
        "pipeline/__main__.py"
    ]


def test_the_roof_imports_a_stage_only_inside_a_command() -> None:
    for path in modules("pipeline/cli"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [name for name in top if str(name).startswith("stage")], path


@pytest.mark.parametrize("engine", ["vllm", "deepspeed", "ray", "obstore"])
def test_an_engine_is_imported_in_one_module(engine: str) -> None:
    assert len(importers(engine)) == 1, importers(engine)


def test_schemas_know_nothing_of_the_rest() -> None:
    for package in ("pipeline", "stage1_teacher", "stage2_student"):
        assert not [name for name in importers(package) if name.startswith("schemas")]


def test_the_installer_needs_only_the_standard_library() -> None:
    import sys

    roots = {name.split(".")[0] for name in imports(ROOT / "pipeline/install.py")}
    assert roots <= sys.stdlib_module_names


def test_the_top_level_is_as_designed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what is tracked cannot be told from what was built")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in listing.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
