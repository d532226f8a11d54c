"""The slow twin of `pipeline.covering.path_weights`.

Every row by its path, every weight a sum of its own, offset by offset.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.config import CoveringConfig
from pipeline.covering.branches import Path
from pipeline.covering.covering import Covering, ReducedRow
from tests.support.row_nodes import row_nodes


class Weighed(NamedTuple):
    """A row's weight in natural logs; `known` and `continued` by offset."""

    weights: dict[Path, float]
    known: list[float]
    continued: list[float]
    wanted: list[Path]


def weigh(covering: Covering, tokens: Sequence[int], rows: dict[Path, ReducedRow], config: CoveringConfig) -> Weighed:
    """Weigh rows by what reaches them, in the order of their offsets."""
    boundaries = {offset: index for index, offset in enumerate(covering.offsets.tolist())}
    arriving: dict[Path, list[float]] = defaultdict(list, {Path(0, ()): [0.0]})
    known: dict[int, list[float]] = defaultdict(list, {0: [0.0]})
    opens: dict[int, list[tuple[float, Path]]] = defaultdict(list)
    found = Weighed({}, [], [], [])
    for offset in range(len(covering.document) + 1):
        found.known.append(log_sum(known[offset]))
        here = [path for path, row in rows.items() if row.offset == offset]
        for path in here:
            if path.tokens:
                found.weights[path] = log_sum(arriving[path])
        branch_weights = [found.weights[path] for path in here if path.tokens]
        wanted = list(_choose(opens[offset], found.known[offset], branch_weights, config))
        found.wanted.extend(wanted)
        if offset in boundaries:
            canonical = Path(boundaries[offset], ())
            found.weights[canonical] = log_sum(arriving[canonical])
        for path in here:
            weight = found.weights[path]
            for end, mass in _reach(covering, rows[path]):
                known[end].append(weight + math.log(mass))
            for end, token, prob in _token_ends(covering, rows[path]):
                child = _child(path, token, end, boundaries, tokens, config)
                if child in rows:
                    arriving[child].append(weight + math.log(prob))
                else:
                    opens[end].append((weight + math.log(prob), child))
        found.continued.append(log_sum([found.weights[path] for path in here]))
    return found


def _child(
    path: Path, token: int, end: int, boundaries: dict[int, int], tokens: Sequence[int], config: CoveringConfig
) -> Path:
    """Return the row that a path leads to: its own, or the canonical one that it is or counts as."""
    child = Path(path.num_canonical, (*path.tokens, token))
    is_canonical = not path.tokens and path.num_canonical < len(tokens) and token == tokens[path.num_canonical]
    is_merged = (
        config.rejoin_after_tokens is not None and _shared(child, end, boundaries, tokens) >= config.rejoin_after_tokens
    )
    return Path(boundaries[end], ()) if is_canonical or is_merged else child


def _shared(child: Path, end: int, boundaries: dict[int, int], tokens: Sequence[int]) -> int:
    """Count canonical tokens at the end of a path that met the canonical boundaries; -1 off them."""
    if end not in boundaries:
        return -1
    index, shared = boundaries[end], 0
    # A path's last tokens are the canonical ones before the boundary, as far as both are the same.
    for token in reversed(child.tokens):
        index -= 1
        if index < 0 or token != tokens[index]:
            break
        shared += 1
    return shared


def _reach(covering: Covering, row: ReducedRow) -> Iterator[tuple[int, float]]:
    """Yield (offset, mass on tokens that follow the document at least up to it).

    For each offset past the row's own.
    """
    nodes, at = row_nodes(covering, row.offset), 0
    for height, node in enumerate(nodes[:-1]):
        mass = float(row.masses_I[at : at + len(node.labels)].sum())
        at += len(node.labels)
        if mass:
            yield row.offset + len(nodes) - 1 - height, mass


def _token_ends(covering: Covering, row: ReducedRow) -> Iterator[tuple[int, int, float]]:
    """Yield (offset, token, probability) of each token that spells the document's bytes up to that offset."""
    nodes, at = row_nodes(covering, row.offset), 0
    for height, node in enumerate(nodes):
        for exact in range(node.num_complete):
            if prob := float(row.masses_I[at + exact]):
                yield row.offset + len(nodes) - 1 - height, int(covering.vocabulary.order[node.cuts[exact]]), prob
        at += len(node.labels)


def _choose(
    ends: list[tuple[float, Path]], known: float, branch_weights: list[float], config: CoveringConfig
) -> Iterator[Path]:
    """Yield the heaviest branches that end at an offset, beside those that already have rows there."""
    least = math.log(config.branch_threshold) + known if config.branch_threshold else -math.inf
    heavy = sorted((end for end in ends if end[0] > least), key=lambda end: -end[0])
    for rank, (weight, path) in enumerate(heavy):
        if rank + sum(other >= weight for other in branch_weights) < config.beam_width:
            yield path


def log_sum(logs: Sequence[float]) -> float:
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(log - largest) for log in logs))
