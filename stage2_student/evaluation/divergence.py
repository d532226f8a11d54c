"""Byte divergence of a model to a dump, position by position, both through the canonical covering.

The model has no byte head: its own token logits are summed to bytes exactly as the teacher's were
(`pipeline.covering.covering`).

Shape legend: R rows, C sorted columns, P positions, V symbols (256), E entries.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.covering.covering import Covering, ReducedRow, exp_logits
from pipeline.covering.targets import Targets
from pipeline.covering.vocabulary import Vocabulary
from pipeline.runtime import log
from pipeline.runtime.devices import compute_device
from pipeline.runtime.huggingface import load_model
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_records import StoredChat, encode_by_turn
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat, Turn
from pipeline.tokenization.special_ids import SpecialIds
from schemas import NUM_SYMBOLS
from schemas.record import Record
from schemas.storage.locations import Location
from stage2_student.data.examples import NO_ROW, position_rows
from stage2_student.evaluation.asked_positions import AskedRecords, turn_rows
from stage2_student.evaluation.spelled_text import restarts_of, token_edges
from stage2_student.evaluation.token_windows import DEFAULT_MAX_TOKENS, cut_tokens, window_size

# A canonical covering gives no mass to a symbol that no token continues with; 23 nats stand for "never".
MIN_PROB = 1e-10
_ROWS = 128  # rows summed to bytes at once


def sparse_divergence(record: Record, probs_PV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute (KL(stored target || model), Jensen-Shannon divergence), each P, nats.

    The symbols that are not stored are one class on both sides.
    """
    position_E, teacher_E = record.entry_positions(), record.probs()
    unstored_PV = probs_PV.copy()
    unstored_PV[position_E, record.symbols] = 0.0
    teacher_tail_P = np.maximum(1 - record.per_position(teacher_E), 0.0)
    # If every symbol is stored there is no tail: a difference from 1 is rounding.
    teacher_tail_P[record.entry_counts == NUM_SYMBOLS] = 0.0
    teacher = np.concatenate([teacher_E, teacher_tail_P])
    model = np.concatenate([probs_PV[position_E, record.symbols], unstored_PV.sum(axis=1)])
    position = np.concatenate([position_E, np.arange(record.num_positions)])
    middle = (teacher + model) / 2
    kl_P = np.bincount(position, _terms(teacher, np.maximum(model, MIN_PROB)), record.num_positions)
    jsd = (_terms(teacher, middle) + _terms(model, middle)) / 2
    return kl_P, np.bincount(position, jsd, record.num_positions)


def _terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Compute p ln(p / q), 0 where p is 0."""
    terms = np.zeros_like(p)
    np.divide(p, q, out=terms, where=p > 0)
    np.log(terms, out=terms, where=p > 0)
    return terms * p


class ByteModel:
    """A Hugging Face model that gives next-byte distributions through the canonical covering.

    Args:
        model: loaded, on its device.
        ids: the start and end tokens of a text; in a chat the template writes the start.
        chat: the tokenizer with its chat template, if chats are scored.
        max_tokens: of a window; a longer record is read in several (`stage2_student.evaluation.token_windows`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: ByteTokenizer,
        ids: SpecialIds,
        chat: ChatTokenizer | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.start, self.max_tokens = ids.document_start, max_tokens
        width = model.get_output_embeddings().weight.shape[0]
        self.vocabulary = Vocabulary(tokenizer.token_bytes, ids.ends, width)
        self.order = torch.from_numpy(self.vocabulary.order).to(model.device)

    @classmethod
    def load(cls, folder: str, ids: SpecialIds, dtype: torch.dtype = torch.float32) -> "ByteModel":
        """Load a folder, for plain text, with windows of `window_size`."""
        model = load_model(folder, dtype).eval()
        model.to(compute_device())
        size = window_size(model.config, None, folder)
        return cls(model, ByteTokenizer.load(folder), ids, max_tokens=size)

    def targets(self, document: bytes) -> Targets:
        """Compute the distributions at the document's bytes + 1 positions.

        Raises:
            SpellingError: the model's tokenizer cannot spell the document.
        """
        ids = self.tokenizer.encode(document)
        prefix = self.tokenizer.prefix
        [targets] = self._covered([self.start, *ids], [(1, 1 + len(ids), prefix + document)])
        return targets.drop_prefix(len(prefix))

    def predict(self, record: Record) -> "BytePredictions":
        """Compute the distributions at a record's positions.

        Raises:
            SpellingError, ChatError: the model cannot read the record.
        """
        if record.message_roles:
            return self._predict_chat(record)
        targets = self.targets(record.document)
        positions = np.concatenate([np.arange(s.start, s.start + s.num_positions) for s in record.segments])
        edges = token_edges(self.tokenizer.encode(record.document), self.tokenizer)
        asked_P = np.ones(len(positions), dtype=bool)
        return BytePredictions(
            targets.probs_PV[positions], targets.token_end_P[positions], asked_P, *_of_tokens(record, edges, targets)
        )

    def _predict_chat(self, record: Record) -> "BytePredictions":
        assert self.chat is not None
        [chat] = encode_by_turn(self.chat, [record])
        if isinstance(chat, ValueError):
            raise chat
        num = record.num_positions
        probs_PV = np.full((num, NUM_SYMBOLS), 1 / NUM_SYMBOLS)
        token_end_P, asked_P = np.zeros(num), np.zeros(num, dtype=bool)
        num_bytes, token_nats = 0, 0.0
        for encoded, turn, covered in self._turns(record, chat):
            targets = covered.drop_prefix(len(turn.prefix))
            rows = turn_rows(record, turn, self.vocabulary.end_ids)
            asked = rows != NO_ROW
            probs_PV[rows[asked]] = targets.probs_PV[asked]
            token_end_P[rows[asked]] = targets.token_end_P[asked]
            asked_P[rows[asked]] = True
            edges = token_edges(encoded.tokens[turn.first : turn.last], self.tokenizer, turn.start, len(turn.prefix))
            of_turn = _of_tokens(record, edges, targets)
            num_bytes, token_nats = num_bytes + of_turn[0], token_nats + of_turn[1]
        return BytePredictions(probs_PV, token_end_P, asked_P, num_bytes, token_nats)

    def _turns(self, record: Record, chat: StoredChat) -> Iterator[tuple[EncodedChat, Turn, Targets]]:
        """Yield each turn with its rendering and its covering."""
        for encoded in chat.renderings:
            parts = [(t.first, t.last, t.prefix + record.document[t.start : t.end]) for t in encoded.turns]
            covered = self._covered(encoded.tokens, parts, *restarts_of(encoded))
            yield from zip([encoded] * len(parts), encoded.turns, covered, strict=True)

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return L x V: the model's own logits after each token."""
        tokens_BL = torch.tensor([list(tokens)], device=self.model.device)
        logits_BLV: torch.Tensor = self.model(input_ids=tokens_BL, use_cache=False).logits
        return logits_BLV[0]

    def _covered(
        self,
        tokens: Sequence[int],
        parts: Sequence[tuple[int, int, bytes]],
        restarts: Sequence[int] = (),
        repeats_start: bool = True,
    ) -> list[Targets]:
        """Return the covering of each part.

        Args:
            parts: (first, last, bytes): tokens `first .. last`, and the bytes that they spell.
            restarts, repeats_start: as in `cut_tokens`.
        """
        coverings = [Covering(self.vocabulary, tokens[first:last], spelled) for first, last, spelled in parts]
        rows: list[list[ReducedRow]] = [[] for _ in parts]
        is_target_L = np.zeros(len(tokens) + 1, dtype=bool)
        for first, last, _ in parts:
            is_target_L[first : last + 1] = True  # including the prediction after the last token: END
        for window in cut_tokens(is_target_L, self.max_tokens, restarts, repeats_start):
            logits_RV = self._logits(window.read(tokens))
            for (first, last, _), covering, done in zip(parts, coverings, rows, strict=True):
                inside = window.rows[(first <= window.targets) & (window.targets <= last)]
                for some in np.split(inside, range(_ROWS, len(inside), _ROWS)):
                    offsets = covering.offsets[len(done) : len(done) + len(some)]
                    some_RV = logits_RV[torch.from_numpy(some).to(logits_RV.device)].float()
                    done += covering.reduce_rows(offsets, exp_logits(some_RV[:, self.order].cpu().numpy()))
        return [covering.targets(done) for covering, done in zip(coverings, rows, strict=True)]


def _of_tokens(record: Record, edges: Sequence[int], targets: Targets) -> tuple[int, float]:
    """Return the bytes and nats of the tokens whose bytes the record supervises.

    In a later window, its overlap is not included.
    """
    supervised = position_rows(record)[0] != NO_ROW
    counted = [bool(supervised[a : max(b, a + 1)].all()) for a, b in pairwise(edges)]
    return int(np.diff(edges)[counted].sum()), -float(targets.token_logprobs[counted].sum())


class BytePredictions(NamedTuple):
    """A model's distributions at a record's positions.

    Where `asked_P` is False there is none: in a chat, the model's own tokens begin later.
    """

    probs_PV: np.ndarray
    token_end_P: np.ndarray
    asked_P: np.ndarray
    num_bytes: int  # supervised bytes, except those that share a token with other bytes
    token_nats: float  # -ln p of the model's own tokens of these bytes, without END


class DocumentDivergence(NamedTuple):
    """The divergence of one record; sums in nats, over all positions or over the clear ones."""

    doc_id: str
    positions: int
    jsd_nats: float
    clear: int  # positions where token_end is at most a threshold on both sides; elsewhere a covering is uncertain
    kl_clear_nats: float  # KL(teacher || model)
    num_bytes: int  # as in `BytePredictions`
    token_nats: float


def document_divergence(
    byte_model: ByteModel, record: Record, max_token_end: float = 0.05, common_P: np.ndarray | None = None
) -> DocumentDivergence:
    """Compute one record's divergence, at the positions of `common_P` (None: all that the model covers).

    Raises:
        SpellingError, ChatError: the model cannot read the record.
    """
    predicted = byte_model.predict(record)
    asked_P = predicted.asked_P if common_P is None else common_P
    assert not (asked_P & ~predicted.asked_P).any()
    kl_P, jsd_P = (nats_P[asked_P] for nats_P in sparse_divergence(record, predicted.probs_PV))
    token_end_P = np.maximum(record.token_end.astype(np.float64), predicted.token_end_P)[asked_P]
    clear_P = token_end_P <= max_token_end
    return DocumentDivergence(
        record.doc_id,
        len(jsd_P),
        float(jsd_P.sum()),
        int(clear_P.sum()),
        float(kl_P[clear_P].sum()),
        predicted.num_bytes,
        predicted.token_nats,
    )


def byte_divergence(
    byte_model: ByteModel, dump: Location, asked: AskedRecords, max_token_end: float = 0.05
) -> dict[str, Any]:
    """Compute the divergence of a model to a dump, in mean nats per position, at the positions in `asked`.

    Returns:
        jsd_nats: over all positions; bounded, so that the few positions where a canonical covering is confidently wrong
            do not dominate it.
        kl_clear_nats: over the clear positions; None, with a warning, if there are none.
        clear_share: share of clear positions.
        positions, records: numbers of those that are counted.
        left_out: records left out, by reason, because a model cannot spell them or its chat template changes them.
        turns_left_out: turns left out of chats that are otherwise counted, by reason.
        text_sha256: as in `AskedRecords`.
    """
    documents = [document_divergence(byte_model, record, max_token_end, mask) for record, mask in asked.records(dump)]
    positions, clear = sum(d.positions for d in documents), sum(d.clear for d in documents)
    if not clear:
        log.warning(
            f"{dump}: token_end exceeds {max_token_end} at all of its {positions} compared positions, so "
            "kl_clear_nats is null"
        )
    return {
        "jsd_nats": sum(d.jsd_nats for d in documents) / positions,
        "kl_clear_nats": sum(d.kl_clear_nats for d in documents) / clear if clear else None,
        "clear_share": clear / positions,
        "positions": positions,
        "records": len(documents),
        "left_out": asked.left_out,
        "turns_left_out": dict(asked.turns_left_out),
        "text_sha256": asked.sha256,
    }
