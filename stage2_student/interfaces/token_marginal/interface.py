"""The token-marginal interface: the student's own token probabilities, summed to bytes by the canonical covering.

It has no parameters: what it teaches is in the student's own head when training is over. It is exact except for
segmentations of the text other than the tokenizer's own; positions where those hold more than a given share of the
known mass are masked.

Shape legend: B documents, L tokens, D hidden width, R rows, N supervised tokens, P supervised byte positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.covering.vocabulary import Vocabulary
from stage2_student.data.examples import NO_LABEL, Encoded, Example
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.interfaces.base import ByteScores, Head, Interface, StudentShape
from stage2_student.interfaces.token_marginal.cells import ForwardCache, cell_sums
from stage2_student.interfaces.token_marginal.node_sums import Kernels, Memory, Setting, node_sums
from stage2_student.interfaces.token_marginal.nodes import (
    NodePlan,
    Tables,
    chunk_sizes,
    chunks_of,
    node_plan,
    plan_of,
    rows_of,
    unique_positions,
)
from stage2_student.interfaces.token_marginal.plan import Plan, make_plan, make_walk
from stage2_student.interfaces.token_marginal.positions import Distributions, distributions
from stage2_student.interfaces.token_marginal.types import Cells, Columns, Sums

CHUNK_ROWS = 256


class TokenMarginal(Interface):
    """Byte distributions from the student's token logits.

    Args:
        max_dropped: positions where a larger share of the student's known mass lies on tokens that end off its
            canonical path, inside the current token, are not counted.
    """

    max_bytes = None
    token_C: Tensor
    column_V: Tensor
    _tables: Tables
    by_nodes: tuple[Kernels, Memory] | None = None  # kernels for rows that are shipped as nodes; None: cells are

    def __init__(self, shape: StudentShape, max_dropped: float) -> None:
        super().__init__()
        self.max_dropped = max_dropped
        self.vocabulary = Vocabulary(shape.token_bytes, shape.end_ids, shape.head_rows)
        self.token_lengths = np.zeros(shape.head_rows, dtype=np.int64)
        self.token_lengths[self.vocabulary.order[: self.vocabulary.num_text_tokens]] = list(
            map(len, self.vocabulary.sorted_bytes)
        )
        self.register_buffer("token_C", torch.from_numpy(self.vocabulary.order.astype(np.int32)), persistent=False)
        self.register_buffer("column_V", torch.from_numpy(self.vocabulary.column.astype(np.int32)), persistent=False)

    @property
    def columns(self) -> Columns:
        return Columns(self.token_C, self.column_V, self.vocabulary.num_text_tokens, self.vocabulary.num_end)

    def prepare(
        self, documents: Sequence[Encoded], examples: Sequence[Example], batch: MicroBatch
    ) -> dict[str, Tensor]:
        """Return the `Plan` of the micro-batch, or what `nodes.node_plan` ships."""
        walk = make_walk(self.vocabulary, self.token_lengths, documents, examples, batch.layout.firsts)
        if self.by_nodes is None:
            return make_plan(self.vocabulary, walk)._asdict()
        labels_R = batch.labels_BL.flatten()[torch.from_numpy(walk.state_R)]
        return node_plan(self.vocabulary, walk, (labels_R != NO_LABEL).numpy(), *self.by_nodes[1])

    def use_nodes(self, kernels: Kernels, memory: Memory) -> None:
        """Ship nodes, and compute with these kernels on the device that the interface is on."""
        self.by_nodes = kernels, memory
        self._tables = Tables.of(self.vocabulary)

    def _setting(self, device: torch.device) -> Setting:
        assert self.by_nodes is not None
        # Not buffers, since ranks send each other those, and not every transport knows integers of 16 bits.
        self._tables = Tables(*(table.to(device) for table in self._tables))
        return Setting(*self.by_nodes, self._tables, self.columns)

    def forward(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> ByteScores:
        """Implement `Interface.forward`."""
        return _scores(*self.marginals(hidden_BLD, batch, head), self.max_dropped)

    def marginals(self, hidden_BLD: Tensor, batch: MicroBatch, head: Head) -> tuple[Distributions, Tensor]:
        """Compute `marginals` of this student's head."""
        if self.by_nodes is None:
            return marginals(hidden_BLD, batch, head, self.columns)
        return _marginals_by_nodes(hidden_BLD, batch, head, self._setting(hidden_BLD.device))


def byte_scores(hidden_BLD: Tensor, batch: MicroBatch, head: Head, columns: Columns, max_dropped: float) -> ByteScores:
    """Compute the interface's output from a micro-batch that it has prepared.

    Args:
        columns: those of the head, in byte order; on the states' device.
        max_dropped: as of `TokenMarginal`.
    """
    return _scores(*marginals(hidden_BLD, batch, head, columns), max_dropped)


def _scores(found: Distributions, token_nats_N: Tensor, max_dropped: float) -> ByteScores:
    return ByteScores(found.logprobs_PV.float(), found.token_end_P <= max_dropped, token_nats_N.float())


def marginals(hidden_BLD: Tensor, batch: MicroBatch, head: Head, columns: Columns) -> tuple[Distributions, Tensor]:
    """Compute the distributions at the supervised positions, and -ln p(label | state) of the supervised tokens.

    Both are float64.
    """
    plan = Plan(*(batch.extra[name] for name in Plan._fields))
    labels_R = batch.labels_BL.flatten()[plan.state_R]
    tokens_R2 = torch.stack([plan.next_R, labels_R], dim=-1)
    sums = _sums(hidden_BLD.flatten(0, 1)[plan.state_R], plan, tokens_R2, head, columns)
    return distributions(sums, plan), -sums.logprob_R2[labels_R != NO_LABEL, 1]


def _marginals_by_nodes(
    hidden_BLD: Tensor, batch: MicroBatch, head: Head, setting: Setting
) -> tuple[Distributions, Tensor]:
    """Compute `marginals` of rows that were shipped as nodes. Nothing of it waits for the device."""
    nodes = NodePlan(*(batch.extra[name] for name in NodePlan._fields))
    sizes = chunk_sizes(batch.extra)
    rows, unique_Q = rows_of(nodes), unique_positions(nodes)
    num_cells = sum(cells for _, cells in sizes)
    plan = plan_of(nodes, unique_Q, setting.kernels.list_cells(nodes, rows, unique_Q, setting.tables, num_cells))
    tokens_R2 = torch.stack([plan.next_R, batch.labels_BL.flatten()[plan.state_R]], dim=-1)
    chunks = chunks_of(rows, plan, tokens_R2, sizes)
    sums = node_sums(hidden_BLD.flatten(0, 1)[plan.state_R], chunks, head, setting)
    return distributions(sums, plan), -sums.logprob_R2[nodes.row_M.long(), 1]


def _sums(hidden_RD: Tensor, plan: Plan, tokens_R2: Tensor, head: Head, columns: Columns) -> Sums:
    """Compute the sums of all rows.

    Only the logits of `CHUNK_ROWS` rows are held at once, and computed again for the gradient.
    """

    def chunk_sums(hidden_rD: Tensor, cells: Cells, cache: ForwardCache) -> tuple[Tensor, ...]:
        return cell_sums(head(hidden_rD), cells, columns, cache)

    # At least one chunk, even if empty: on a rank without supervised tokens the head must still get a (zero) gradient.
    starts = range(0, max(len(hidden_RD), 1), CHUNK_ROWS)
    cell_R = torch.cat([plan.num_cells_R.new_zeros(1), plan.num_cells_R.cumsum(0)]).tolist()
    chunks = []
    for first in starts:
        last = min(first + CHUNK_ROWS, len(hidden_RD))
        inside = slice(cell_R[first], cell_R[last])
        cells = Cells(plan.num_cells_R[first:last], plan.first_I[inside], plan.last_I[inside], tokens_R2[first:last])
        chunks.append(checkpoint(chunk_sums, hidden_RD[first:last], cells, ForwardCache(), use_reentrant=False))
    return Sums(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
