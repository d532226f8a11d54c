"""Fast Vocabulary Transfer: move a model to another tokenizer by rewriting its embedding and head rows.

Shape legend: V tokens of a vocabulary, D hidden width.
Source: Gee et al. 2022, EMNLP industry track, "Fast Vocabulary Transfer for Language Model Compression".
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

KINDS = ("copied", "averaged", "fallback", "control")


class Vocabulary(Protocol):
    """What a transfer needs of `pipeline.tokenizer_bytes.ByteTokenizer`."""

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]: ...
    @property
    def prefix(self) -> bytes: ...
    def encode(self, document: bytes) -> list[int]: ...


@dataclass(frozen=True)
class TransferCounts:
    """Rows of the new vocabulary, by where they come from."""

    copied: int  # the old vocabulary has a token of the same bytes
    averaged: int  # mean over the old tokenizer's own pieces of the bytes
    fallback: (
        int  # mean over the longest old tokens that spell the bytes: half a character, or not spelled by the tokenizer
    )
    control: int  # spells nothing: a start or end row of the old model, or the mean of all rows

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def transfer(
    model: Any, old: Vocabulary, new: Vocabulary, controls: dict[int, int], averaged_scale: float = 1.0
) -> TransferCounts:
    """Move a causal language model to the vocabulary `new`, in place: embedding, head and vocabulary size.

    Args:
        controls: new id -> old id of tokens with a role (start, end), whatever their spelling.
        averaged_scale: rows that are means of old ones are multiplied by it. The mean of a word's pieces says how likely its pieces
            are, not how likely they are one after the other: unscaled, such tokens get several times the mass that they should.
    Raises:
        ValueError: an old id in `controls` has no embedding row.
    """
    width = model.get_input_embeddings().weight.shape[0]
    lacking = {n: o for n, o in controls.items() if o >= width}
    if lacking:
        raise ValueError(f"old control tokens {lacking} (new id: old id) have no row in an embedding of {width} rows")
    sources, kinds = row_sources(old, new, controls, width)
    tied = (
        model.get_output_embeddings() is None
        or model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    scales = torch.tensor([averaged_scale if kind in ("averaged", "fallback") else 1.0 for kind in kinds])
    embedding_VD = mean_rows(model.get_input_embeddings().weight.detach(), sources, scales)
    head_VD = None if tied else mean_rows(model.get_output_embeddings().weight.detach(), sources, scales)
    bias_V = getattr(model.get_output_embeddings(), "bias", None)  # of its own even where the weight is tied
    bias_V1 = None if bias_V is None else mean_rows(bias_V.detach()[:, None], sources, torch.ones(len(sources)))
    model.resize_token_embeddings(len(sources), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding_VD)
        if head_VD is not None:
            model.get_output_embeddings().weight.copy_(head_VD)
        if bias_V1 is not None:
            model.get_output_embeddings().bias.copy_(bias_V1[:, 0])
    return TransferCounts(**{kind: kinds.count(kind) for kind in KINDS})


def row_sources(
    old: Vocabulary, new: Vocabulary, controls: dict[int, int], old_rows: int
) -> tuple[list[list[int]], list[str]]:
    """For each new token the old rows whose mean it gets (empty: the mean of all), and which kind of row that is."""
    by_bytes: dict[bytes, int] = {}
    for token_id, spelled in enumerate(old.token_bytes[:old_rows]):
        if spelled:
            by_bytes.setdefault(spelled, token_id)
    longest = max(map(len, by_bytes))
    sources: list[list[int]] = []
    kinds: list[str] = []
    for token_id, spelled in enumerate(new.token_bytes):
        if token_id in controls or not spelled:
            source, kind = [controls[token_id]] if token_id in controls else [], "control"
        elif spelled in by_bytes:
            source, kind = [by_bytes[spelled]], "copied"
        else:
            source, kind = _pieces(spelled, old, by_bytes, longest, old_rows)
        sources.append(source)
        kinds.append(kind)
    return sources, kinds


def _pieces(
    spelled: bytes, old: Vocabulary, by_bytes: dict[bytes, int], longest: int, old_rows: int
) -> tuple[list[int], str]:
    """The old tokenizer's pieces of these bytes; where it has none, the longest old tokens from the left."""
    bare = spelled.removeprefix(old.prefix) if old.prefix else spelled
    if bare and (not old.prefix or bare != spelled):  # else the tokenizer would put its prefix before a word's middle
        try:
            bare.decode("utf-8")
            ids = old.encode(bare)
        except ValueError:  # half a character, or bytes that the old tokenizer drops
            ids = []
        if ids and max(ids) < old_rows:
            return ids, "averaged"
    return longest_match(spelled, by_bytes, longest), "fallback"


def longest_match(spelled: bytes, by_bytes: dict[bytes, int], longest: int) -> list[int]:
    """Greedy pieces from the left; a byte that no old token spells is passed over."""
    ids, at = [], 0
    while at < len(spelled):
        for size in range(min(longest, len(spelled) - at), 0, -1):
            if spelled[at : at + size] in by_bytes:
                ids.append(by_bytes[spelled[at : at + size]])
                at += size
                break
        else:
            at += 1
    return ids


def mean_rows(weight_VD: Tensor, sources: Sequence[Sequence[int]], scales: Tensor) -> Tensor:
    """Row `i` is `scales[i]` times the float32 mean of the rows `sources[i]`, in the weight's dtype; of all rows where that is empty."""
    flat = torch.tensor([i for source in sources for i in source], dtype=torch.long)
    counts = torch.tensor([len(source) for source in sources])
    into = torch.repeat_interleave(torch.arange(len(sources)), counts)
    sums_VD = torch.zeros(len(sources), weight_VD.shape[1])
    sums_VD.index_add_(0, into, weight_VD.float()[flat])
    means_VD = sums_VD / counts.clamp(min=1)[:, None]
    means_VD[counts == 0] = weight_VD.float().mean(0)
    return (scales[:, None] * means_VD).to(weight_VD.dtype)
