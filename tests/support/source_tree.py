"""The product's own sources, parsed."""

import ast
from functools import cache
from pathlib import Path
from typing import get_args

from pipeline.config import Section

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")


@cache
def imports(path: Path) -> set[str]:
    """Return the dotted names a module imports, anywhere in it; `from a import b` gives `a` and `a.b`."""
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
    """List modules of the product that import `name` or anything under it."""
    found = [p for p in modules(*PACKAGES) if any(i == name or i.startswith(f"{name}.") for i in imports(p))]
    return [str(path.relative_to(ROOT)) for path in found]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def num_statements(node: ast.AST) -> int:
    return sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1


def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return a module's functions and methods by name, a method's class before it."""
    found: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}

    def add(node: ast.AST, before: str) -> None:
        for inner in ast.iter_child_nodes(node):
            name = f"{before}{getattr(inner, 'name', '')}"
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                found[name] = inner
            named = isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            add(inner, f"{name}." if named else before)

    add(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    variable = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variable]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def section_of(kind: object) -> list[type[Section]]:
    """Return the sections that a field's annotation names, at any depth: `Section | None`, `tuple[Section, ...]`."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return [kind]
    return [found for part in get_args(kind) for found in section_of(part)]


def sections(first: type[Section]) -> list[type[Section]]:
    """Return a section with all below it; some hold others of their own kind."""
    found = [first]
    for section in found:
        below = [part for field in section.model_fields.values() for part in section_of(field.annotation)]
        found += [part for part in dict.fromkeys(below) if part not in found]
    return found


def run_at_import(path: Path) -> list[ast.AST]:
    """Return everything an import of a module runs, without its functions' bodies and its `__main__` block."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
            continue
        found.append(node)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            waiting += [*node.args.defaults, *(value for value in node.args.kw_defaults if value is not None)]
            waiting += getattr(node, "decorator_list", [])
        elif isinstance(node, ast.AnnAssign):
            waiting += [] if node.value is None else [node.value]
        else:
            waiting += ast.iter_child_nodes(node)
    return found
