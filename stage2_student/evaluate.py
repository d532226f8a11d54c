"""Bits per byte of a Hugging Face model on held-out text.

Shape legend: B documents, L tokens (start token included), V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.source import resolve_model
from pipeline.tokenizer_bytes import ByteTokenizer
from stage2_student.batches import NO_LABEL
from stage2_student.divergence import byte_divergence
from stage2_student.losses import token_cross_entropy
from stage2_student.model import Precision

_GROUP = 256  # documents encoded, and batched by length, at a time


def evaluate(
    model: Any,
    tokenizer: ByteTokenizer,
    documents: Iterable[bytes],
    start_id: int,
    max_tokens: int = 2048,
    batch_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Held-out bits per byte: nats of the documents' tokens given the start token, without END, / (bytes * ln 2).

    A document that the tokenizer cannot spell, or longer than `max_tokens`, is counted by reason and left out.
    Returns bits_per_byte, nats, num_bytes, num_tokens, num_documents, left_out.
    """
    nats, num_bytes, num_tokens, left_out, measured = 0.0, 0, 0, Counter[str](), 0
    stream = iter(documents)
    while group := list(islice(stream, _GROUP)):
        usable: list[tuple[list[int], int]] = []
        for ids, document in zip(tokenizer.encode_batch(group), group, strict=True):
            if isinstance(ids, ValueError):
                left_out["the tokenizer cannot spell it"] += 1
            elif len(ids) + 1 > max_tokens:
                left_out[f"longer than {max_tokens} tokens"] += 1
            else:
                usable.append((ids, len(document)))
        for batch in _by_length([ids for ids, _ in usable], batch_tokens):
            nats += _batch_nats(model, batch, start_id, Precision(dtype))
        measured += len(usable)
        num_bytes += sum(size for _, size in usable)
        num_tokens += sum(len(ids) for ids, _ in usable)
    if num_bytes == 0:
        raise ValueError(f"no text to evaluate: left out {dict(left_out)}")
    return {
        "bits_per_byte": nats / (num_bytes * math.log(2)),
        "nats": nats,
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "num_documents": measured,
        "left_out": dict(left_out),
    }


def _by_length(encoded: Sequence[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Documents of like length together, at most `batch_tokens` with padding."""
    batch: list[list[int]] = []
    for ids in sorted(encoded, key=len, reverse=True):
        if batch and (len(batch[0]) + 1) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


@torch.no_grad()
def _batch_nats(model: Any, batch: Sequence[list[int]], start_id: int, precision: Precision) -> float:
    """Sum over the batch's tokens of -ln p(token | start, tokens before)."""
    length = max(map(len, batch)) + 1
    tokens_BL = torch.tensor([[start_id, *ids, *[start_id] * (length - 1 - len(ids))] for ids in batch])
    labels_BL = torch.tensor([[*ids, *[NO_LABEL] * (length - len(ids))] for ids in batch])
    tokens_BL, labels_BL = tokens_BL.to(model.device), labels_BL.to(model.device)
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def token_logits(hidden_ND: Tensor) -> Tensor:
        logits_NV = model.get_output_embeddings()(hidden_ND)
        return softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV

    with precision.context(model.device.type):
        hidden_BLD = model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        supervised_BL = labels_BL != NO_LABEL
        nats_N = token_cross_entropy(hidden_BLD[supervised_BL], labels_BL[supervised_BL], token_logits)
        return float(nats_N.sum())


def evaluate_folder(
    folder: str,
    documents: Iterable[bytes],
    start: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_tokens: int = 2048,
) -> dict[str, Any]:
    """`evaluate` for a folder or hub name; `start` is a token's name, default the tokenizer's own start token."""
    tokenizer = ByteTokenizer.load(folder)
    start_id = tokenizer.token_id(start) if start else tokenizer.default_start
    if start_id is None:
        raise ValueError(f"{folder}: its tokenizer has no start token; name one with --start")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(chosen).eval()
    return evaluate(model, tokenizer, documents, start_id, max_tokens, dtype=dtype)


def run_eval(
    model: str,
    corpora: Mapping[str, CorpusConfig],
    dump: Path | None = None,
    start: str | None = None,
    end: str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of one model, by corpus; with a dump, `dump` holds the byte divergence to it (END included)."""
    folder = resolve_model(model)
    found = {}
    for name, config in corpora.items():
        documents = (document.text for document in islice(Corpus(config).documents(), limit))
        found[name] = evaluate_folder(folder, documents, start)
    if dump is not None:
        tokenizer = ByteTokenizer.load(folder)
        start_id = tokenizer.token_id(start) if start else tokenizer.default_start
        end_id = tokenizer.token_id(end) if end else tokenizer.default_end
        if start_id is None or end_id is None:
            raise ValueError(f"{folder}: its tokenizer has no start or no end token; name them with --start and --end")
        found["dump"] = byte_divergence(folder, dump, start_id, (end_id,), limit)
    return found
