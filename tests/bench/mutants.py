"""Mutation testing of the arithmetic: a module's quick tests must notice one small fault at a time.

    .venv/bin/python -m tests.bench.mutants [covering ...] [--sample 0.4] [--seed 0] [--at covering:137]

A fault is an operator, a comparison, a constant, a condition or a call turned into its neighbour, or a statement left
out. What no test notices is printed with its line: either it changes nothing that anybody can see, or a test is
missing. Nothing is written: each mutant lives in a fork of this process, which has the libraries loaded, and is
compiled in place of the module. Numba's kernels run as plain Python, for compiling them would take longer than they
run. A fork that uses ten times the processor time that the module's tests need without a fault, and ten seconds more,
counts as noticed: the fault made it endless.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Annotated, NamedTuple

import typer

from tests.bench.mutations import mutants


class Target(NamedTuple):
    module: str
    tests: tuple[str, ...]
    compiled: bool = False  # its kernels use what only numba's compiler knows


OURS = ("pipeline", "schemas", "stage1_teacher", "stage2_student", "tests")
COVERING = ("tests/pipeline/covering/test_covering.py", "tests/pipeline/covering/test_branches.py")
# Without those that build whole students.
MARGINAL = (
    "tests/stage2_student/interfaces/token_marginal/test_interface.py "
    "-k not weights and not bfloat16 and not rank and not tokenizer",
)
TARGETS = {
    "vocabulary": Target("pipeline.covering.vocabulary", COVERING),
    "covering": Target("pipeline.covering.covering", COVERING),
    "branching": Target("pipeline.covering.branches", COVERING[1:]),
    "weighing": Target("pipeline.covering.path_weights", COVERING[1:]),
    "spread": Target("pipeline.covering.dropped_mass", ("tests/pipeline/covering/test_dropped_mass.py",)),
    "reduce": Target(
        "stage1_teacher.reduction.reducer", ("tests/stage1_teacher/reduction/test_reducer.py",), compiled=True
    ),
    "reduce_numba": Target(
        "stage1_teacher.reduction.cpu_kernel", ("tests/stage1_teacher/reduction/test_reducer.py",), compiled=True
    ),
    "sparsify": Target("stage1_teacher.reduction.sparsify", ("tests/stage1_teacher/reduction/test_sparsify.py",)),
    "rounding": Target("stage1_teacher.targets.rounding", ("tests/stage1_teacher/targets/test_rounding.py",)),
    "spans": Target("stage2_student.data.spans", ("tests/stage2_student/data/test_examples.py -k span or token",)),
    "align": Target(
        "stage2_student.data.align",
        ("tests/stage2_student/data/test_dump_join.py -k windows or supervise or who_says",),
    ),
    "losses": Target("stage2_student.losses.divergences", ("tests/stage2_student/losses/test_divergences.py",)),
    "alm": Target("stage2_student.losses.alm", ("tests/stage2_student/losses/test_alm.py",)),
    "divergence": Target(
        "stage2_student.evaluation.divergence", ("tests/stage2_student/evaluation/test_divergence.py",), compiled=True
    ),
    "token_marginal": Target("stage2_student.interfaces.token_marginal.interface", MARGINAL),
    "trie": Target("pipeline.covering.trie", ("tests/pipeline/covering/test_trie.py",)),
    "marginal_cells_of_rows": Target(
        "stage2_student.interfaces.token_marginal.row_cells",
        ("tests/stage2_student/interfaces/token_marginal/test_row_cells.py",),
    ),
    "marginal_plan": Target("stage2_student.interfaces.token_marginal.plan", MARGINAL),
    "marginal_positions": Target("stage2_student.interfaces.token_marginal.positions", MARGINAL),
    "marginal_cells": Target("stage2_student.interfaces.token_marginal.cells", MARGINAL),
    "marginal_numba": Target("stage2_student.interfaces.token_marginal.cells_numba", MARGINAL),
}


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
    """Return True if the tests pass with this tree in place of the module. Forks, leaving no trace."""
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

    # The same examples for each mutant, and no time spent on shrinking a failing one.
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
    """Return (killed, survived) of a module; print each survivor."""
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
