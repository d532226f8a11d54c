"""Rounds of branch rows over a batch of documents: each round is one call of the engine and one reduction."""

from collections.abc import Sequence

from pipeline.branching import Branch, Branching, Path
from stage1_teacher.engine import Branches, BranchToken
from stage1_teacher.reduce import Reducer, Rows


def expand(branchings: Sequence[Branching], branches: Branches, reducer: Reducer, num_start: int) -> None:
    """Add to each document's covering all rows that it wants.

    Args:
        branchings: of the documents, with their canonical rows; `branches` holds their prompts in the same order.
        num_start: tokens of a prompt before the document's own.
    """
    numbers: dict[tuple[int, Path], int] = {}
    while True:
        wanted = [(prompt, branching.wanted()) for prompt, branching in enumerate(branchings)]
        wanted = [(prompt, found) for prompt, found in wanted if found]
        if not wanted:
            return
        tokens: list[BranchToken] = []
        for prompt, found in wanted:
            for branch in found:
                path = branchings[prompt].path(branch)
                tokens.append(_branch_token(prompt, path, branch, numbers, num_start))
                numbers[prompt, path] = len(numbers)
        hidden_ND = branches.extend(tokens)
        parts = hidden_ND.split([len(found) for _, found in wanted])
        rows = reducer.reduce(
            [
                Rows(branchings[prompt].covering, [branch.end for branch in found], part_ND)
                for (prompt, found), part_ND in zip(wanted, parts, strict=True)
            ]
        )
        for (prompt, found), reduced in zip(wanted, rows, strict=True):
            branchings[prompt].add(found, reduced)


def _branch_token(
    prompt: int, path: Path, branch: Branch, numbers: dict[tuple[int, Path], int], num_start: int
) -> BranchToken:
    parent = numbers[prompt, Path(path.leaves, path.tokens[:-1])] if len(path.tokens) > 1 else None
    return BranchToken(prompt, num_start + path.leaves, branch.token, parent)
