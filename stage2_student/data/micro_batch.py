"""Micro-batches: several examples as padded tensors.

Shape legend: B rows (one document each, or several packed), L tokens of the longest row (including start tokens), P
supervised byte positions, E maximum number of entries stored at one position.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.columns import MEASURES
from stage2_student.data.examples import NO_LABEL, NO_SYMBOL, Example


class Layout(NamedTuple):
    """The places of documents among the B x L states of a micro-batch."""

    shape: tuple[int, int]  # B, L
    firsts: tuple[int, ...]  # index of each document's first state in the flattened B x L

    @classmethod
    def of(cls, lengths: Sequence[int], row_sizes: Sequence[int] | None = None) -> "Layout":
        """Lay out documents in turn, given their token counts.

        Args:
            row_sizes: number of documents in each row; None: one each.
        """
        sizes = [1] * len(lengths) if row_sizes is None else row_sizes
        edges = np.cumsum([0, *sizes])
        assert edges[-1] == len(lengths)
        rows = [lengths[first:last] for first, last in pairwise(edges)]
        length = max(map(sum, rows))
        firsts = [row * length + start for row, inside in enumerate(rows) for start in accumulate([0, *inside[:-1]])]
        return cls((len(rows), length), tuple(firsts))


@dataclass(frozen=True)
class MicroBatch:
    """Examples in rows. `state_P` indexes the flattened B x L states.

    A causal student needs no padding mask: padding comes after every supervised token of its row.
    """

    doc_ids: tuple[str, ...]
    layout: Layout
    tokens_BL: Tensor
    labels_BL: Tensor
    state_P: Tensor
    offset_P: Tensor
    symbols_P: Tensor
    kl_P: Tensor
    entry_symbols_PE: Tensor
    entry_logprobs_PE: Tensor
    num_bytes: int
    corpus: int = 0  # index of the corpus, of a union, that all of its documents are from
    # For packed rows: positions restart at 0 with each document, and padding has 0. None: the model's default.
    positions_BL: Tensor | None = None
    measures_P: dict[str, Tensor] = field(default_factory=dict)  # float32, by column (`schemas.columns.MEASURES`)
    extra: dict[str, Tensor] = field(default_factory=dict)  # from the interface, see `Interface.prepare`

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Return a copy with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, Tensor)}
        for name in ("measures_P", "extra"):
            moved[name] = {n: v.to(device, non_blocking=True) for n, v in values[name].items()}
        return replace(self, **moved)


def collate(examples: Sequence[Example], row_sizes: Sequence[int] | None = None) -> MicroBatch:
    """Pad examples to one micro-batch.

    Args:
        row_sizes: number of documents in each row; None: one each.
    """
    lengths = [len(e.tokens_L) for e in examples]
    layout = Layout.of(lengths, row_sizes)
    width = max(e.entry_symbols_PE.shape[1] for e in examples)
    is_packed = layout.shape[0] < len(examples)
    return MicroBatch(
        doc_ids=tuple(e.doc_id for e in examples),
        layout=layout,
        tokens_BL=_place([e.tokens_L for e in examples], layout, 0),
        labels_BL=_place([e.labels_L for e in examples], layout, NO_LABEL),
        positions_BL=_place([np.arange(length) for length in lengths], layout, 0) if is_packed else None,
        state_P=_join(e.state_P + first for e, first in zip(examples, layout.firsts, strict=True)),
        offset_P=_join(e.offset_P for e in examples),
        symbols_P=_join(e.symbols_P for e in examples),
        kl_P=_join(e.kl_P for e in examples),
        entry_symbols_PE=_join(_widen(e.entry_symbols_PE, width, NO_SYMBOL) for e in examples),
        entry_logprobs_PE=_join(_widen(e.entry_logprobs_PE, width, 0.0) for e in examples),
        num_bytes=sum(e.num_bytes for e in examples),
        measures_P=_measures(examples),
    )


def _measures(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Join the measures that all examples have; an example without positions is compatible with any."""
    supervised = [e.measures_P for e in examples if len(e.state_P)]
    names = [column.name for column in MEASURES if all(column.name in measures for measures in supervised)]
    none = np.empty(0, dtype=np.float32)
    return {name: _join([none, *(measures[name] for measures in supervised)]) for name in names}


def empty_micro_batch(start_id: int) -> MicroBatch:
    """Return a micro-batch of one token with nothing supervised.

    A rank runs it while others still work, because ZeRO's collectives need every rank.
    """
    none = np.empty(0, dtype=np.int64)
    entries_PE = np.empty((0, 1))
    tokens_L, labels_L = np.array([start_id]), np.array([NO_LABEL])
    example = Example("", tokens_L, labels_L, none, none, none, none.astype(bool), entries_PE, entries_PE, 0)
    micro = collate([example])
    return replace(micro, doc_ids=(), layout=Layout((1, 1), ()), entry_symbols_PE=micro.entry_symbols_PE.long())


def _place(documents: Sequence[np.ndarray], layout: Layout, fill: int) -> Tensor:
    """Return B x L, int64: each document's values at its states, `fill` elsewhere."""
    padded = np.full(layout.shape, fill, dtype=np.int64)
    flat = padded.reshape(-1)
    for values, first in zip(documents, layout.firsts, strict=True):
        flat[first : first + len(values)] = values
    return torch.from_numpy(padded)


def _join(parts: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(parts)))


def _widen(values_PE: np.ndarray, width: int, fill: float) -> np.ndarray:
    return np.pad(values_PE, ((0, 0), (0, width - values_PE.shape[1])), constant_values=fill)
