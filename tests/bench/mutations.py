"""One small fault at a time in a module's tree.

An operator, a comparison, a constant, a condition or a call turned into its neighbour, or a statement left out.
"""

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    """Nodes that no test can check.

    Messages, annotations, decorators, docstrings, and assertions of what only we can get wrong.
    """

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
    """Yield all faults possible at one node, each an edit of a copy of it."""
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
    """Return every one-fault variant of a module, in the order of its lines."""
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
    """Yield all nodes in the order in which `_Replace` visits them."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)
