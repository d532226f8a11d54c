"""Branches on an engine's own cache of keys and values: prompts stay in its blocks, and a branch adds its own tokens.

An engine with a paged cache finds keys and values by a table of blocks for each sequence. So a branch needs no prompt
of its own: its table begins with its prompt's full blocks. The block in which it leaves its prompt is copied, because
the branch's first token overwrites what the prompt has there; a token on a boundary needs no copy. Each round computes
the tokens of its branches, and no token of a prompt again.

Blocks are assigned here, and the engine must not use them meanwhile. It computes what it is told in a `Step`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.covering.covering import ReducedRow
from stage1_teacher.engines.base import BranchToken
from stage1_teacher.reduction.types import RowsAlong

BRANCH_TOKENS = 64  # of its own, for which there is always room; most have one to five
Tables = tuple[tuple[int, ...], ...]  # for each group of layers the blocks of a sequence, up to its last token


class CacheBlocks(NamedTuple):
    """An engine's cache.

    Attributes:
        number: of blocks. Block 0 is never used: engines pad tables with it.
        sizes: tokens in a block, for each group of layers. Each group has a table of its own, with other blocks.
    """

    number: int
    sizes: tuple[int, ...]


class Stretch(NamedTuple):
    """Consecutive tokens of a sequence; keys and values of those before them are in the cache.

    Attributes:
        start: number of tokens before.
    """

    tables: Tables
    start: int
    tokens: tuple[int, ...]


class Step(NamedTuple):
    """Work that an engine does at once: first it copies blocks (from, to), then it computes the stretches' tokens."""

    copies: list[tuple[int, int]]
    stretches: list[Stretch]


# Computes a step, and reduces rows that stand after its tokens, which are numbered over all stretches.
Compute = Callable[[Step, Sequence[RowsAlong]], list[list[ReducedRow]]]


class Limits(NamedTuple):
    """Limits of an engine: tokens and sequences of a step, and tokens of a sequence."""

    tokens: int
    sequences: int
    longest: int


class PagedBranches:
    """The first of some prompts, as many as the cache has room for, and branches that leave them.

    A branch's blocks are used again when its rows are known: few branches go on, and one that does computes its own
    tokens anew.

    Raises ValueError if the cache has no room for the first prompt and its branches, as `extend` does for a branch.
    """

    def __init__(
        self,
        compute: Compute,
        blocks: CacheBlocks,
        limits: Limits,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Sequence[RowsAlong]],
    ) -> None:
        self._compute, self._sizes, self._limits = compute, blocks.sizes, limits
        self.longest: int | None = limits.longest
        self.num_tokens = 0
        self._free = list(range(blocks.number - 1, 0, -1))
        self._tables: list[Tables] = []
        self._hold(prompts)
        self._branches: list[tuple[int, int, tuple[int, ...]]] = []  # prompt, tokens of it, the branch's own tokens
        self.rows = self._prefill(prompts[: len(self._tables)], requests)

    def _hold(self, prompts: Sequence[Sequence[int]]) -> None:
        """Assign blocks to the first prompts; leave some for branches, at least one of `BRANCH_TOKENS`."""
        branch = self._num_blocks(min(self._limits.longest, BRANCH_TOKENS)) + len(self._sizes)
        spare = max(branch, min(self._limits.sequences * 2 * len(self._sizes), len(self._free) // 2))
        for prompt in prompts:
            left = len(self._free) - self._num_blocks(len(prompt))
            if left < (spare if self._tables else branch):
                break
            self._tables.append(tuple(self._take(-(-len(prompt) // size)) for size in self._sizes))
        if prompts and not self._tables:
            raise ValueError(self._describe_lack(f"a prompt of {len(prompts[0])} tokens and its branches"))

    def _describe_lack(self, of_what: str) -> str:
        return (
            f"the cache of keys and values has {len(self._free)} free blocks of "
            f"{' and '.join(map(str, self._sizes))} tokens, too few for {of_what}; raise placement.kv_cache, or on a "
            "GPU placement.gpu_memory"
        )

    def _num_blocks(self, num_tokens: int) -> int:
        return sum(-(-num_tokens // size) for size in self._sizes)

    def _take(self, number: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(number))

    def _prefill(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Sequence[RowsAlong]]
    ) -> list[list[list[ReducedRow]]]:
        found: list[list[list[ReducedRow]]] = [[[] for _ in of_prompt] for of_prompt in requests[: len(prompts)]]
        for pieces in pack_pieces(list(map(len, prompts)), self._limits):
            wanted: list[RowsAlong] = []
            into: list[list[ReducedRow]] = []
            at = 0
            for prompt, first, last in pieces:
                for request, rows in zip(requests[prompt], found[prompt], strict=True):
                    some = rows_between(request, first, last)
                    if some.num_rows:
                        wanted.append(some._replace(first=some.first - first + at))
                        into.append(rows)
                at += last - first
            stretches = [
                Stretch(self._tables[prompt], first, tuple(prompts[prompt][first:last]))
                for prompt, first, last in pieces
            ]
            for rows, computed in zip(into, self._run(Step([], stretches), wanted), strict=True):
                rows += computed
        return found

    def _run(self, step: Step, requests: Sequence[RowsAlong]) -> list[list[ReducedRow]]:
        """Compute a step. One of more tokens than a step takes is a single branch, of which the last row is wanted."""
        self.num_tokens += sum(len(stretch.tokens) for stretch in step.stretches)
        [first, *others] = step.stretches
        while len(first.tokens) > self._limits.tokens:
            assert not others
            some, rest = first.tokens[: self._limits.tokens], first.tokens[self._limits.tokens :]
            self._compute(Step(step.copies, [first._replace(tokens=some)]), [])
            first = first._replace(start=first.start + len(some), tokens=rest)
            step, requests = Step([], [first]), [request._replace(first=len(rest) - 1) for request in requests]
        return self._compute(step, requests)

    def extend(self, tokens: Sequence[BranchToken], requests: Sequence[RowsAlong]) -> list[ReducedRow]:
        first = len(self._branches)
        for token in tokens:
            if token.parent is None:
                self._branches.append((token.prompt, token.leaves, (token.token,)))
            else:
                prompt, leaves, before = self._branches[token.parent]
                self._branches.append((prompt, leaves, (*before, token.token)))
        new = self._branches[first:]
        found: list[ReducedRow] = []
        while len(found) < len(new):
            step, ends, private = self._next_step(new[len(found) :])
            some = requests[len(found) : len(found) + len(ends)]
            rows = self._run(step, [request._replace(first=end) for request, end in zip(some, ends, strict=True)])
            found += [row for [row] in rows]
            self._free += private
        return found

    def _next_step(self, branches: Sequence[tuple[int, int, tuple[int, ...]]]) -> tuple[Step, list[int], list[int]]:
        """Return a step of as many branches as fit into one, the number of each one's last token, and their blocks."""
        step, num_tokens = Step([], []), 0
        ends: list[int] = []
        private: list[int] = []
        for prompt, leaves, tokens in branches[: self._limits.sequences]:
            shared = [leaves // size for size in self._sizes]
            needed = [-(-(leaves + len(tokens)) // size) - full for size, full in zip(self._sizes, shared, strict=True)]
            if ends and (num_tokens + len(tokens) > self._limits.tokens or sum(needed) > len(self._free)):
                break
            if sum(needed) > len(self._free):
                raise ValueError(self._describe_lack(f"a branch of {len(tokens)} tokens"))
            tables = []
            for table, full, size, number in zip(self._tables[prompt], shared, self._sizes, needed, strict=True):
                own = self._take(number)
                if leaves % size:
                    step.copies.append((table[full], own[0]))
                tables.append((*table[:full], *own))
                private += own
            step.stretches.append(Stretch(tuple(tables), leaves, tokens))
            num_tokens += len(tokens)
            ends.append(num_tokens - 1)
        return step, ends, private


def pack_pieces(lengths: Sequence[int], limits: Limits) -> Iterator[list[tuple[int, int, int]]]:
    """Yield steps that compute prompts in order: (prompt, first token, last token + 1) of each piece."""
    pieces: list[tuple[int, int, int]] = []
    room = limits.tokens
    for prompt, length in enumerate(lengths):
        at = 0
        while at < length:
            if not room or len(pieces) == limits.sequences:
                yield pieces
                pieces, room = [], limits.tokens
            taken = min(room, length - at)
            pieces.append((prompt, at, at + taken))
            at, room = at + taken, room - taken
    if pieces:
        yield pieces


def rows_between(request: RowsAlong, first: int, last: int) -> RowsAlong:
    """Return those of a request's rows that stand after tokens `first .. last - 1` of its prompt."""
    start, stop = np.clip([first - request.first, last - request.first], 0, request.num_rows).tolist()
    rows = slice(start, stop)
    return request._replace(
        first=request.first + start, offsets_R=request.offsets_R[rows], columns_R=request.columns_R[rows]
    )


class StepArrays(NamedTuple):
    """The stretches S of a step as an engine computes them: one of few tokens before one of more; T tokens in all.

    Attributes:
        starts: S + 1; the first of each stretch's tokens.
        ends_S: tokens of each sequence, those before the stretch included.
        tables: S x B for each group of layers, padded with 0.
        slots: T for each group of layers: where in the cache a token's keys and values go.
        index_T: where the tokens are, in the order in which the stretches were given.
    """

    token_T: np.ndarray
    position_T: np.ndarray
    starts: np.ndarray
    ends_S: np.ndarray
    tables: list[np.ndarray]
    slots: list[np.ndarray]
    index_T: np.ndarray


def lay_out(stretches: Sequence[Stretch], sizes: Sequence[int], longest: int) -> StepArrays:
    """Return a step's arrays; tables are as wide as a sequence of `longest` tokens needs."""
    order = sorted(range(len(stretches)), key=lambda i: len(stretches[i].tokens))
    ordered = [stretches[i] for i in order]
    lengths = np.array([len(stretch.tokens) for stretch in ordered])
    starts = np.append(0, lengths.cumsum())
    before_S = np.array([stretch.start for stretch in ordered])
    sequence_T = np.arange(len(ordered)).repeat(lengths)
    position_T = np.arange(starts[-1]) + (before_S - starts[:-1])[sequence_T]
    tables, slots = [], []
    for group, size in enumerate(sizes):
        table_SB = np.zeros((len(ordered), -(-longest // size)), dtype=np.int64)
        for row_B, stretch in zip(table_SB, ordered, strict=True):
            row_B[: len(stretch.tables[group])] = stretch.tables[group]
        tables.append(table_SB)
        slots.append(table_SB[sequence_T, position_T // size] * size + position_T % size)
    first_token = dict(zip(order, starts.tolist(), strict=False))
    return StepArrays(
        np.array([token for stretch in ordered for token in stretch.tokens], dtype=np.int32),
        position_T,
        starts.astype(np.int32),
        (before_S + lengths).astype(np.int32),
        tables,
        slots,
        np.concatenate([first_token[i] + np.arange(len(stretch.tokens)) for i, stretch in enumerate(stretches)]),
    )


def split_blocks(table_SB: np.ndarray, size: int, kernel_size: int) -> np.ndarray:
    """Return a table of the smaller blocks that an attention kernel takes, int32."""
    parts = size // kernel_size
    return (table_SB[:, :, None] * parts + np.arange(parts)).reshape(len(table_SB), -1).astype(np.int32)
