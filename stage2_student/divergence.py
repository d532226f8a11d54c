"""Byte divergence of a model to a dump, position by position, both through the canonical covering.

The model has no byte head: its own token logits are summed to bytes exactly as the teacher's were (`pipeline.covering`).

Shape legend: R rows, C sorted columns, P positions, V symbols (256), E entries.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.chat import ChatTokenizer
from pipeline.chat_template import ChatError
from pipeline.covering import Covering, ReducedRow, unnormalised
from pipeline.loading import load_model
from pipeline.targets import Targets
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from pipeline.vocabulary import Vocabulary
from schemas import NUM_SYMBOLS
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard
from schemas.store import Location
from stage2_student.batches import NO_ROW, position_rows

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


def load_spelling(
    model: str, chats: bool, revision: str | None, trust_remote_code: bool
) -> tuple[ByteTokenizer, ChatTokenizer | None]:
    """A model's tokenizer; with `chats`, with its chat template. Raises ValueError where it has none."""
    if not chats:
        return ByteTokenizer.load(model, trust_remote_code, revision), None
    chat = ChatTokenizer.load(model, trust_remote_code, revision)
    return chat.tokenizer, chat


class ByteModel:
    """A Hugging Face model asked for next-byte distributions through the canonical covering.

    Args:
        chats: it is asked about chats, which it renders with its own template.
    """

    def __init__(
        self,
        model: str,
        start: int,
        ends: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        chats: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.tokenizer, self.chat = load_spelling(model, chats, revision, trust_remote_code)
        self.model: Any = load_model(model, revision, dtype, trust_remote_code).eval()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        width = self.model.get_output_embeddings().weight.shape[0]
        self.vocabulary = Vocabulary(self.tokenizer.token_bytes, ends, width)
        self.order = torch.from_numpy(self.vocabulary.order).to(self.device)
        self.start = start

    def targets(self, document: bytes) -> Targets:
        """Distributions at the document's bytes + 1 positions. Raises SpellingError where the model's tokenizer cannot spell the document."""
        tokens = self.tokenizer.encode(document)
        prefix = self.tokenizer.prefix
        return self._covered(tokens, prefix + document, self._logits([self.start, *tokens])).drop_prefix(len(prefix))

    def answers(self, record: Record) -> "Answers":
        """Distributions at a record's positions. Raises SpellingError or ChatError where the model cannot be asked."""
        if record.message_roles:
            return self._chat_answers(record)
        targets = self.targets(record.document)
        taken = np.concatenate([np.arange(s.start, s.start + s.num_positions) for s in record.segments])
        return Answers(
            targets.probs_PV[taken],
            targets.token_end_P[taken],
            np.ones(len(taken), dtype=bool),
            len(record.document),
            -float(targets.token_logprobs.sum()),
        )

    def _chat_answers(self, record: Record) -> "Answers":
        assert self.chat is not None
        encoded = self.chat.encode(record.messages)
        logits_RV = self._logits(encoded.tokens)
        num = record.num_positions
        probs_PV = np.full((num, NUM_SYMBOLS), 1 / NUM_SYMBOLS)
        token_end_P, asked_P = np.zeros(num), np.zeros(num, dtype=bool)
        token_nats = 0.0
        row_of_byte, row_of_end = position_rows(record)
        end_rows = dict(zip([s.start + s.length for s in record.segments], row_of_end.tolist(), strict=True))
        for turn in encoded.turns:
            spelled = turn.prefix + record.document[turn.start : turn.end]
            tokens = encoded.tokens[turn.first : turn.last]
            targets = self._covered(tokens, spelled, logits_RV[turn.first - 1 : turn.last]).drop_prefix(
                len(turn.prefix)
            )
            end_row = end_rows.get(turn.end, NO_ROW) if turn.end_token in self.vocabulary.end_ids else NO_ROW
            rows = np.append(row_of_byte[turn.start : turn.end], end_row)
            asked = rows != NO_ROW
            probs_PV[rows[asked]] = targets.probs_PV[asked]
            token_end_P[rows[asked]] = targets.token_end_P[asked]
            asked_P[rows[asked]] = True
            token_nats -= float(targets.token_logprobs.sum())
        num_bytes = sum(turn.end - turn.start for turn in encoded.turns)
        return Answers(probs_PV, token_end_P, asked_P, num_bytes, token_nats)

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int]) -> torch.Tensor:
        logits_RV: torch.Tensor = self.model(torch.tensor([list(tokens)], device=self.device), use_cache=False).logits[
            0
        ]
        return logits_RV.float()

    def _covered(self, tokens: Sequence[int], spelled: bytes, logits_RV: torch.Tensor) -> Targets:
        """The covering of tokens whose rows these are: the one before the first, and one after each."""
        covering = Covering(self.vocabulary, tokens, spelled)
        rows: list[ReducedRow] = []
        for part_RV in logits_RV.split(128):
            offsets = covering.offsets[len(rows) : len(rows) + len(part_RV)]
            rows += covering.reduce_rows(offsets, unnormalised(part_RV[:, self.order].cpu().numpy()))
        return covering.targets(rows)


class Answers(NamedTuple):
    """What a model says at a record's positions; where `asked_P` is False it says nothing: its own tokens of a chat begin later."""

    probs_PV: np.ndarray
    token_end_P: np.ndarray
    asked_P: np.ndarray
    num_bytes: int  # of the record's document; of a chat, of what the assistant says
    token_nats: float  # -ln p of the model's own tokens of these bytes, without END


def records_of(dump: Location) -> Iterator[Record]:
    for shard in Manifest.load(dump).shards:
        yield from read_shard(shard.path(dump))


class DocumentDivergence(NamedTuple):
    """A record beside a model; sums in nats, over positions or over those that are clear."""

    doc_id: str
    positions: int
    jsd_nats: float
    clear: int  # positions where token_end is at most a threshold on both sides: elsewhere one covering is uncertain itself
    kl_clear_nats: float  # KL(teacher || model)
    num_bytes: int  # as in `Answers`
    token_nats: float


def document_divergence(byte_model: ByteModel, record: Record, max_token_end: float = 0.05) -> DocumentDivergence:
    """One record's divergence. Raises SpellingError or ChatError where the model cannot be asked about it."""
    answers = byte_model.answers(record)
    kl_P, jsd_P = (nats_P[answers.asked_P] for nats_P in sparse_divergence(record, answers.probs_PV))
    token_end_P = np.maximum(record.token_end.astype(np.float64), answers.token_end_P)[answers.asked_P]
    clear_P = token_end_P <= max_token_end
    return DocumentDivergence(
        record.doc_id,
        len(jsd_P),
        float(jsd_P.sum()),
        int(clear_P.sum()),
        float(kl_P[clear_P].sum()),
        answers.num_bytes,
        answers.token_nats,
    )


def byte_divergence(
    model: str,
    dump: Location,
    start: int,
    ends: tuple[int, ...],
    limit: int | None = None,
    max_token_end: float = 0.05,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Divergence of a model to a dump, mean nats per position.

    Returns:
        jsd_nats over all positions: bounded, so that the few where a canonical covering is confidently wrong do not decide
        it. kl_clear_nats over the clear positions (nan where there is none). clear_share of the positions; positions and
        records counted; records left out because the model cannot spell them, or its chat template changes them.
    """
    chats = Manifest.load(dump).has_chats
    byte_model = ByteModel(model, start, ends, chats=chats, revision=revision, trust_remote_code=trust_remote_code)
    found: list[DocumentDivergence] = []
    left_out = 0
    for record in records_of(dump):
        if limit is not None and len(found) == limit:
            break
        try:
            found.append(document_divergence(byte_model, record, max_token_end))
        except (SpellingError, ChatError):
            left_out += 1
    if not found:
        raise ValueError(
            f"{dump}: none of its {left_out} records can be spelled by the tokenizer of {model}, or rendered by its chat template"
        )
    positions, clear = sum(d.positions for d in found), sum(d.clear for d in found)
    return {
        "jsd_nats": sum(d.jsd_nats for d in found) / positions,
        "kl_clear_nats": sum(d.kl_clear_nats for d in found) / clear if clear else float("nan"),
        "clear_share": clear / positions,
        "positions": positions,
        "records": len(found),
        "left_out_unspellable": left_out,
    }
