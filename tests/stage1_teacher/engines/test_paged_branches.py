"""Branches on a paged cache, on a cache that holds token ids, so that what a token sees can be read back."""

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.covering.covering import ReducedRow
from stage1_teacher.engines.base import BranchToken
from stage1_teacher.engines.paged_branches import CacheBlocks, Limits, PagedBranches, Step, lay_out, split_blocks
from stage1_teacher.reduction.types import RowsAlong


class TokenCache:
    """A stand-in for an engine: keys and values are the token ids themselves, and a row is all that it sees."""

    def __init__(self, blocks: CacheBlocks, limits: Limits) -> None:
        self.blocks, self.limits = blocks, limits
        self.tokens_BN = np.full((blocks.number, max(blocks.sizes)), -1)

    def compute(self, step: Step, requests: Sequence[RowsAlong]) -> list[list[ReducedRow]]:
        assert len({to for _, to in step.copies}) == len(step.copies)
        assert 0 < sum(len(stretch.tokens) for stretch in step.stretches) <= self.limits.tokens
        assert len(step.stretches) <= self.limits.sequences
        for source, to in step.copies:
            self.tokens_BN[to] = self.tokens_BN[source]
        arrays = lay_out(step.stretches, self.blocks.sizes, self.limits.longest)
        assert (np.diff(np.diff(arrays.starts)) >= 0).all()
        groups = list(zip(arrays.tables, arrays.slots, self.blocks.sizes, strict=True))
        written = np.concatenate([slot_T // size * 100 + slot_T % size for _, slot_T, size in groups])
        assert len(set(written.tolist())) == len(written) and written.min() >= 100  # nothing is shared, nor in block 0
        for _, slot_T, size in groups:
            self.tokens_BN[slot_T // size, slot_T % size] = arrays.token_T
        seen = []
        for table_SB, _, size in groups:
            of_group = [self.tokens_BN[table_B, :size].ravel() for table_B in table_SB]  # as in each sequence's order
            sequence_T = np.arange(len(of_group)).repeat(np.diff(arrays.starts))
            seen.append(
                [
                    of_group[s][: p + 1].tolist()
                    for s, p in zip(sequence_T.tolist(), arrays.position_T.tolist(), strict=True)
                ]
            )
        assert all(of_group == seen[0] for of_group in seen)
        given = [seen[0][at] for at in arrays.index_T.tolist()]
        return [
            [ReducedRow(int(offset), np.array(given[request.first + i]), 0.0, 0.0) for i, offset in numbered(request)]
            for request in requests
        ]


def numbered(request: RowsAlong) -> list[tuple[int, int]]:
    return list(enumerate(request.offsets_R.tolist()))


def some_rows(first: int, number: int) -> RowsAlong:
    return RowsAlong(first, b"", np.arange(number), np.full(number, -1))


@pytest.mark.parametrize("seed", range(30))
def test_a_branch_sees_its_path_and_only_its_own_tokens_are_computed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.choice([1, 2, 4, 8], size=rng.integers(1, 3)).tolist())
    longest = 24
    # From a cache that holds one prompt at a time to one that holds them all.
    blocks = CacheBlocks(int(rng.integers(2, 9)) * sum(-(-longest // size) + 1 for size in sizes) + 1, sizes)
    limits = Limits(int(rng.integers(2, 40)), int(rng.integers(1, 9)), longest)
    cache = TokenCache(blocks, limits)
    prompts = [rng.integers(1000, size=rng.integers(1, longest - 4)).tolist() for _ in range(5)]
    requests = [[some_rows(0, 1), some_rows(len(prompt) // 2, len(prompt) - len(prompt) // 2)] for prompt in prompts]
    done = 0
    while done < len(prompts):
        branches = PagedBranches(cache.compute, blocks, limits, prompts[done:], requests[done:])
        held = prompts[done : done + len(branches.rows)]
        expected_tokens = sum(map(len, held))
        for prompt, [first, rows] in zip(held, branches.rows, strict=True):
            assert [row.masses_I.tolist() for row in first] == [prompt[:1]]
            ends = range(len(prompt) // 2 + 1, len(prompt) + 1)
            assert [row.masses_I.tolist() for row in rows] == [prompt[:end] for end in ends]
        paths: list[tuple[int, list[int], int]] = []  # prompt, the whole path, how many tokens are the branch's own
        for _ in range(3):
            new, asked = [], []
            for _ in range(int(rng.integers(1, 12))):
                token = int(rng.integers(1000))
                parent = int(rng.integers(len(paths))) if paths and rng.random() < 0.4 else None
                if parent is None:
                    number = int(rng.integers(len(held)))
                    leaves = int(rng.integers(1, len(held[number]) + 1))
                    asked.append((number, [*held[number][:leaves], token], 1))
                    new.append(BranchToken(number, leaves, token, None))
                else:
                    number, path, own = paths[parent]
                    if len(path) == longest:
                        continue
                    asked.append((number, [*path, token], own + 1))
                    new.append(BranchToken(number, 0, token, parent))
            paths += asked
            expected_tokens += sum(own for *_, own in asked)
            found = branches.extend(new, [some_rows(0, 1)] * len(new))
            assert [row.masses_I.tolist() for row in found] == [path for _, path, _ in asked]
        assert branches.num_tokens == expected_tokens
        done += len(held)


def test_a_cache_too_small_for_a_prompt_or_a_branch_is_refused_with_the_key_to_raise() -> None:
    blocks, limits = CacheBlocks(8, (16,)), Limits(64, 4, 64)
    with pytest.raises(ValueError, match=r"has 7 free blocks of 16 tokens, too few for a prompt of 50.*kv_cache"):
        PagedBranches(TokenCache(blocks, limits).compute, blocks, limits, [[0] * 50], [[]])
    limits = Limits(200, 4, 200)
    branches = PagedBranches(TokenCache(blocks, limits).compute, blocks, limits, [[0] * 20], [[some_rows(0, 1)]])
    row = [some_rows(0, 1)]
    branches.extend([BranchToken(0, 20, 1, None)], row)
    with pytest.raises(ValueError, match=r"has 5 free blocks of 16 tokens, too few for a branch of 77 tokens"):
        for number in range(100):
            branches.extend([BranchToken(0, 0, 1, number)], row)


def test_a_long_prompt_is_computed_in_steps_and_short_ones_share_one() -> None:
    blocks, limits = CacheBlocks(100, (4,)), Limits(8, 3, 20)
    steps: list[list[tuple[int, int]]] = []

    class Watched(TokenCache):
        def compute(self, step: Step, requests: Sequence[RowsAlong]) -> list[list[ReducedRow]]:
            steps.append([(stretch.start, len(stretch.tokens)) for stretch in step.stretches])
            return super().compute(step, requests)

    prompts = [list(range(18)), [1], [2], [3], [4]]
    PagedBranches(Watched(blocks, limits).compute, blocks, limits, prompts, [[some_rows(0, 1)] for _ in prompts])
    assert steps == [[(0, 8)], [(8, 8)], [(16, 2), (0, 1), (0, 1)], [(0, 1), (0, 1)]]


def test_a_kernels_smaller_blocks_are_the_parts_of_those_that_are_assigned() -> None:
    table_SB = np.array([[3, 1, 0], [2, 0, 0]])
    assert split_blocks(table_SB, 32, 16).tolist() == [[6, 7, 2, 3, 0, 1], [4, 5, 0, 1, 0, 1]]
    assert split_blocks(table_SB, 32, 32).tolist() == table_SB.tolist()
