"""Records too long for the student, in pieces: together they teach what the whole record would."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.record import Record, Segment
from stage2_student.data.encode import NOTHING, Pieces, count_pieces, encode_pieces, encode_records
from stage2_student.data.examples import NO_LABEL, Encoded, Example, Masks, make_example
from stage2_student.data.micro_batch import Layout, collate
from stage2_student.data.pieces import Cuttable, cut, overlap_tokens
from stage2_student.interfaces.base import StudentShape
from stage2_student.interfaces.token_marginal.interface import TokenMarginal
from stage2_student.losses.alm import chunk_bounds, chunk_tensors
from tests.support.chats import CHAT_FAMILIES, chat, load_chat
from tests.support.families import load, load_sentencepiece, train_sentencepiece
from tests.support.small_dumps import make_record, make_text
from tests.support.tiny import tiny_tokenizer

MASKS = Masks(max_doubt=1.0, max_token_end=1.0)
MAX_TOKENS = 40
TOKENIZERS = ("tiny", "bytes", "sentencepiece")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ByteTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "tiny": ByteTokenizer.from_wrapped(tiny_tokenizer(), "tiny"),
        "bytes": load("bytes"),
        "sentencepiece": load_sentencepiece(
            train_sentencepiece(folder / "sp.model", model_type="bpe", add_dummy_prefix=True)
        ),
    }


def long_record(seed: int) -> Record:
    """Draw a record, half of the time a window that begins with context; the teacher's tokens are drawn."""
    rng = np.random.default_rng(seed)
    document = make_text(rng, int(rng.integers(30, 120)))
    first = int(rng.integers(1, len(document) // 2)) if seed % 2 else 0
    record = make_record("d", document, rng, [Segment(first, len(document) - first, bool(seed % 3))])
    lengths = rng.integers(1, 9, len(document))
    lengths = lengths[np.cumsum(lengths) <= len(document)]
    lengths = np.append(lengths, len(document) - lengths.sum())
    logprobs = -rng.exponential(2, len(lengths)).astype(np.float32)
    return replace(record, teacher_token_lengths=lengths.astype(np.int32), teacher_token_logprobs=logprobs)


def pieces_of(record: Record, tokenizer: ByteTokenizer, max_tokens: int = MAX_TOKENS) -> list[Encoded]:
    [pieces] = encode_pieces([record], tokenizer, None, max_tokens)
    [counted] = count_pieces([record], tokenizer, None, max_tokens)
    assert isinstance(pieces, list) and counted == Pieces(tuple(piece.num_tokens for piece in pieces))
    return pieces


def example_of(encoded: Encoded) -> Example:
    return make_example(encoded, 0, 1, None, MASKS)


Taught = tuple[int, int, tuple[tuple[int, float], ...], bool]


def taught(encoded: Encoded) -> list[tuple[int, int, Taught]]:
    """Return (byte where the token begins, its byte, what is taught) for each supervised position."""
    example = example_of(encoded)
    starts = np.append(encoded.starts, encoded.ends[-1:])
    found = []
    for state, offset, symbol, kl, symbols, logprobs in zip(
        example.state_P.tolist(), example.offset_P.tolist(), example.symbols_P.tolist(), example.kl_P.tolist(),
        example.entry_symbols_PE.tolist(), example.entry_logprobs_PE.tolist(), strict=True,
    ):  # fmt: skip
        entries = tuple((s, p) for s, p in zip(symbols, logprobs, strict=True) if s >= 0)
        found.append((int(starts[state]), offset, (symbol, int(example.labels_L[state]), entries, kl)))
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(8))
def test_pieces_together_supervise_what_the_whole_record_does_each_position_once(
    seed: int, name: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    record, tokenizer = long_record(seed), tokenizers[name]
    [whole] = encode_records([record], tokenizer, 10**9)
    assert isinstance(whole, Encoded)
    pieces = pieces_of(record, tokenizer)
    assert len(pieces) > 1 and max(piece.num_tokens for piece in pieces) <= MAX_TOKENS
    together = [position for piece in pieces for position in taught(piece)]
    assert Counter(map(str, together)) == Counter(map(str, taught(whole)))
    assert sum(example_of(piece).num_bytes for piece in pieces) == example_of(whole).num_bytes
    labels = [label for piece in pieces for label in example_of(piece).labels_L.tolist() if label != NO_LABEL]
    assert labels == [label for label in example_of(whole).labels_L.tolist() if label != NO_LABEL]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_later_pieces_have_context_and_all_are_of_like_size(name: str, tokenizers: dict[str, ByteTokenizer]) -> None:
    for seed in range(8):
        pieces = pieces_of(long_record(seed), tokenizers[name])
        for piece in pieces[1:]:
            # Up to three bytes less, so that no piece begins inside a character.
            assert overlap_tokens(MAX_TOKENS) - 3 <= piece.num_context <= MAX_TOKENS // 2
            first = int(piece.starts[0])
            assert piece.record.document[first] & 0xC0 != 0x80
        supervised = [len(piece.tokens) - piece.num_context for piece in pieces]
        assert min(supervised) > max(supervised) / 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_end_where_the_teachers_tokens_do_and_before_blanks_where_some_are_near(
    name: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    shared = blanks = total = 0
    for seed in range(20):
        record = long_record(seed)
        ends = set(accumulate(record.teacher_token_lengths.tolist()))
        for piece in pieces_of(record, tokenizers[name])[:-1]:
            total += 1
            shared += int(piece.ends[-1]) in ends
            blanks += record.document[int(piece.ends[-1])] in b" \n"
    assert shared == total and blanks > total / 4


@pytest.mark.parametrize("debias", [0.0, 0.02])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_chunks_of_pieces_are_chunks_of_the_whole_record(
    name: str, debias: float, tokenizers: dict[str, ByteTokenizer]
) -> None:
    for seed in range(8):
        record = long_record(seed)
        [whole] = encode_records([record], tokenizers[name], 10**9)
        assert isinstance(whole, Encoded)
        every = dict(chunks(whole, debias))
        pieces = pieces_of(record, tokenizers[name])
        found = [chunk for piece in pieces for chunk in chunks(piece, debias)]
        assert len(dict(found)) == len(found) and all(every[span] == teacher for span, teacher in found)
        if not debias:  # every shared end is a bound, and pieces end at shared ends
            assert dict(found) == every
        else:
            assert len(every) - len(found) < len(pieces)  # only what reaches over a cut may be left out


def chunks(encoded: Encoded, debias: float) -> list[tuple[tuple[int, int], float]]:
    bounds = [bound.tolist() for bound in chunk_bounds(encoded, debias)]
    spans = [span for bound in bounds for span in pairwise(bound)]
    tensors = chunk_tensors([encoded], Layout.of([encoded.num_tokens]), debias)
    chunk_L = tensors["alm_chunk_BL"][0].numpy()
    for number, (start, stop) in enumerate(spans):
        inside = chunk_L[:-1] == number
        assert encoded.starts[inside].min() == start and encoded.ends[inside].max() == stop
    return list(zip(spans, tensors["alm_teacher_C"].tolist(), strict=True))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_distributions_of_pieces_are_the_whole_records_where_context_does_not_matter(
    name: str, tokenizers: dict[str, ByteTokenizer]
) -> None:
    """The student's logits depend on the last token alone.

    Its context is longer than any of its tokens, so no row is missing.
    """
    tokenizer = tokenizers[name]
    width = len(tokenizer.token_bytes)
    end = tokenizer.default_end or 0
    shape = StudentShape(8, width, tokenizer.token_bytes, tokenizer.prefix, (end,))
    interface = TokenMarginal(shape, max_dropped=1.0)
    logits_VV = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2

    def distributions(encoded: Encoded) -> dict[tuple[int, int], torch.Tensor]:
        example = make_example(encoded, 0, end, None, MASKS)
        batch = collate([example])
        batch = replace(batch, extra=interface.prepare([encoded], [example], batch))
        found, nats_N = interface.marginals(logits_VV[batch.tokens_BL], batch, lambda logits: logits)
        starts = np.append(encoded.starts, encoded.ends[-1:])
        at = zip(example.state_P.tolist(), example.offset_P.tolist(), found.logprobs_PV, strict=True)
        rows = {(int(starts[state]), offset): logprobs_V for state, offset, logprobs_V in at}
        return rows | {(-1, 0): nats_N.sum()}

    record = long_record(4)
    [whole] = encode_records([record], tokenizer, 10**9)
    assert isinstance(whole, Encoded)
    expected = distributions(whole)
    longest = max(len(spelled) for spelled in tokenizer.token_bytes if spelled)
    found = [distributions(piece) for piece in pieces_of(record, tokenizer, max(MAX_TOKENS, 8 * longest + 8))]
    assert len(found) > 1
    nats = sum(part.pop((-1, 0)) for part in found)
    torch.testing.assert_close(nats, expected.pop((-1, 0)), rtol=1e-9, atol=0)
    together = {key: value for part in found for key, value in part.items()}
    assert together.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(together[key], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_a_long_chat_is_cut_between_turns_and_within_a_long_one(family: str) -> None:
    loaded = load_chat(family)
    said = ["the thing?", "and yes " * 3, "in?", "an and " * 40, "the?", "no"]
    messages = chat(*said)
    contents = [message["content"] for message in messages]
    if CHAT_FAMILIES[family].strips:
        contents = [content.strip() for content in contents]
        messages = [message | {"content": content} for message, content in zip(messages, contents, strict=True)]
    edges = [0, *accumulate(len(content.encode()) for content in contents)]
    segments = [Segment(edges[i], edges[i + 1] - edges[i], True) for i in (1, 3, 5)]
    record = make_record("c", "".join(contents).encode(), np.random.default_rng(0), segments)
    sizes = tuple(len(content.encode()) for content in contents)
    record = replace(record, message_roles=tuple(m["role"] for m in messages), message_lengths=sizes)
    [whole] = encode_records([record], loaded.tokenizer, 10**9, loaded)
    assert isinstance(whole, Encoded)
    [pieces] = encode_pieces([record], loaded.tokenizer, loaded, 64)
    [counted] = count_pieces([record], loaded.tokenizer, loaded, 64)
    assert isinstance(pieces, list) and len(pieces) > 2
    assert counted == Pieces(tuple(piece.num_tokens for piece in pieces)) and max(counted.tokens) <= 64
    assert all(piece.start == whole.start for piece in pieces)
    end = loaded.end_of_turn()
    assert end is not None
    examples = [make_example(piece, 0, end, None, MASKS) for piece in pieces]
    of_whole = make_example(whole, 0, end, None, MASKS)
    assert sum(example.num_bytes for example in examples) == of_whole.num_bytes
    symbols = [symbol for example in examples for symbol in example.symbols_P.tolist()]
    assert Counter(symbols) == Counter(of_whole.symbols_P.tolist())
    labels = [label for example in examples for label in example.labels_L.tolist() if label != NO_LABEL]
    assert labels == [label for label in of_whole.labels_L.tolist() if label != NO_LABEL]
    entries = [row for example in examples for row in example.entry_logprobs_PE.tolist()]
    assert Counter(map(str, entries)) == Counter(map(str, of_whole.entry_logprobs_PE.tolist()))


def test_where_no_end_is_shared_pieces_end_at_the_students_own_tokens() -> None:
    size = 100
    edges = np.arange(size + 1)
    record = Cuttable(b"x" * size, edges[:-1], edges[1:], np.ones(size, dtype=bool), np.array([0, size]))
    pieces = list(cut(record, 16))
    assert pieces[0].first == pieces[0].done == 0 and pieces[-1].last == size
    assert all(before.last == after.done for before, after in pairwise(pieces))
    assert max(piece.num_tokens for piece in pieces) <= 16


def test_a_long_record_of_which_nothing_is_supervised_is_left_out_by_name() -> None:
    record = replace(make_record("d", b"abc " * 30, np.random.default_rng(0)), segments=())
    assert list(count_pieces([record], load("bytes"), None, 16)) == [NOTHING]
    assert list(encode_pieces([record], load("bytes"), None, 16)) == [NOTHING]


def test_a_record_that_fits_is_one_piece_and_whole(tokenizers: dict[str, ByteTokenizer], tmp_path: Path) -> None:
    record = long_record(1)
    [whole] = encode_records([record], tokenizers["bytes"], 10**9)
    assert isinstance(whole, Encoded)
    [same] = pieces_of(record, tokenizers["bytes"], whole.num_tokens)
    assert same.num_context == 0 and (same.tokens == whole.tokens).all()
    assert len(pieces_of(record, tokenizers["bytes"], whole.num_tokens - 1)) == 2
