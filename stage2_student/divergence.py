"""Byte divergence of a model to a dump: KL(teacher || model), position by position, both through the canonical covering.

The model has no byte head: its own token logits are summed to bytes exactly as the teacher's were (`pipeline.covering`).

Shape legend: R rows, C sorted columns, P positions, V symbols (256), E entries.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.covering import Covering, unnormalised
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from pipeline.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from schemas.manifest import Manifest
from schemas.shard import Record, read_shard


def sparse_kl(record: Record, probs_PV: np.ndarray) -> np.ndarray:
    """P, nats: KL of the stored target to `probs_PV`; the symbols not stored are one class on both sides."""
    position_E = np.repeat(np.arange(record.num_positions), record.entry_counts)
    teacher_E = np.exp(record.logprobs.astype(np.float64))
    model_E = probs_PV[position_E, record.symbols]
    terms_E = teacher_E * (np.log(teacher_E) - np.log(np.maximum(model_E, 1e-300)))
    kl_P = np.bincount(position_E, terms_E, record.num_positions)
    teacher_tail_P = np.maximum(1 - np.bincount(position_E, teacher_E, record.num_positions), 0.0)
    unstored_PV = probs_PV.copy()
    unstored_PV[position_E, record.symbols] = 0.0
    model_tail_P = np.maximum(unstored_PV.sum(axis=1), 1e-300)
    # Where every symbol is stored there is no tail: what is left to 1 is float16's rounding.
    has_tail_P = (teacher_tail_P > 0) & (record.entry_counts < NUM_SYMBOLS)
    kl_P[has_tail_P] += teacher_tail_P[has_tail_P] * np.log(teacher_tail_P[has_tail_P] / model_tail_P[has_tail_P])
    return kl_P


class ByteModel:
    """A Hugging Face model asked for next-byte distributions through the canonical covering."""

    def __init__(self, model: str, start: int, ends: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = ByteTokenizer.load(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        width = self.model.get_output_embeddings().weight.shape[0]
        self.vocabulary = Vocabulary(self.tokenizer.token_bytes, ends, width)
        self.order = torch.from_numpy(self.vocabulary.order).to(self.device)
        self.start = start

    @torch.inference_mode()
    def probs(self, document: bytes) -> np.ndarray:
        """[bytes + 1, 256] float64. Raises SpellingError where the model's tokenizer cannot spell the document."""
        tokens = self.tokenizer.encode(document)
        prefix = self.tokenizer.prefix
        covering = Covering(self.vocabulary, tokens, prefix + document)
        ids_1R = torch.tensor([[self.start, *tokens]], device=self.device)
        logits_RV = self.model(ids_1R, use_cache=False).logits[0].float()
        rows = (
            probs_C
            for part_RV in logits_RV.split(128)
            for probs_C in unnormalised(part_RV[:, self.order].cpu().numpy())
        )
        targets = covering.targets(covering.reduce_row(row, probs_C) for row, probs_C in enumerate(rows))
        return targets.drop_prefix(len(prefix)).probs_PV


def records_of(dump: Path) -> Iterator[Record]:
    for shard in Manifest.load(dump).shards:
        yield from read_shard(shard.path(dump))


def byte_divergence(
    model: str, dump: Path, start: int, ends: tuple[int, ...], limit: int | None = None, max_token_end: float = 0.05
) -> dict[str, Any]:
    """Mean KL(teacher || model) over the positions of a dump, nats.

    Returns:
        kl_nats over all positions; kl_clear_nats over those with token_end <= `max_token_end` (elsewhere canonical targets
        are themselves uncertain); records and positions counted, records left out because the model cannot spell them.
    """
    byte_model = ByteModel(model, start, ends)
    kl, clear, left_out, num_records = [], [], 0, 0
    for record in records_of(dump):
        if limit is not None and num_records == limit:
            break
        try:
            probs_PV = byte_model.probs(record.document)
        except SpellingError:
            left_out += 1
            continue
        taken = np.concatenate([np.arange(s.start, s.start + s.num_positions) for s in record.segments])
        kl_P = sparse_kl(record, probs_PV[taken])
        kl.append(kl_P)
        clear.append(kl_P[record.token_end.astype(np.float64) <= max_token_end])
        num_records += 1
    if not kl:
        raise ValueError(f"{dump}: none of its {left_out} records can be spelled by the tokenizer of {model}")
    kl_all, kl_clear = np.concatenate(kl), np.concatenate(clear)
    return {
        "kl_nats": float(kl_all.mean()),
        "kl_clear_nats": float(kl_clear.mean()),
        "positions": len(kl_all),
        "clear_positions": len(kl_clear),
        "records": num_records,
        "left_out_unspellable": left_out,
    }
