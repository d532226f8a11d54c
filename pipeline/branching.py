"""Branch rows: which paths off the canonical one are worth a forward of the teacher, and what every row weighs.

A token that ends where the canonical encoding has no boundary, or that reaches a boundary by another path, starts a branch. It is
expanded into a row of its own when its weight, relative to the mass known just before its end, exceeds `branch_threshold`, and
it is among the `beam_width` heaviest branches that end there. All documents of a batch are expanded in rounds, one call of the
engine each, until none is left that is worth it.

A branch that has met the canonical boundaries again and shared `merge_after` of its tokens is not expanded further: its weight
joins the canonical row that ends there. From then on only the segmentation of text long past tells the two apart. Without a
threshold, a width and merging, the covering holds every tokenization, and the targets are exact.

Weights are natural logs throughout.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.config import CoveringConfig
from pipeline.covering import Covering, ReducedRow, Targets


class Branch(NamedTuple):
    """A row to be: the path of row `row` and then `token`, which ends at byte `end`."""

    row: int
    token: int
    end: int


class Path(NamedTuple):
    """A path of tokens: the canonical one's first `leaves`, and then its own."""

    leaves: int
    tokens: tuple[int, ...]


@dataclass
class _Row:
    """A row of the teacher in a document's covering."""

    reduced: ReducedRow
    path: Path
    shared: int  # canonical tokens shared since it met the canonical boundaries; -1 off them
    canonical: int | None  # its index among the canonical rows
    children: dict[int, int] = field(default_factory=dict)  # token -> row
    edges: list[tuple[int, int, float]] = field(
        default_factory=list
    )  # (end, token, log-probability) of tokens that end
    reach: list[tuple[int, float]] = field(
        default_factory=list
    )  # (offset, log of the mass that goes as far, or further)


class _Weighed(NamedTuple):
    log_weights: list[float]  # by row
    log_known: np.ndarray  # P: mass known just before each offset
    log_continued: np.ndarray  # P: of that, what goes on in rows that start there
    wanted: list[Branch]


class Branching:
    """The rows of one document, canonical and branch rows, as they become known.

    Args:
        covering: of the document; knows the column ranges of any offset.
        tokens: ids of the canonical encoding.
    """

    def __init__(self, covering: Covering, tokens: Sequence[int], config: CoveringConfig) -> None:
        self.covering, self._tokens, self._config = covering, list(tokens), config
        self._boundaries = {offset: index for index, offset in enumerate(covering.offsets.tolist())}
        self._rows: list[_Row] = []
        self._weighed: _Weighed | None = None

    @property
    def num_branch_rows(self) -> int:
        return len(self._rows) - len(self._boundaries)

    def add_canonical(self, rows: Sequence[ReducedRow]) -> None:
        """The canonical rows, in order. They come first."""
        for index, row in enumerate(rows):
            self._add(row, Path(index, ()), shared=0, canonical=index)

    def add(self, branches: Sequence[Branch], rows: Sequence[ReducedRow]) -> None:
        """The rows of branches that were wanted."""
        for branch, row in zip(branches, rows, strict=True):
            parent = self._rows[branch.row]
            parent.children[branch.token] = len(self._rows)
            self._add(row, self.path(branch), self._shared_after(parent, branch.token, branch.end), None)

    def path(self, branch: Branch) -> Path:
        """The tokens of a row to be."""
        leaves, tokens = self._rows[branch.row].path
        return Path(leaves, (*tokens, branch.token))

    def _add(self, reduced: ReducedRow, path: Path, shared: int, canonical: int | None) -> None:
        row = _Row(reduced, path, shared, canonical)
        row.reach = [(offset, math.log(mass)) for offset, mass in self.covering.reach(reduced) if mass]
        row.edges = [(end, token, math.log(prob)) for end, token, prob in self.covering.token_ends(reduced) if prob]
        self._rows.append(row)
        self._weighed = None

    def _shared_after(self, row: _Row, token: int, end: int) -> int:
        """Canonical tokens that the path of `row` and `token` has shared since it met the boundaries; -1 if it ends off them."""
        if end not in self._boundaries:
            return -1
        before = self._boundaries.get(row.reduced.offset)
        if row.shared >= 0 and before is not None and self._is_canonical_step(before, token):
            return row.shared + 1
        return 0

    def _is_canonical_step(self, before: int, token: int) -> bool:
        return before < len(self._tokens) and token == self._tokens[before]

    def _joins(self, row: _Row, token: int, end: int) -> bool:
        """Whether the path of `row` and `token` is the canonical one, or counts as it."""
        if row.canonical is not None and self._is_canonical_step(row.canonical, token):
            return True
        merge_after = self._config.merge_after
        return merge_after is not None and self._shared_after(row, token, end) >= merge_after

    def wanted(self) -> list[Branch]:
        """Branches worth a row, by what is known so far; a round of expansion may want more, and none is wanted at the end."""
        return self._weigh().wanted

    def _weigh(self) -> _Weighed:
        """Weigh all rows, in the order of their offsets: a row's weight is all that arrives at it."""
        if self._weighed is None:
            self._weighed = self._weigh_rows()
        return self._weighed

    def _weigh_rows(self) -> _Weighed:
        num_positions = len(self.covering.document) + 1
        by_offset: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(self._rows):
            by_offset[row.reduced.offset].append(number)
        arriving: list[list[float]] = [[] for _ in self._rows]
        arriving[0] = [0.0]
        known: list[list[float]] = [[] for _ in range(num_positions)]
        open_ends: dict[int, list[tuple[float, Branch]]] = defaultdict(list)
        log_weights = [-math.inf] * len(self._rows)
        log_known = np.full(num_positions, -np.inf)
        log_known[0] = 0.0
        log_continued = np.full(num_positions, -np.inf)
        wanted: list[Branch] = []
        for offset in range(num_positions):
            if offset:
                log_known[offset] = _log_sum(known[offset])
            here = by_offset.get(offset, [])
            for number in here:
                log_weights[number] = _log_sum(arriving[number])
                self._send(number, log_weights[number], arriving, known, open_ends)
            log_continued[offset] = _log_sum([log_weights[number] for number in here])
            branch_weights = [log_weights[number] for number in here if self._rows[number].canonical is None]
            wanted += self._choose(open_ends.pop(offset, []), log_known[offset], branch_weights)
        return _Weighed(log_weights, log_known, log_continued, wanted)

    def _send(
        self,
        number: int,
        log_weight: float,
        arriving: list[list[float]],
        known: list[list[float]],
        open_ends: dict[int, list[tuple[float, Branch]]],
    ) -> None:
        """Pass a row's weight on: to the offsets that its tokens reach, and to where they end."""
        row = self._rows[number]
        for offset, log_mass in row.reach:
            known[offset].append(log_weight + log_mass)
        for end, token, log_prob in row.edges:
            child = row.children.get(token)
            if child is None and self._joins(row, token, end):
                child = self._boundaries[end]
            if child is None:
                open_ends[end].append((log_weight + log_prob, Branch(number, token, end)))
            else:
                arriving[child].append(log_weight + log_prob)

    def _choose(
        self, ends: list[tuple[float, Branch]], log_known: float, branch_weights: list[float]
    ) -> Iterator[Branch]:
        """The heaviest of the branches that end at an offset, beside those that have rows there already."""
        threshold, width = self._config.branch_threshold, self._config.beam_width
        least = math.log(threshold) + log_known if threshold else -math.inf
        heavy = sorted((end for end in ends if end[0] > least), key=lambda end: (-end[0], end[1]))
        for rank, (log_weight, branch) in enumerate(heavy):
            if rank + sum(weight >= log_weight for weight in branch_weights) < width:
                yield branch

    def targets(self) -> Targets:
        """The covering's targets over all rows that were added."""
        weighed = self._weigh()
        return self.covering.weighted_targets(
            [row.reduced for row in self._rows], np.array(weighed.log_weights), weighed.log_continued
        )


def _log_sum(logs: Sequence[float]) -> float:
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(log - largest) for log in logs))
