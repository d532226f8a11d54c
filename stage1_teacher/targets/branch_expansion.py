"""Rounds of branch rows over a batch of documents: each round is one call of the engine and one reduction."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.covering.branches import Branch, Branching, Path
from stage1_teacher.engines.base import Branches, BranchToken
from stage1_teacher.reduction.reducer import Reducer
from stage1_teacher.reduction.types import Rows


class BranchPoint(NamedTuple):
    """Where what is covered stands: in which prompt, and how many of its tokens come before."""

    prompt: int
    before: int


def expand(
    branchings: Sequence[Branching], points: Sequence[BranchPoint], branches: Branches, reducer: Reducer
) -> None:
    """Add to each covering all rows that it wants. Branches whose paths are longer than the engine takes are not
    expanded, so that they are counted in `dropped`.

    Args:
        branchings: with their canonical rows; `branches` holds their prompts.
        points: where each of them stands.
    """
    numbers: dict[tuple[int, Path], int] = {}
    while True:
        wanted = [
            (index, _fitting(branching, points[index], branches.longest)) for index, branching in enumerate(branchings)
        ]
        wanted = [(index, found) for index, found in wanted if found]
        if not wanted:
            return
        tokens: list[BranchToken] = []
        for index, found in wanted:
            for branch in found:
                path = branchings[index].path(branch)
                # A longer path goes on from a branch token.
                parent = numbers[index, Path(path.leaves, path.tokens[:-1])] if len(path.tokens) > 1 else None
                prompt, before = points[index]
                tokens.append(BranchToken(prompt, before + path.leaves, branch.token, parent))
                numbers[index, path] = len(numbers)
        hidden_ND = branches.extend(tokens)
        parts = hidden_ND.split([len(found) for _, found in wanted])
        rows = reducer.reduce(
            [
                Rows(branchings[index].covering, [branch.end for branch in found], part_ND)
                for (index, found), part_ND in zip(wanted, parts, strict=True)
            ]
        )
        for (index, found), reduced in zip(wanted, rows, strict=True):
            branchings[index].add(found, reduced)


def _fitting(branching: Branching, point: BranchPoint, longest: int | None) -> list[Branch]:
    """The branches that it wants, without those whose paths have no room."""
    wanted = branching.wanted()
    if longest is None:
        return wanted
    paths = map(branching.path, wanted)
    return [
        branch
        for branch, path in zip(wanted, paths, strict=True)
        if point.before + path.leaves + len(path.tokens) <= longest
    ]
