"""Where a moved student stands before its first step: its nats beside those of the same model before the move.

By kind of token, because the move changes them differently: tokens whose rows were made, the two tokens after one, and
all others.

Shape legend: L scored tokens of a document, in their order.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.nn.functional import cross_entropy

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus
from pipeline.runtime.padding import padded_groups
from stage2_student.data.examples import NO_LABEL
from stage2_student.evaluation.bits_per_byte import batch_logits, fitting_tokens, scored_window
from stage2_student.evaluation.scored_text import Reader, ScoredText, scored_text
from stage2_student.evaluation.spelled_text import Spelled, Text
from stage2_student.evaluation.token_windows import cut_tokens

MADE, AFTER, OTHER = "made", "after", "other"
NUM_AFTER = 2


class Asked(NamedTuple):
    """A model that reads text.

    Attributes:
        model: on the device that computes.
        reader: its tokenizer.
        max_tokens: of its windows.
    """

    model: Any
    reader: Reader
    max_tokens: int


class DocumentNats(NamedTuple):
    """The scored tokens of a document.

    Attributes:
        tokens_L: their ids.
        before_L2: the ids of the two tokens before each, the nearest first; -1 for none.
        sizes_L: their bytes.
        nats_L: -ln p(token | tokens before).
    """

    tokens_L: np.ndarray
    before_L2: np.ndarray
    sizes_L: np.ndarray
    nats_L: np.ndarray


def start_figures(
    student: Asked, original: Asked, is_made_V: np.ndarray, corpus: CorpusConfig, limit: int | None = None
) -> dict[str, Any]:
    """Measure both models on the same text.

    Args:
        is_made_V: bool by the student's token: its rows were made, not copied.
        limit: documents.
    Returns:
        num_documents, num_bytes, left_out; bits_per_byte and original_bits_per_byte; and for each bucket (made, after,
        other) its share of tokens and bytes, and bits and original_bits, in bits per byte of the whole text. A token of
        the original counts for the bytes that it covers, evenly.
    """
    config = corpus if limit is None else corpus.model_copy(update={"limit": limit})
    documents = [text for document in Corpus(config).documents() for text in document.texts]
    text = scored_text(documents, [student.reader, original.reader])
    totals = {name: np.zeros(4) for name in (MADE, AFTER, OTHER)}  # tokens, bytes, nats, the original's nats
    for ours, theirs in zip(
        _document_nats(student, documents, text), _document_nats(original, documents, text), strict=True
    ):
        original_L = spread_nats(theirs, ours.sizes_L)
        bucket_L = buckets(ours, is_made_V)
        columns_4L = np.stack([np.ones_like(ours.nats_L), ours.sizes_L, ours.nats_L, original_L])
        for name, total_4 in totals.items():
            total_4 += columns_4L[:, bucket_L == name].sum(1)
    return {
        "num_documents": text.num_documents,
        "num_bytes": text.num_bytes,
        "left_out": text.left_out,
        **_figures(totals, text.num_bytes),
    }


def _figures(totals: Mapping[str, np.ndarray], num_bytes: int) -> dict[str, Any]:
    all_4 = sum(totals.values(), np.zeros(4))
    per_bit = num_bytes * math.log(2)
    return {
        "bits_per_byte": float(all_4[2] / per_bit),
        "original_bits_per_byte": float(all_4[3] / per_bit),
        "buckets": {
            name: {
                "share_of_tokens": float(total_4[0] / all_4[0]),
                "share_of_bytes": float(total_4[1] / num_bytes),
                "bits": float(total_4[2] / per_bit),
                "original_bits": float(total_4[3] / per_bit),
            }
            for name, total_4 in totals.items()
        },
    }


def buckets(document: DocumentNats, is_made_V: np.ndarray) -> np.ndarray:
    """Return the bucket of each token, as a name."""
    after_L = (is_made_V[document.before_L2] & (document.before_L2 >= 0)).any(1)
    return np.where(is_made_V[document.tokens_L], MADE, np.where(after_L, AFTER, OTHER))


def spread_nats(document: DocumentNats, sizes_L: np.ndarray) -> np.ndarray:
    """Return the nats of a document for another tokenizer's tokens of the same bytes, each byte's share alike."""
    edges, sums = np.cumsum([0, *document.sizes_L]), np.cumsum([0.0, *document.nats_L])
    is_new = np.append(True, edges[1:] != edges[:-1])  # a token without bytes counts for the bytes after it
    edges, sums = edges[is_new], np.append(sums[is_new][:-1], sums[-1])
    found: np.ndarray = np.diff(np.interp(np.cumsum([0, *sizes_L]), edges, sums))
    return found


def _document_nats(asked: Asked, documents: Sequence[Text], text: ScoredText) -> Iterator[DocumentNats]:
    """Yield the scored tokens of each document that is not left out."""
    spelled_documents = [
        (spelled, spelled.token_bytes(text.spans(number, spelled)))
        for number, spelled in enumerate(asked.reader.spell(documents))
        if isinstance(spelled, Spelled) and text.spans(number, spelled)
    ]
    windows = [
        (number, window)
        for number, (spelled, sizes_L) in enumerate(spelled_documents)
        for window in cut_tokens(sizes_L >= 0, asked.max_tokens, spelled.restarts, spelled.repeats_start)
    ]
    nats = [np.zeros(len(sizes_L)) for _, sizes_L in spelled_documents]
    lengths = [len(window.read(spelled_documents[number][0].tokens)) for number, window in windows]
    for group in padded_groups(lengths, fitting_tokens(asked.model)):
        batch = [scored_window(*spelled_documents[windows[index][0]], windows[index][1]) for index in group]
        for index, (logits_LV, labels_L) in zip(group, batch_logits(asked.model, batch), strict=True):
            number, window = windows[index]
            labelled_L = labels_L != NO_LABEL
            nats_N = cross_entropy(logits_LV[labelled_L].float(), labels_L[labelled_L], reduction="none")
            nats[number][window.targets] = nats_N.double().cpu().numpy()
    for (spelled, sizes_L), nats_L in zip(spelled_documents, nats, strict=True):
        tokens_L, scored = np.array(spelled.tokens), np.flatnonzero(sizes_L >= 0)
        padded_L = np.concatenate([[-1] * NUM_AFTER, tokens_L])
        before_L2 = np.stack([padded_L[scored + NUM_AFTER - back] for back in range(1, NUM_AFTER + 1)], axis=1)
        yield DocumentNats(tokens_L[scored], before_L2, sizes_L[scored], nats_L[scored])
