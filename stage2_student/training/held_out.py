"""Bits per byte of a student's own tokens on held-out text during training, without any effect on the training.

The measure is that of `stage2_student.evaluation.bits_per_byte`, on fewer documents, and through the engine: under
ZeRO-3 the weights exist only inside its forward pass. The ranks share the documents. Nothing is drawn at random, and no
state remains afterwards.
"""

import hashlib
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config import CorpusConfig, Recipe, TrainConfig, corpora_of
from pipeline.corpus.documents import Corpus
from pipeline.corpus.regions import ChatParts, TextParts
from pipeline.runtime import log
from pipeline.runtime.format import count_of
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation, Excerpt
from stage2_student.data.examples import Example
from stage2_student.data.micro_batch import MicroBatch, collate, empty_micro_batch
from stage2_student.distributed import deepspeed_engine as ds
from stage2_student.distributed.rank_messages import Channel
from stage2_student.evaluation.bits_per_byte import Scored, by_length, cut_document
from stage2_student.evaluation.scored_text import Reader, scored_text
from stage2_student.evaluation.spelled_text import Spelled, Text
from stage2_student.runs.retention import Evaluation


class HeldOutText(NamedTuple):
    """A rank's share of a text, and the totals of all ranks.

    Attributes:
        num_bytes: of all documents.
        sha256: of all documents. Figures for different texts are not compared.
    """

    micro_batches: list[MicroBatch]
    num_bytes: int
    sha256: str


class HeldOut(NamedTuple):
    """All held-out text, by name."""

    texts: dict[str, HeldOutText]

    def measure(self, engine: Any, device: torch.device) -> Evaluation:
        """Evaluate the current student; every rank calls it and gets the same result.

        Raises FloatingPointError if the result is not finite.
        """
        nats = torch.zeros(len(self.texts), dtype=torch.float64, device=device)
        engine.eval()
        with torch.no_grad():
            for index, text in enumerate(self.texts.values()):
                for micro in text.micro_batches:
                    nats[index] += engine(micro.to(device), tokens_alone=True)[0]
        engine.train()
        of_texts = zip(self.texts.items(), ds.sum_over_ranks(nats).tolist(), strict=True)
        bits = {name: own / (text.num_bytes * math.log(2)) for (name, text), own in of_texts}
        if wrong := {name: value for name, value in bits.items() if not math.isfinite(value)}:
            name, value = next(iter(wrong.items()))
            raise FloatingPointError(
                f"evaluation: {value} bits per byte of {name}; the student is broken, although its loss was finite. "
                "The newest checkpoint was written before: lower train.lr"
            )
        mean = sum(bits.values()) / len(bits)
        return Evaluation(mean, self._sha256, bits if len(bits) > 1 else None)

    @property
    def _sha256(self) -> str:
        digests = [text.sha256 for text in self.texts.values()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def held_out(
    recipe: Recipe, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, start_id: int, channel: Channel
) -> HeldOut | None:
    """Read the first `train.eval_documents` of the validation text, or else of each of the recipe's eval texts.

    None if `train.eval_every` is 0.

    The text that is out of domain is left to `bld eval`.

    Raises ValueError for chats if the student has no chat template, and if no document of a text can be scored.
    """
    if not recipe.train.eval_every:
        return None
    if recipe.train.validation is not None:
        corpora = {"held_out": recipe.train.validation}
    else:
        corpora = {name: corpus for name, corpus in corpora_of(recipe).items() if name != "out_of_domain"}
    reader = Reader("student", tokenizer, chat, start_id)
    return HeldOut(
        {name: _held_out_text(name, corpus, recipe.train, reader, channel) for name, corpus in corpora.items()}
    )


def _held_out_text(
    name: str, config: CorpusConfig, train: TrainConfig, reader: Reader, channel: Channel
) -> HeldOutText:
    """Read a text on rank 0, and share it out."""
    rank, world = channel.rank, channel.world
    if config.has_chats and reader.chat is None:
        raise ValueError(
            "train.eval_every: the text to evaluate on holds chats, but the dump holds none, so the student has no "
            "chat template; give plain text, or set train.eval_every=0"
        )
    read = islice(Corpus(config).documents(), train.eval_documents) if rank == 0 else ()
    texts_of_rank_0 = channel.gather([_to_json(text) for document in read for text in document.texts])[0]
    documents = [_from_json(text) for text in texts_of_rank_0]
    try:
        text = scored_text(documents, [reader])
    except ValueError as error:
        of = count_of(len(documents), "document")
        raise ValueError(f"train.eval_every: of the first {of} of {name}: {error}") from None
    windows = [
        window
        for number, spelled in enumerate(reader.spell(documents))
        if isinstance(spelled, Spelled)
        for window in cut_document(spelled, text.spans(number, spelled), train.piece_tokens)
    ]
    if rank == 0:
        cut = f" in {len(windows)} windows" if len(windows) > text.num_documents else ""
        more = "".join(f"; left out: {count}, {reason}" for reason, count in text.left_out.items())
        said = name.replace("_", " ")
        log.info(f"{said}: {count_of(text.num_documents, 'document')}{cut}, {text.num_bytes} bytes{more}")
    micro_batches = _rank_micro_batches(windows, train.micro_batch_tokens, reader.start_id, world)[rank]
    # Earlier releases left out documents longer than a window; their figures have the digest of the documents alone.
    how = f"windows of {train.piece_tokens} tokens" if len(windows) > text.num_documents else ""
    return HeldOutText(micro_batches, text.num_bytes, _sha256(documents, how))


def _to_json(text: Text) -> Any:
    """Encode a text as JSON to send it to other ranks."""
    if isinstance(text, Excerpt):
        return {"conversation": text.conversation.to_json(), "num_messages": text.num_messages}
    if isinstance(text, ChatParts):
        return {"messages": text.messages, "turns": text.turns}
    if isinstance(text, TextParts):
        return {"text": text.text.decode(), "spans": text.spans}
    return text.decode() if isinstance(text, bytes) else list(text)


def _from_json(value: Any) -> Text:
    if isinstance(value, dict) and "turns" in value:
        return ChatParts(tuple(value["messages"]), tuple(value["turns"]))
    if isinstance(value, dict) and "text" in value:
        return TextParts(value["text"].encode(), tuple((start, end) for start, end in value["spans"]))
    if isinstance(value, dict):
        return Excerpt(Conversation.from_json(value["conversation"]), value["num_messages"])
    return value.encode() if isinstance(value, str) else tuple(value)


def _rank_micro_batches(
    windows: Sequence[Scored], micro_batch_tokens: int, start_id: int, world: int
) -> list[list[MicroBatch]]:
    """Build each rank's micro-batches, the same number for each: ZeRO's collectives need all ranks."""
    tokens_per_rank = -(-sum(len(scored.tokens) for scored in windows) // world)
    batches = [_micro_batch(group) for group in by_length(windows, min(micro_batch_tokens, tokens_per_rank))]
    batches += [empty_micro_batch(start_id) for _ in range(-len(batches) % world)]
    return [batches[rank::world] for rank in range(world)]


def _micro_batch(windows: Sequence[Scored]) -> MicroBatch:
    """Build a micro-batch of tokens and labels, without byte positions."""
    none, entries_PE = np.empty(0, dtype=np.int64), np.empty((0, 1))
    examples = [
        Example(
            *("", np.array(scored.tokens), np.array(scored.labels), none, none, none, none.astype(bool)),
            *(entries_PE, entries_PE, scored.num_bytes),
        )
        for scored in windows
    ]
    return collate(examples)


def _sha256(documents: Sequence[Text], how: str) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(repr(document).encode() + b"\n")
    digest.update(how.encode())
    return digest.hexdigest()
