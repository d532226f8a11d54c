"""Records with the teacher's tokens, in a student's other tokens, and a student that is a head on given states.

Shape legend: B rows, L tokens, D hidden width, T teacher tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.record import Record, Segment
from schemas.token_alternatives import TokenAlternatives
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate
from stage2_student.data.spans import token_spans
from stage2_student.losses.inputs import ObjectiveInputs
from stage2_student.losses.token_objective import TokenObjective
from stage2_student.losses.vocabulary_map import TokenizerPair
from tests.support.small_dumps import make_record, make_text
from tests.support.tiny import END_OF_TEXT, MERGES, tiny_tokenizer

TEACHER_MERGES = [
    "t h",
    "th e",
    "i n",
    "a n",
    "Ġ the",
    "e r",
    "r i",
    "ri v",
    "riv er",
    "Ġ r",
    "Ġ s",
    "h i",
    "hi l",
    "s t",
]
WIDTH = 7
MASKS = Masks(1.0, 1.0)


def tokenizer_of(merges: list[str]) -> ByteTokenizer:
    return ByteTokenizer.from_wrapped(tiny_tokenizer(merges), "tiny")


def pair_of(teacher_merges: list[str] = TEACHER_MERGES, student_merges: list[str] = MERGES) -> TokenizerPair:
    """Make two tokenizers of 256 bytes and some merges; the student's head has three rows of padding."""
    teacher, student = tokenizer_of(teacher_merges), tokenizer_of(student_merges)
    end = teacher.token_id(END_OF_TEXT)
    rows = len(student.token_bytes) + 3
    return TokenizerPair(teacher, student, (end,), student.token_id(END_OF_TEXT), rows)


@dataclass(frozen=True)
class Taught:
    """A record in the student's tokens, and the teacher's whole distributions, of which it stores a part.

    Attributes:
        logprobs_TV: (T + 1) x V, float64: before each of the teacher's tokens, and after the last.
    """

    encoded: Encoded
    logprobs_TV: np.ndarray


def taught(pair: TokenizerPair, seed: int, top_k: int = 5, num_words: int = 8, document: bytes | None = None) -> Taught:
    """Make a document with random distributions; each stores its `top_k` largest, and the token that the text has."""
    rng = np.random.default_rng(seed)
    document = make_text(rng, num_words) if document is None else document
    ids = pair.teacher.encode_batch([document])[0]
    assert not isinstance(ids, ValueError)
    prefix = getattr(pair.teacher, "prefix", b"")
    spans = token_spans([pair.teacher.token_bytes[i] or b"" for i in ids], document, prefix)
    logits_TV = rng.normal(0, 3, (len(ids) + 1, len(pair.teacher.token_bytes)))
    logits_TV[np.arange(len(ids)), ids] += 4.0
    logits_TV[:, pair.teacher_ends] += 3.0
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
    record = replace(
        make_record(f"d{seed}", document, rng),
        teacher_token_lengths=np.array([len(span) for span in spans], dtype=np.int32),
        teacher_token_logprobs=logprobs_TV[np.arange(len(ids)), ids].astype(np.float32),
        tokens=alternatives_of(logprobs_TV, ids, pair.teacher_ends, top_k),
    )
    return Taught(in_tokens(record, pair), logprobs_TV)


def tiled(seed: int) -> Encoded:
    """Make a document in random tokens of both models, which often end together, with three supervised segments."""
    rng = np.random.default_rng(seed)
    document = make_text(rng, 14)
    size, third = len(document), len(document) // 3
    segments = [
        Segment(0, third, False),
        Segment(third + 2, third, True),
        Segment(2 * third + 4, size - 2 * third - 4, True),
    ]
    segment_edges = [edge for s in segments for edge in (s.start, s.start + s.length)]
    shared = np.append(np.flatnonzero(rng.random(size) < 0.3), segment_edges)
    ours, theirs = (np.unique(np.concatenate([[0, size], shared, rng.integers(1, size, size // 5)])) for _ in range(2))
    record = replace(
        make_record("d", document, rng, segments),
        teacher_token_lengths=np.diff(theirs).astype(np.int32),
        teacher_token_logprobs=-rng.exponential(2, len(theirs) - 1).astype(np.float32),
    )
    return Encoded(record, np.arange(len(ours) - 1), ours[:-1], ours[1:])


def in_tokens(record: Record, pair: TokenizerPair) -> Encoded:
    [encoded] = encode_records([record], pair.student, 10**9)  # type: ignore[arg-type]
    assert isinstance(encoded, Encoded)
    return encoded


def alternatives_of(logprobs_TV: np.ndarray, ids: Sequence[int], ends: Sequence[int], top_k: int) -> TokenAlternatives:
    """Return what a dump stores of whole distributions."""
    chosen = []
    for logprobs_V, realised in zip(logprobs_TV, ids, strict=False):
        largest = set(np.argsort(-logprobs_V, kind="stable")[:top_k].tolist()) | {realised}
        chosen.append(sorted(largest, key=lambda token: (-logprobs_V[token], token)))
    token_of = np.repeat(np.arange(len(chosen)), [len(one) for one in chosen])
    flat = np.concatenate([np.empty(0), *chosen]).astype(np.int32)
    end_logprobs_T = np.full(len(ids) + 1, np.nan, dtype=np.float32)
    end_logprobs_T[[0, -1]] = np.logaddexp.reduce(logprobs_TV[[0, -1]][:, list(ends)], axis=1)
    return TokenAlternatives(
        offsets=np.cumsum([0, *map(len, chosen)]),
        ids=flat,
        log_probs=logprobs_TV[token_of, flat].astype(np.float32),
        token_ids=np.array(ids, dtype=np.int32),
        token_log_probs=logprobs_TV[np.arange(len(ids)), ids].astype(np.float32),
        end_log_probs=end_logprobs_T,
    )


def micro_batch(
    pair: TokenizerPair, documents: Sequence[Encoded], row_sizes: Sequence[int] | None = None
) -> MicroBatch:
    return collate([make_example(one, pair.student_end, pair.student_end, 0, MASKS) for one in documents], row_sizes)


@dataclass(frozen=True)
class HeadAlone:
    """A student without a trunk: its last hidden states are free, and its head is one matrix."""

    hidden_BLD: Tensor
    head_VD: Tensor

    @classmethod
    def drawn(cls, pair: TokenizerPair, batch: MicroBatch, seed: int = 0) -> "HeadAlone":
        generator = torch.Generator().manual_seed(seed)
        hidden_BLD = torch.randn(*batch.layout.shape, WIDTH, generator=generator, dtype=torch.float64)
        head_VD = torch.randn(pair.student_rows, WIDTH, generator=generator, dtype=torch.float64)
        return cls(hidden_BLD.requires_grad_(), head_VD.requires_grad_())

    def logprobs(self) -> Tensor:
        """Return (B x L) x V, float64."""
        return (self.hidden_BLD.flatten(0, 1) @ self.head_VD.T).log_softmax(-1)

    def nats(self, objective: TokenObjective, batch: MicroBatch, train: TrainConfig) -> Tensor:
        """Compute an objective in float32, as a run does."""
        hidden_BLD, head_VD = self.hidden_BLD.float(), self.head_VD.float()
        labels_S = batch.labels_BL.flatten()
        logprobs_SV = (hidden_BLD.flatten(0, 1) @ head_VD.T).log_softmax(-1)
        nats_N = -logprobs_SV[labels_S >= 0].gather(-1, labels_S[labels_S >= 0, None])[:, 0]
        inputs = ObjectiveInputs(batch, None, nats_N, train, hidden_BLD, lambda hidden_nD: hidden_nD @ head_VD.T)
        return objective(inputs)

    def gradients(self, nats: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nats, (self.hidden_BLD, self.head_VD), retain_graph=True)


def slow_chunks(encoded: Encoded) -> list[tuple[int, int, list[int], list[int]]]:
    """Return (start, end, the student's tokens, the teacher's) of each chunk."""
    record = encoded.record
    ends = np.cumsum(record.teacher_token_lengths).tolist()
    starts = [0, *ends[:-1]]
    first = int(encoded.starts[encoded.num_context])
    found = []
    for segment in record.segments:
        before = None
        for offset in range(segment.start, segment.start + segment.length + 1):
            if offset < first or offset > encoded.ends[-1]:
                continue
            if not (offset in (0, *encoded.ends.tolist()) and offset in (0, *ends)):
                continue
            if before is not None:
                ours = _inside(encoded.starts.tolist(), encoded.ends.tolist(), before, offset)
                found.append((before, offset, ours, _inside(starts, ends, before, offset)))
            before = offset
    return found


def _inside(starts: Sequence[int], ends: Sequence[int], first: int, last: int) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if first <= a and b <= last]
