"""Mutation testing of the arithmetic: one small fault at a time is put into a module, and its quick tests must notice.

    .venv/bin/python -m tests.bench.mutants [covering ...] [--sample 0.4] [--seed 0] [--at covering:137]

A fault is an operator, a comparison, a constant, a condition or a call turned into its neighbour, or a statement left out. What no
test notices is printed with its line: either it changes nothing that anybody can see, or a test is missing. Nothing is written: each
mutant lives in a fork of this process, which has the libraries loaded, and is compiled in place of the module. Numba's kernels run as
plain Python, for compiling them would take longer than they run. A fork that uses ten times the processor time that the
module's tests need without a fault, and ten seconds more, counts as noticed: the fault made it endless.
"""

import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Annotated, Any, NamedTuple

import typer


class Target(NamedTuple):
    module: str
    tests: tuple[str, ...]
    compiled: bool = False  # its kernels use what only numba's compiler knows


OURS = ("pipeline", "schemas", "stage1_teacher", "stage2_student", "tests")
COVERING = ("tests/pipeline/test_covering.py", "tests/pipeline/test_branching.py")
# Without those that build whole students.
MARGINAL = (
    "tests/stage2_student/test_token_marginal.py -k not weights and not bfloat16 and not rank and not tokenizer",
)
TARGETS = {
    "vocabulary": Target("pipeline.vocabulary", COVERING),
    "covering": Target("pipeline.covering", COVERING),
    "branching": Target("pipeline.branching", COVERING[1:]),
    "weighing": Target("pipeline.weighing", COVERING[1:]),
    "spread": Target("pipeline.spread", ("tests/pipeline/test_spread.py",)),
    "reduce": Target("stage1_teacher.reduce", ("tests/stage1_teacher/test_reduce.py",), compiled=True),
    "reduce_numba": Target("stage1_teacher.reduce_numba", ("tests/stage1_teacher/test_reduce.py",), compiled=True),
    "sparsify": Target("stage1_teacher.sparsify", ("tests/stage1_teacher/test_sparsify.py",)),
    "rounding": Target("stage1_teacher.rounding", ("tests/stage1_teacher/test_rounding.py",)),
    "spans": Target("stage2_student.spans", ("tests/stage2_student/test_data.py -k span or token",)),
    "align": Target("stage2_student.align", ("tests/stage2_student/test_join.py -k windows or supervise or who_says",)),
    "losses": Target("stage2_student.losses", ("tests/stage2_student/test_losses.py",)),
    "alm": Target("stage2_student.alm", ("tests/stage2_student/test_alm.py",)),
    "divergence": Target("stage2_student.divergence", ("tests/stage2_student/test_divergence.py",), compiled=True),
    "token_marginal": Target("stage2_student.interfaces.token_marginal", MARGINAL),
    "marginal_trie": Target("stage2_student.interfaces.marginal_trie", ("tests/stage2_student/test_marginal_trie.py",)),
    "marginal_plan": Target("stage2_student.interfaces.marginal_plan", MARGINAL),
    "marginal_positions": Target("stage2_student.interfaces.marginal_positions", MARGINAL),
    "marginal_cells": Target("stage2_student.interfaces.marginal_cells", MARGINAL),
    "marginal_numba": Target("stage2_student.interfaces.marginal_numba", MARGINAL),
}

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "amax": "amin",
    "all": "any",
    "any": "all",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "exp": "expm1",
    "expm1": "exp",
    "left": "right",
    "right": "left",
}


class Mutant(NamedTuple):
    line: int
    what: str
    tree: ast.Module


class _Skip(ast.NodeVisitor):
    """Nodes that no test can be asked about: messages, annotations, decorators, docstrings, what only we can get wrong."""

    def __init__(self) -> None:
        self.nodes: set[int] = set()

    def skip(self, *nodes: ast.AST | None) -> None:
        self.nodes |= {id(inner) for node in nodes if node is not None for inner in ast.walk(node)}

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.skip(*node.decorator_list)
        if isinstance(node, ast.FunctionDef):
            self.skip(node.returns, *(arg.annotation for arg in [*node.args.args, *node.args.kwonlyargs]))
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            self.skip(node)
        if isinstance(node, ast.AnnAssign):
            self.skip(node.annotation)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            self.skip(node)
        if isinstance(node, ast.keyword) and node.arg in ("dtype", "strict", "kind", "compare", "repr"):
            self.skip(node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            self.skip(node)
        self.generic_visit(node)


def edits(node: ast.AST) -> Iterator[Callable[[Any], ast.AST]]:
    """What can be done to one node, each an edit of a copy of it."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield lambda n: _set(n, "op", OPERATORS[type(n.op)]())
    if isinstance(node, ast.Compare):
        for place in range(len(node.ops)):
            yield lambda n, at=place: _set(n, "ops", [*n.ops[:at], OPERATORS[type(n.ops[at])](), *n.ops[at + 1 :]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: _set(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield lambda n: _set(n, "value", n.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield lambda n: _set(n, "value", n.value * 2 or 1.0)
    for name in ("value", "attr", "id"):
        if isinstance(word := getattr(node, name, None), str) and word in NAMES:
            yield lambda n, name=name, word=word: _set(n, name, NAMES[word])
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield lambda n: _set(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.AugAssign | ast.Break | ast.Continue | ast.Expr) or (
        isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    ):
        yield lambda n: ast.Pass()


def _set(node: ast.AST, name: str, value: object) -> ast.AST:
    setattr(node, name, value)
    return node


class _Replace(ast.NodeTransformer):
    def __init__(self, number: int, edit: Callable[[Any], ast.AST]) -> None:
        self._left, self._edit = number, edit

    def visit(self, node: ast.AST) -> ast.AST:
        self._left -= 1
        return self._edit(node) if self._left == -1 else super().generic_visit(node)


def mutants(source: str) -> list[Mutant]:
    """Every one-fault variant of a module, in the order of its lines."""
    tree = ast.parse(source)
    skipped = _Skip()
    skipped.visit(tree)
    found: list[Mutant] = []
    for number, node in enumerate(_in_order(tree)):
        if id(node) not in skipped.nodes:
            for edit in edits(node):
                what = f"{_short(node)} -> {_short(edit(copy.deepcopy(node)))}"
                changed = ast.fix_missing_locations(_Replace(number, edit).visit(copy.deepcopy(tree)))
                found.append(Mutant(getattr(node, "lineno", 0), what, changed))
    return sorted(found, key=lambda mutant: mutant.line)


def _short(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes in the order in which `_Replace` meets them."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree instead of its file."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


def run_tests(target: Target, path: Path, tree: ast.Module, cpu_seconds: int) -> bool:
    """True if the tests pass with this tree in place of the module. In a fork: it leaves no trace."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            sys.meta_path.insert(0, _Finder(target.module, path, compile(tree, str(path), "exec")))
            os._exit(_pytest(target.tests))
        except BaseException:  # whatever it was, the fault has been noticed
            os._exit(99)
    return os.waitpid(child, 0)[1] == 0


def _pytest(tests: Sequence[str]) -> int:
    import pytest
    from hypothesis import Phase, settings

    # The same examples for each mutant, and no time spent on making a failing one small.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    settings.load_profile("mutants")
    warnings.simplefilter("ignore")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    for named in tests:
        path, _, chosen = named.partition(" -k ")
        code = int(pytest.main([*options, path, *(["-k", chosen] if chosen else [])]))
        if code:
            return code
    return 0


def test_module(name: str, sample: float, seed: int, line: int | None) -> tuple[int, int]:
    """(killed, survived) of a module; prints each survivor."""
    target = TARGETS[name]
    path = Path(*target.module.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if not run_tests(target, path, ast.parse(source), 600):
        raise SystemExit(f"{name}: {' '.join(target.tests)} fail without any fault; run them by themselves to see why")
    needed = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    chosen = [mutant for mutant in mutants(source) if line in (None, mutant.line)]
    if sample < 1:
        chosen = random.Random(f"{seed} {name}").sample(chosen, round(sample * len(chosen)))
    print(f"{name}: {len(chosen)} mutants, {needed:.1f} s of tests without a fault", flush=True)
    survived, began = 0, time.monotonic()
    for mutant in sorted(chosen, key=lambda mutant: mutant.line):
        if run_tests(target, path, mutant.tree, int(10 * needed) + 10):
            survived += 1
            print(f"  {path}:{mutant.line}: {mutant.what}: {lines[mutant.line - 1].strip()}", flush=True)
    print(f"{name}: {len(chosen) - survived} killed, {survived} survived, {time.monotonic() - began:.0f} s", flush=True)
    return len(chosen) - survived, survived


def load_libraries(targets: Sequence[Target], compiled: bool) -> None:
    """Import what every fork would import anew, and forget our own modules again."""
    # Numba is told before it is imported.
    os.environ.update(NUMBA_DISABLE_JIT=str(int(not compiled)))
    for path in sorted({named.partition(" -k ")[0] for target in targets for named in target.tests}):
        importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="modules; all without any")] = None,
    sample: Annotated[float, typer.Option(help="share of the mutants that are tried")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    at: Annotated[str | None, typer.Option(help="MODULE:LINE: only the mutants of one line")] = None,
) -> None:
    line = None
    if at is not None:
        name, _, number = at.partition(":")
        names, line = [name], int(number)
    chosen = names or list(TARGETS)
    for compiled in (False, True):
        group = [name for name in chosen if TARGETS[name].compiled == compiled]
        if group and not (child := os.fork()):
            load_libraries([TARGETS[name] for name in group], compiled)
            for name in group:
                test_module(name, sample, seed, line)
            sys.stdout.flush()
            os._exit(0)
        if group and os.waitpid(child, 0)[1]:
            raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
