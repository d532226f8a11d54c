"""The trie of a vocabulary's prefixes on a device.

Shape legend: N nodes (of the trie, or of rows in order), J intervals of all nodes of the trie in order, I intervals of
some nodes in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.covering.trie import Trie


class DeviceTrie(NamedTuple):
    """The trie's tables on a device; int64."""

    start_N: Tensor
    num_complete_N: Tensor
    first_J: Tensor
    last_J: Tensor
    symbol_J: Tensor

    @staticmethod
    def of(trie: Trie, device: torch.device) -> "DeviceTrie":
        """Copy the tables to a device."""
        return DeviceTrie(*(torch.from_numpy(getattr(trie, name)).to(device).long() for name in DeviceTrie._fields))

    def intervals(self, nodes_N: Tensor, num_intervals: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of these nodes' intervals, in order (I), and of each the index of its node (of N)."""
        sizes_N = self.start_N[nodes_N + 1] - self.start_N[nodes_N]
        node_I = torch.arange(len(nodes_N), device=nodes_N.device).repeat_interleave(sizes_N, output_size=num_intervals)
        before_N = sizes_N.cumsum(0) - sizes_N
        within_I = torch.arange(num_intervals, device=nodes_N.device) - before_N[node_I]
        return self.start_N[nodes_N][node_I] + within_I, node_I
