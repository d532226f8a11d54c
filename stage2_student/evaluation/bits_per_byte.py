"""Bits per byte of Hugging Face models on held-out text; in chats, on what the assistant says.

The logits are always the model's own: many families scale, cap or suppress them after the head, each in its own way.
Models that are compared are scored on the same bytes (`stage2_student.evaluation.scored_text`), and read long documents
in windows (`stage2_student.evaluation.token_windows`).

Shape legend: B windows, L tokens (including the start token), N predicted tokens, V vocabulary.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.config import CorpusConfig
from pipeline.config.evaluated import EvaluatedModel
from pipeline.corpus.documents import Corpus, Document
from pipeline.covering.vocabulary import check_head_rows
from pipeline.runtime import log
from pipeline.runtime.causality import check_causal
from pipeline.runtime.devices import compute_device
from pipeline.runtime.format import count_of
from pipeline.runtime.huggingface import load_config, load_model
from pipeline.runtime.padding import padded_groups
from pipeline.sources.resolve import resolve_model
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from schemas.storage.locations import Location
from stage2_student.data.examples import NO_LABEL
from stage2_student.evaluation.asked_positions import asked_records
from stage2_student.evaluation.divergence import ByteModel, byte_divergence
from stage2_student.evaluation.scored_text import GROUP, Reader, ScoredText, scored_text
from stage2_student.evaluation.spelled_text import Span, Spelled, Text
from stage2_student.evaluation.token_windows import TokenWindow, cut_tokens, overlap_of, window_size
from stage2_student.model.student import Precision

_BATCH_TOKENS = 4096  # maximum in a forward pass
# Approximate maximum in a forward pass: 1 GiB in float32. With a vocabulary of 262,144, 1,024 tokens or one window fit.
_MAX_LOGITS = 2**28
_CHUNK = 512  # tokens whose logits are converted to float32 at once, if the model's are not


class Scored(NamedTuple):
    """A window in a model's tokens.

    Attributes:
        tokens: the input.
        labels: the token to predict at each input token; `NO_LABEL` for none.
        num_bytes: bytes of the tokens to predict.
    """

    tokens: list[int]
    labels: list[int]
    num_bytes: int


def evaluate(
    model: Any,
    reader: Reader,
    documents: Iterable[Text],
    text: ScoredText,
    max_tokens: int = 2048,
) -> dict[str, Any]:
    """Measure held-out bits per byte.

    That is nats of the documents' tokens given the start token, without END, / (bytes * ln 2).

    In a chat only what the assistant says counts; a chat with reasoning or calls counts as one document per turn. In a
    document longer than a window each token is predicted once, with at least a quarter of a window before it.

    Args:
        text: the documents and bytes to score, see `scored_text`.
        max_tokens: of a window, including the start token.
    Returns:
        bits_per_byte, nats, num_bytes, num_tokens, num_documents, num_windows, max_tokens, left_out, text_sha256.
    Raises:
        ValueError: the sum is not finite, the model has fewer logits than its tokenizer has tokens, or the text has
            changed.
    """
    check_head_rows(model.get_output_embeddings().weight.shape[0], reader.tokenizer.token_bytes)
    nats, num_bytes, num_tokens, num_windows, number = 0.0, 0, 0, 0, 0
    stream = iter(documents)
    while group := list(islice(stream, GROUP)):
        windows: list[Scored] = []
        for spelled in reader.spell(group):
            if isinstance(spelled, Spelled):
                windows += cut_document(spelled, text.spans(number, spelled), max_tokens)
            number += 1
        for batch in by_length(windows, fitting_tokens(model)):
            nats += _batch_nats(model, batch)
        num_windows += len(windows)
        num_bytes += sum(scored.num_bytes for scored in windows)
        num_tokens += sum(label != NO_LABEL for scored in windows for label in scored.labels)
    if num_bytes != text.num_bytes:
        raise ValueError(
            f"{reader.name}: {num_bytes} bytes were scored instead of {text.num_bytes}: the text changed during the "
            "evaluation; start again"
        )
    if not math.isfinite(nats):
        raise ValueError(
            f"{reader.name}: the text has {nats} nats: either some weights are not finite, or the model gives a token "
            "of the text a probability of 0"
        )
    return {
        "bits_per_byte": nats / (num_bytes * math.log(2)),
        "nats": nats,
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "num_documents": text.num_documents,
        "num_windows": num_windows,
        "max_tokens": max_tokens,
        "left_out": text.left_out,
        "text_sha256": text.sha256,
    }


def cut_document(spelled: Spelled, spans: Sequence[Span], max_tokens: int) -> Iterator[Scored]:
    """Yield the windows that score these bytes of a document."""
    sizes_L = spelled.token_bytes(spans)
    for window in cut_tokens(sizes_L >= 0, max_tokens, spelled.restarts, spelled.repeats_start):
        yield scored_window(spelled, sizes_L, window)


def scored_window(spelled: Spelled, sizes_L: np.ndarray, window: TokenWindow) -> Scored:
    """Return a window of a document whose tokens have these bytes, as a model reads it."""
    tokens = window.read(spelled.tokens)
    labels = np.full(len(tokens), NO_LABEL, dtype=np.int64)
    labels[window.rows] = np.array(spelled.tokens)[window.targets]
    return Scored(tokens, labels.tolist(), int(sizes_L[window.targets].sum()))


def by_length(windows: Sequence[Scored], batch_tokens: int) -> Iterator[list[Scored]]:
    """Group windows of similar length, of at most `batch_tokens` tokens including padding."""
    for group in padded_groups([len(scored.tokens) for scored in windows], batch_tokens):
        yield [windows[index] for index in group]


def fitting_tokens(model: Any) -> int:
    """Return how many tokens' logits fit into memory in a forward pass: fewer for a large vocabulary."""
    return min(_BATCH_TOKENS, max(1, _MAX_LOGITS // int(model.get_output_embeddings().weight.shape[0])))


def _batch_nats(model: Any, batch: Sequence[Scored]) -> float:
    """Sum -ln p(label | tokens before) over the batch's labels."""
    nats = 0.0
    for logits_LV, labels_L in batch_logits(model, batch):
        for logits_lV, labels_l in zip(logits_LV.split(_CHUNK), labels_L.split(_CHUNK), strict=True):
            nats += float(cross_entropy(logits_lV.float(), labels_l, ignore_index=NO_LABEL, reduction="sum").double())
    return nats


@torch.no_grad()
def batch_logits(model: Any, batch: Sequence[Scored]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each window's logits, the model's own, with the labels; `NO_LABEL` for none.

    Padding comes last, where a causal model does not see it. Tokens before the batch's first label are left out.
    """
    length = max(len(scored.tokens) for scored in batch)
    padding = [length - len(scored.tokens) for scored in batch]
    tokens_BL = torch.tensor(
        [s.tokens + [0] * more for s, more in zip(batch, padding, strict=True)], device=model.device
    )
    labels_BL = torch.tensor(
        [s.labels + [NO_LABEL] * more for s, more in zip(batch, padding, strict=True)], device=model.device
    )
    labelled_L = (labels_BL != NO_LABEL).any(0).nonzero()
    keep = length - int(labelled_L[0])  # no labels before: a chat's prompt, a later window's overlap
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with Precision(torch.float32).context(model.device.type):
        logits_BLV = model(input_ids=tokens_BL, use_cache=False, **options).logits[:, -keep:]
    yield from zip(logits_BLV, labels_BL[:, -keep:], strict=True)


def run_eval(
    jobs: Sequence[EvaluatedModel],
    corpora: Mapping[str, CorpusConfig],
    dump: Location | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure all models on the same text, and return figures by model and corpus.

    With a dump, the figures under `dump` are the byte divergence to it (including END).

    Args:
        limit: documents of each corpus, and records of the dump.
        max_tokens: of each model's windows, see `window_size`.
    Raises:
        ValueError: no text is usable for all models, a revision is given for a source that is not a hub name, or as
            `window_size`.
    """
    sources = [resolve_model(job.source) for job in jobs]
    sizes = [window_size(load_config(source), max_tokens, job.name) for job, source in zip(jobs, sources, strict=True)]

    def readers(chats: bool) -> list[Reader]:
        return [Reader.load(job.name, source, job.start, chats) for job, source in zip(jobs, sources, strict=True)]

    corpus_readers = {name: readers(config.has_chats) for name, config in corpora.items()}
    texts = {name: scored_text(_texts(config, limit), corpus_readers[name]) for name, config in corpora.items()}
    for name, config in corpora.items():
        _say_left_out(name, texts[name], _documents(config, limit))
    if dump is not None:
        dump_readers = readers(Manifest.load(dump).has_chats)
        ends = [reader.end_ids(job.end) for reader, job in zip(dump_readers, jobs, strict=True)]
        asked = asked_records(dump, list(zip(dump_readers, ends, strict=True)), limit)

    def measured(index: int) -> dict[str, dict[str, Any]]:
        """Measure one model, which is freed before the next: two need not fit into memory together."""
        job = jobs[index]
        model = load_model(sources[index], torch.float32).eval()
        model.to(device or compute_device())
        check_causal(model, job.name)
        figures = {
            name: evaluate(model, corpus_readers[name][index], _texts(config, limit), texts[name], sizes[index])
            for name, config in corpora.items()
        }
        for name, of_text in figures.items():
            _say_windows(f"{name}, {job.name}", of_text)
        if dump is not None:
            reader = dump_readers[index]
            ids = SpecialIds(reader.start_id, ends[index])
            byte_model = ByteModel(model, reader.tokenizer, ids, reader.chat, sizes[index])
            figures["dump"] = byte_divergence(byte_model, dump, asked)
        return figures

    return {job.name: measured(index) for index, job in enumerate(jobs)}


def _say_windows(name: str, figures: Mapping[str, Any]) -> None:
    """Log how many windows were read, if any document is longer than one."""
    documents, windows, size = figures["num_documents"], figures["num_windows"], figures["max_tokens"]
    if windows > documents:
        log.info(
            f"{name}: {count_of(documents, 'document')} read in {windows} windows of at most {size} tokens; tokens "
            f"scored in a later window have at least {overlap_of(size)} tokens before them, or a chat's message from "
            "its beginning"
        )


def _say_left_out(corpus: str, text: ScoredText, documents: Iterator[Document]) -> None:
    """Log how many documents no model is scored on, by reason, with the first of each."""
    if not text.reasons:
        return
    first = {number: reason for reason, number in text.first_left_out().items()}
    by_text = (document for document in documents for _ in document.texts)
    for number, document in enumerate(islice(by_text, max(first) + 1)):
        if number in first:
            reason = first[number]
            log.info(
                f"{corpus}: left out for all models: {text.left_out[reason]}, {reason}; the first is document "
                f"{document.doc_id}"
            )


def _texts(config: CorpusConfig, limit: int | None) -> Iterator[Text]:
    return (text for document in _documents(config, limit) for text in document.texts)


def _documents(config: CorpusConfig, limit: int | None) -> Iterator[Document]:
    return islice(Corpus(config).documents(), limit)
