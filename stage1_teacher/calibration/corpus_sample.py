"""A survey of the corpus before it is dumped: its size, its division into shards, and a random sample."""

import hashlib
import heapq
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.corpus.documents import Corpus, Document
from pipeline.planning.estimates import Estimate, counted, ratio
from pipeline.planning.forecast import CorpusShape
from pipeline.runtime.format import are, count_of
from stage1_teacher.dump.shard_plan import plan_shards

SAMPLE_BYTES = 32 << 20  # held in memory; more than any teacher reads in a few minutes


class Survey(NamedTuple):
    """Size and sample of a corpus."""

    shape: CorpusShape
    sample: list[Document]  # in random order
    seconds: float  # for one pass over the whole corpus


class _RandomSample:
    """A random sample of a stream of documents: those whose positions hash lowest, as many as fit."""

    def __init__(self, max_bytes: int) -> None:
        self._most_bytes = max_bytes
        self._num_bytes = self.num_passed = self.bytes_passed = 0
        self._kept: list[tuple[int, int, Document]] = []  # a heap: minus the hash, so that the highest goes first

    def passing(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            digest = hashlib.sha256(b"%d" % self.num_passed).digest()[:8]
            heapq.heappush(self._kept, (-int.from_bytes(digest), self.num_passed, document))
            self.num_passed += 1
            self.bytes_passed += len(document.text)
            self._num_bytes += len(document.text)
            while self._num_bytes > self._most_bytes and len(self._kept) > 1:
                self._num_bytes -= len(heapq.heappop(self._kept)[2].text)
            yield document

    def documents(self) -> list[Document]:
        return [document for _, _, document in sorted(self._kept, reverse=True)]


def survey(corpus: Corpus, shard_bytes: int, corpus_bytes: int | None, max_bytes: int = SAMPLE_BYTES) -> Survey:
    """Read the corpus once: all of it, or, if `corpus_bytes` gives the size of its text, the first `max_bytes`.

    Raises ValueError for a corpus of fewer than three documents.
    """
    started = time.monotonic()
    drawn = _RandomSample(max_bytes)
    if corpus_bytes is None:
        shards = [shard.num_bytes for shard in plan_shards(drawn.passing(corpus.documents()), shard_bytes)]
        number = counted(drawn.num_passed)
        num_bytes = drawn.bytes_passed
    else:
        for _ in drawn.passing(corpus.documents()):
            if drawn.bytes_passed >= max_bytes:
                break
        num_bytes = corpus_bytes
        shards = [shard_bytes] * (num_bytes // shard_bytes) + [num_bytes % shard_bytes] * (num_bytes % shard_bytes > 0)
        number = _number_of_documents(drawn.documents(), num_bytes)
    if drawn.num_passed < 3:
        passed = f"{count_of(drawn.num_passed, 'document')} {are(drawn.num_passed)}"
        raise ValueError(f"{corpus.config.source}: {passed} too few to sample; dump them")
    seconds = (time.monotonic() - started) * num_bytes / drawn.bytes_passed
    return Survey(CorpusShape(number, num_bytes, shards), drawn.documents(), seconds)


def _number_of_documents(sample: list[Document], num_bytes: int) -> Estimate:
    return ratio([1.0] * len(sample), [len(document.text) for document in sample]).times(num_bytes)
