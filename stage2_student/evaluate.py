"""Bits per byte of a Hugging Face model on held-out text; of chats, on what the assistant says.

Shape legend: B documents, L tokens (start token included), V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.chat import ChatTokenizer, EncodedChat
from pipeline.chat_template import ChatError, Message
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.loading import load_model
from pipeline.source import resolve_model
from pipeline.tokenizer_bytes import ByteTokenizer
from schemas.manifest import Manifest
from schemas.store import Location
from stage2_student.batches import NO_LABEL
from stage2_student.divergence import byte_divergence, load_spelling
from stage2_student.losses import token_cross_entropy
from stage2_student.model import Precision

_GROUP = 256  # documents encoded, and batched by length, at a time


class Scored(NamedTuple):
    """A document in a model's tokens: what it reads, what it is to predict there (`NO_LABEL`: nothing), and of how many bytes."""

    tokens: list[int]
    labels: list[int]
    num_bytes: int


def evaluate(
    model: Any,
    tokenizer: ByteTokenizer,
    documents: Iterable[bytes | Sequence[Message]],
    start_id: int,
    max_tokens: int = 2048,
    batch_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
    chat: ChatTokenizer | None = None,
) -> dict[str, Any]:
    """Held-out bits per byte: nats of the documents' tokens given the start token, without END, / (bytes * ln 2).

    Of a chat (a list of messages), rendered by `chat`, only what the assistant says counts. A document that the tokenizer cannot
    spell, that the template changes, or longer than `max_tokens`, is counted by reason and left out.
    Returns bits_per_byte, nats, num_bytes, num_tokens, num_documents, left_out.
    """
    nats, num_bytes, num_tokens, left_out, measured = 0.0, 0, 0, Counter[str](), 0
    stream = iter(documents)
    while group := list(islice(stream, _GROUP)):
        usable, reasons = usable_documents(scored_documents(group, tokenizer, start_id, chat), max_tokens)
        left_out += reasons
        for batch in by_length(usable, batch_tokens):
            nats += _batch_nats(model, batch, Precision(dtype))
        measured += len(usable)
        num_bytes += sum(scored.num_bytes for scored in usable)
        num_tokens += sum(label != NO_LABEL for scored in usable for label in scored.labels)
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


def scored_documents(
    documents: Sequence[bytes | Sequence[Message]], tokenizer: ByteTokenizer, start_id: int, chat: ChatTokenizer | None
) -> Iterator[Scored | str]:
    """Each document, or the reason why it is left out."""
    texts = iter(tokenizer.encode_batch([document for document in documents if isinstance(document, bytes)]))
    for document in documents:
        if not isinstance(document, bytes):
            assert chat is not None
            [encoded] = chat.encode_batch([document])
            yield _scored_chat(encoded)
            continue
        ids = next(texts)
        if isinstance(ids, ValueError):
            yield "the tokenizer cannot spell it"
        else:
            yield Scored([start_id, *ids], [*ids, NO_LABEL], len(document))


def _scored_chat(encoded: EncodedChat | ValueError) -> Scored | str:
    if isinstance(encoded, ChatError):
        return encoded.reason
    if isinstance(encoded, ValueError):
        return "the tokenizer cannot spell it"
    labels = [NO_LABEL] * len(encoded.tokens)
    for turn in encoded.turns:
        labels[turn.first - 1 : turn.last - 1] = encoded.tokens[turn.first : turn.last]
    return Scored(encoded.tokens, labels, sum(turn.end - turn.start for turn in encoded.turns))


def usable_documents(found: Iterable[Scored | str], max_tokens: int) -> tuple[list[Scored], Counter[str]]:
    """Documents that can be scored, and why others cannot."""
    usable, left_out = [], Counter[str]()
    for scored in found:
        if isinstance(scored, str):
            left_out[scored] += 1
        elif len(scored.tokens) > max_tokens:
            left_out[f"longer than {max_tokens} tokens"] += 1
        else:
            usable.append(scored)
    return usable, left_out


def by_length(documents: Sequence[Scored], batch_tokens: int) -> Iterator[list[Scored]]:
    """Documents of like length together, at most `batch_tokens` with padding."""
    batch: list[Scored] = []
    for scored in sorted(documents, key=lambda scored: len(scored.tokens), reverse=True):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(scored)
    if batch:
        yield batch


@torch.no_grad()
def _batch_nats(model: Any, batch: Sequence[Scored], precision: Precision) -> float:
    """Sum over the batch's labels of -ln p(label | tokens before)."""
    length = max(len(scored.tokens) for scored in batch)
    padding = [length - len(scored.tokens) for scored in batch]
    tokens_BL = torch.tensor([s.tokens + [0] * more for s, more in zip(batch, padding, strict=True)])
    labels_BL = torch.tensor([s.labels + [NO_LABEL] * more for s, more in zip(batch, padding, strict=True)])
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
    documents: Iterable[bytes | Sequence[Message]],
    start: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_tokens: int = 2048,
    chats: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`evaluate` for a folder or hub name; `start` is a token's name, default the tokenizer's own start token.

    Args:
        chats: the documents are chats. Raises ValueError for a model without chat template.
    """
    tokenizer, chat = load_spelling(folder, chats, revision, trust_remote_code)
    start_id = tokenizer.token_id(start) if start else tokenizer.default_start
    if start_id is None:
        raise ValueError(f"{folder}: its tokenizer has no start token; name one with --start")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, revision, torch.float32, trust_remote_code).to(chosen).eval()
    return evaluate(model, tokenizer, documents, start_id, max_tokens, dtype=dtype, chat=chat)


def run_eval(
    model: str,
    corpora: Mapping[str, CorpusConfig],
    dump: Location | None = None,
    start: str | None = None,
    end: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Figures of one model, by corpus; with a dump, `dump` holds the byte divergence to it (END included).

    Args:
        revision: of a hub name, for weights and tokenizer; ValueError for anything else.
    """
    folder = resolve_model(model, revision)
    of_model: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    found = {}
    for name, config in corpora.items():
        documents = (document.messages or document.text for document in islice(Corpus(config).documents(), limit))
        found[name] = evaluate_folder(folder, documents, start, chats=config.has_chats, **of_model)
    if dump is not None:
        tokenizer, chat = load_spelling(folder, Manifest.load(dump).has_chats, **of_model)
        start_id = tokenizer.token_id(start) if start else tokenizer.default_start
        default_end = tokenizer.default_end if chat is None else chat.end_of_turn()
        end_id = tokenizer.token_id(end) if end and chat is None else default_end
        if start_id is None or end_id is None:
            raise ValueError(f"{folder}: its tokenizer has no start or no end token; name them with --start and --end")
        found["dump"] = byte_divergence(folder, dump, start_id, (end_id,), limit, **of_model)
    return found
