"""Byte divergence of a model to a dump, position by position, both through the canonical covering.

The model has no byte head: its own token logits are summed to bytes exactly as the teacher's were (`pipeline.covering`).

Shape legend: R rows, C sorted columns, P positions, V symbols (256), E entries.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.covering import Covering, ReducedRow, Targets, unnormalised
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from pipeline.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from schemas.manifest import Manifest
from schemas.shard import Record, read_shard

MIN_PROB = 1e-10  # a canonical covering gives no mass to a symbol that no token goes on with; 23 nats stand for "never"


def sparse_divergence(record: Record, probs_PV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(KL(stored target || model), Jensen-Shannon divergence), each P, nats; the symbols not stored are one class on both sides."""
    position_E = np.repeat(np.arange(record.num_positions), record.entry_counts)
    teacher_E = np.exp(record.logprobs.astype(np.float64))
    unstored_PV = probs_PV.copy()
    unstored_PV[position_E, record.symbols] = 0.0
    teacher_tail_P = np.maximum(1 - np.bincount(position_E, teacher_E, record.num_positions), 0.0)
    # Where every symbol is stored there is no tail: what is left to 1 is rounding.
    teacher_tail_P[record.entry_counts == NUM_SYMBOLS] = 0.0
    teacher = np.concatenate([teacher_E, teacher_tail_P])
    model = np.concatenate([probs_PV[position_E, record.symbols], unstored_PV.sum(axis=1)])
    position = np.concatenate([position_E, np.arange(record.num_positions)])
    middle = (teacher + model) / 2
    kl_P = np.bincount(position, _terms(teacher, np.maximum(model, MIN_PROB)), record.num_positions)
    jsd = (_terms(teacher, middle) + _terms(model, middle)) / 2
    return kl_P, np.bincount(position, jsd, record.num_positions)


def _terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p ln(p / q), 0 where p is 0."""
    terms = np.zeros_like(p)
    np.divide(p, q, out=terms, where=p > 0)
    np.log(terms, out=terms, where=p > 0)
    return terms * p


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
    def targets(self, document: bytes) -> Targets:
        """Distributions at the document's bytes + 1 positions. Raises SpellingError where the model's tokenizer cannot spell the document."""
        tokens = self.tokenizer.encode(document)
        prefix = self.tokenizer.prefix
        covering = Covering(self.vocabulary, tokens, prefix + document)
        ids_1R = torch.tensor([[self.start, *tokens]], device=self.device)
        logits_RV = self.model(ids_1R, use_cache=False).logits[0].float()
        rows: list[ReducedRow] = []
        for part_RV in logits_RV.split(128):
            offsets = covering.offsets[len(rows) : len(rows) + len(part_RV)]
            rows += covering.reduce_rows(offsets, unnormalised(part_RV[:, self.order].cpu().numpy()))
        return covering.targets(rows).drop_prefix(len(prefix))


def records_of(dump: Path) -> Iterator[Record]:
    for shard in Manifest.load(dump).shards:
        yield from read_shard(shard.path(dump))


class DocumentDivergence(NamedTuple):
    """A record beside a model; sums in nats, over positions or over those that are clear."""

    doc_id: str
    positions: int
    jsd_nats: float
    clear: int  # positions where token_end is at most a threshold on both sides: elsewhere one covering is uncertain itself
    kl_clear_nats: float  # KL(teacher || model)
    num_bytes: int  # of the record's document
    token_nats: float  # -ln p of the model's own tokens of the document, without END


def document_divergence(byte_model: ByteModel, record: Record, max_token_end: float = 0.05) -> DocumentDivergence:
    """One record's divergence. Raises SpellingError where the model's tokenizer cannot spell it."""
    targets = byte_model.targets(record.document)
    taken = np.concatenate([np.arange(s.start, s.start + s.num_positions) for s in record.segments])
    kl_P, jsd_P = sparse_divergence(record, targets.probs_PV[taken])
    token_end_P = np.maximum(record.token_end.astype(np.float64), targets.token_end_P[taken])
    clear_P = token_end_P <= max_token_end
    return DocumentDivergence(
        record.doc_id,
        len(jsd_P),
        float(jsd_P.sum()),
        int(clear_P.sum()),
        float(kl_P[clear_P].sum()),
        len(record.document),
        -float(targets.token_logprobs.sum()),
    )


def byte_divergence(
    model: str, dump: Path, start: int, ends: tuple[int, ...], limit: int | None = None, max_token_end: float = 0.05
) -> dict[str, Any]:
    """Divergence of a model to a dump, mean nats per position.

    Returns:
        jsd_nats over all positions: bounded, so that the few where a canonical covering is confidently wrong do not decide
        it. kl_clear_nats over the clear positions (nan where there is none). clear_share of the positions; positions and
        records counted; records left out because the model cannot spell them.
    """
    byte_model = ByteModel(model, start, ends)
    found: list[DocumentDivergence] = []
    left_out = 0
    for record in records_of(dump):
        if limit is not None and len(found) == limit:
            break
        try:
            found.append(document_divergence(byte_model, record, max_token_end))
        except SpellingError:
            left_out += 1
    if not found:
        raise ValueError(f"{dump}: none of its {left_out} records can be spelled by the tokenizer of {model}")
    positions, clear = sum(d.positions for d in found), sum(d.clear for d in found)
    return {
        "jsd_nats": sum(d.jsd_nats for d in found) / positions,
        "kl_clear_nats": sum(d.kl_clear_nats for d in found) / clear if clear else float("nan"),
        "clear_share": clear / positions,
        "positions": positions,
        "records": len(found),
        "left_out_unspellable": left_out,
    }
