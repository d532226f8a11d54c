"""Keys of documents that are equal where the documents are, made without reading text where that is possible.

The plan of a dump holds a hash over the names and texts of each shard's documents. If the plans of several dumps agree,
as those of one corpus do, or one goes on where another ends, then a name stands for the same text in all of them. A
document's key is then its name's. Two documents of different names may still have the same text. Those that may are
found without it: within a dump the teacher's tokens of equal texts have equal lengths, and a document that one dump
lacks can only equal one that another lacks if it has as many bytes. Of these few the text is read, and is the key.

Shape legend: N documents of a dump.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from schemas.record import RecordOutline
from schemas.shard import read_outlines, read_record_texts
from stage2_student.data.align import speakers
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.contents.table import Contents, columns, content_key, documents, key, supervised_key

_SHA256_LENGTH = 64  # digits; a shorter text is no hash


def contents_of(dumps: Sequence[OpenDump]) -> list[Contents]:
    """Return the contents of dumps that are to be joined, with keys that are equal where the documents are."""
    if not _plans_agree(dumps):
        return [Contents.of(dump) for dump in dumps]
    outlines = [Outlines.of(dump) for dump in dumps]
    planned_S = np.array([shard.num_documents for shard in max((d.manifest.shards for d in dumps), key=len)])
    doubtful = _doubtful(outlines, planned_S)
    return [
        outline.contents(_with_text(dump, outline, outline.names_N, doubtful))
        for dump, outline in zip(dumps, outlines, strict=True)
    ]


def overlap_keys(dumps: Sequence[OpenDump]) -> list[np.ndarray]:
    """Return a key of each document of dumps of different corpora, equal to that of another dump's where they are.

    With one teacher for all, equal texts have equal tokens: only where their lengths occur in two dumps the text is
    read.
    """
    teachers = [dump.manifest.identity.get("teacher") for dump in dumps]
    if not all(_has_canonical_tokens(dump) and of == teachers[0] for dump, of in zip(dumps, teachers, strict=True)):
        return [Contents.of(dump).keys_N for dump in dumps]
    outlines = [Outlines.of(dump) for dump in dumps]
    found = [np.unique(outline.tokens_N) for outline in outlines]
    shared = _repeated(np.concatenate(found))
    return [_with_text(dump, outline, outline.tokens_N, shared) for dump, outline in zip(dumps, outlines, strict=True)]


def _plans_agree(dumps: Sequence[OpenDump]) -> bool:
    """Tell whether a document's name stands for the same text in all of these dumps."""
    plans = sorted(
        (
            [(shard.first_document, shard.num_documents, shard.sha256) for shard in dump.manifest.shards]
            for dump in dumps
        ),
        key=len,
    )
    return (
        all(_has_canonical_tokens(dump) for dump in dumps)
        and all(len(sha256) == _SHA256_LENGTH for _, _, sha256 in plans[-1])
        and all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(plans))
    )


def _has_canonical_tokens(dump: OpenDump) -> bool:
    """Tell whether equal texts have equal tokens: those of a text that a model wrote may be the ones it wrote."""
    corpus = dump.manifest.identity.get("corpus", {})
    return "supervise" not in corpus and bool(dump.manifest.identity.get("teacher", {}).get("tokenizer_sha256"))


@dataclass(frozen=True)
class Outlines:
    """Outlines of a dump's documents (N, in its order), known without their text: 52 bytes each."""

    names_N: np.ndarray  # uint64, hash of the document's name
    tokens_N: np.ndarray  # uint64, hash of the lengths of the teacher's tokens and, for a chat, of who says which
    bytes_N: np.ndarray  # int64
    numbers_N: np.ndarray  # int64, the number that a name is; -1: it is none
    supervised_N: np.ndarray  # as in `Contents`, with the following
    shard_N: np.ndarray
    row_N: np.ndarray
    count_N: np.ndarray

    @classmethod
    def of(cls, dump: OpenDump) -> "Outlines":
        """Read the columns of a dump that say how its documents are cut."""
        parts = []
        for shard, path in enumerate(dump.shards):
            rows = [(*_outline(group), shard, row, len(group)) for row, group in documents(read_outlines(path))]
            kinds = (np.uint64, np.uint64, np.int64, np.int64, np.uint64, np.int32, np.int32, np.int32)
            parts.append(columns(rows, kinds))
        return cls(*(np.concatenate(of) for of in zip(*parts, strict=True)))

    def contents(self, keys_N: np.ndarray) -> Contents:
        """Return them with these keys."""
        return Contents(keys_N, self.supervised_N, self.shard_N, self.row_N, self.count_N)

    def numbers_ascend(self, shard: int) -> bool:
        """Tell whether the names of a shard's documents are ascending numbers, as those of rows are."""
        numbers = self.numbers_N[self.shard_N == shard]
        return bool((numbers >= 0).all() and (np.diff(numbers) > 0).all())


def _outline(windows: Sequence[RecordOutline]) -> tuple[int, int, int, int, int]:
    cuts = [np.append(window.window_start, window.teacher_token_lengths).astype(np.int64) for window in windows]
    num_bytes = max(int(cut.sum()) for cut in cuts)
    tokens = b"".join(cut.tobytes() for cut in cuts)
    name = windows[0].doc_id
    number = int(name) if len(name) < 18 and name.isascii() and name.isdecimal() else -1
    of_name, of_tokens = key(b"name:" + name.encode()), key(b"tokens:" + tokens + speakers(windows))
    return of_name, of_tokens, num_bytes, number, supervised_key(windows)


def _doubtful(outlines: Sequence[Outlines], planned_S: np.ndarray) -> np.ndarray:
    """Return the names, ascending, whose documents may have the text of another name's, or not one text.

    Args:
        planned_S: the documents of each shard's plan.
    """
    found = []
    for outline in outlines:
        found += [_repeated(outline.names_N), outline.names_N[np.isin(outline.tokens_N, _repeated(outline.tokens_N))]]
    lacking_S = [np.bincount(outline.shard_N, minlength=len(planned_S)) < planned_S for outline in outlines]
    for (one, one_lacks_S), (other, other_lacks_S) in combinations(zip(outlines, lacking_S, strict=True), 2):
        lacking = [~np.isin(a.names_N, b.names_N) for a, b in ((one, other), (other, one))]
        alike = np.intersect1d(one.bytes_N[lacking[0]], other.bytes_N[lacking[1]])
        for outline, lacks_N in zip((one, other), lacking, strict=True):
            found.append(outline.names_N[lacks_N & np.isin(outline.bytes_N, alike)])
        _, at, other_at = np.intersect1d(one.names_N, other.names_N, return_indices=True)
        differ = (one.bytes_N[at] != other.bytes_N[other_at]) | (one.shard_N[at] != other.shard_N[other_at])
        found.append(one.names_N[at[differ]])
        # A name that a corpus has twice is seen once where either dump lacks the other document. Row numbers are not.
        for shard in np.flatnonzero(one_lacks_S & other_lacks_S).tolist():
            own = one.names_N[one.shard_N == shard]
            if not (one.numbers_ascend(shard) and other.numbers_ascend(shard)):
                found.append(own)
    return np.unique(np.concatenate(found))


def _repeated(values: np.ndarray) -> np.ndarray:
    """Return the values that occur more than once, ascending."""
    unique, counts = np.unique(values, return_counts=True)
    repeated: np.ndarray = unique[counts > 1]
    return repeated


def _with_text(dump: OpenDump, outline: Outlines, keys_N: np.ndarray, doubtful: np.ndarray) -> np.ndarray:
    """Replace the keys that are doubtful by those of the text, reading the shards that hold such a document."""
    keys_N, doubtful_N = keys_N.copy(), np.isin(keys_N, doubtful)
    for shard in np.unique(outline.shard_N[doubtful_N]).tolist():
        own = np.flatnonzero(outline.shard_N == shard)
        for at, (_, windows) in zip(own.tolist(), documents(read_record_texts(dump.shards[shard])), strict=True):
            if doubtful_N[at]:
                keys_N[at] = content_key(windows)
    return keys_N
