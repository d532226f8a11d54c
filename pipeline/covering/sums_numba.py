"""Summation of reduced rows into positions, compiled by numba.

Every sum follows the order of the rows, so it does not depend on how the rows were computed.

Shape legend: R rows, P positions (bytes + 1), V symbols (256), N nodes, I intervals, as in
`pipeline.covering.intervals`.
"""

from typing import Any

from numba import njit


@njit(nogil=True, error_model="numpy")
def add_up(
    trie: Any,
    nodes_N: Any,
    positions_N: Any,
    masses_I: Any,
    scale_N: Any,
    ended_scale_N: Any,
    mass_PV: Any,
    ended_P: Any,
) -> None:
    """Add each interval's scaled mass to its symbol at its node's position, or to the mass that has ended there.

    Args:
        masses_I: float64, all rows in order.
        scale_N: factor for mass that continues with a symbol.
        ended_scale_N: factor for mass that ends at the node; not read if no token ends there.
        mass_PV, ended_P: float64 accumulators, changed in place.
    """
    i = 0
    for n in range(nodes_N.shape[0]):
        node, position = nodes_N[n], positions_N[n]
        first, num_complete = trie.start_N[node], trie.num_complete_N[node]
        size = trie.start_N[node + 1] - first
        for k in range(num_complete):
            ended_P[position] += masses_I[i + k] * ended_scale_N[n]
        for k in range(num_complete, size):
            mass_PV[position, trie.symbol_J[first + k]] += masses_I[i + k] * scale_N[n]
        i += size
