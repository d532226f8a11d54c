"""Expansion of branches over a batch of documents, in rounds of one engine call each."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.covering.branches import Branch, Branching, Path
from stage1_teacher.engines.base import Branches, BranchToken
from stage1_teacher.reduction.types import RowsAlong


class BranchPoint(NamedTuple):
    """Position of a covered span: the index of its prompt, and how many of the prompt's tokens precede it."""

    prompt: int
    before: int


def expand(branchings: Sequence[Branching], points: Sequence[BranchPoint], branches: Branches) -> None:
    """Add to each covering all the rows that it requests.

    Branches whose paths are longer than the engine accepts are not expanded, so that they are counted in `dropped`.

    Args:
        branchings: with their canonical rows; `branches` holds their prompts.
        points: the position of each branching's span.
    """
    numbers: dict[tuple[int, Path], int] = {}
    while True:
        requested = [
            (index, _fitting(branching, points[index], branches.longest)) for index, branching in enumerate(branchings)
        ]
        requested = [(index, fitting) for index, fitting in requested if fitting]
        if not requested:
            return
        tokens: list[BranchToken] = []
        along: list[RowsAlong] = []
        for index, fitting in requested:
            for branch in fitting:
                path = branchings[index].path(branch)
                # A longer path continues from a branch token.
                parent = numbers[index, Path(path.num_canonical, path.tokens[:-1])] if len(path.tokens) > 1 else None
                prompt, before = points[index]
                tokens.append(BranchToken(prompt, before + path.num_canonical, branch.token, parent))
                along.append(RowsAlong.single(branchings[index].covering, branch.end, 0))
                numbers[index, path] = len(numbers)
        rows = iter(branches.extend(tokens, along))
        for index, fitting in requested:
            branchings[index].add(fitting, [next(rows)._replace(offset=branch.end) for branch in fitting])


def _fitting(branching: Branching, point: BranchPoint, longest: int | None) -> list[Branch]:
    """Return the requested branches except those whose paths exceed `longest` tokens (None: no limit)."""
    requested = branching.branches_to_expand()
    if longest is None:
        return requested
    paths = map(branching.path, requested)
    return [
        branch
        for branch, path in zip(requested, paths, strict=True)
        if point.before + path.num_canonical + len(path.tokens) <= longest
    ]
