"""Distributions and token ends as files of version 3 store them.

The symbol that the document has at a position is stored there already, so that only its log-probability is left to
store; the other symbols ascend, which costs fewer bytes than their order by probability. And `token_end` is stored for
those records alone where it does not follow from `dropped`.

Shape legend: R records, B bytes of all their documents, S segments, T tokens, P positions, O other entries, E entries
(P + O); an offset more of each where lists begin and end.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from schemas import END
from schemas.record import Record
from schemas.record_checks import layout_faults

# A field of the records: where each record's values begin, R + 1 offsets, and the values of all records in turn.
Lists = Mapping[str, tuple[np.ndarray, np.ndarray]]

STORED = ("realised_logprobs", "other_counts", "other_symbols", "other_logprobs")
MADE = ("entry_counts", "symbols", "logprobs", "token_end")
_OF_POSITIONS = ("realised_logprobs", "other_counts", "dropped", "doubt")
_OF_SEGMENTS = ("segment_starts", "segment_lengths", "segment_has_end")


class Texts(NamedTuple):
    """The documents of some records: R + 1 offsets, and B bytes of all in turn."""

    offsets_R1: np.ndarray
    bytes_B: np.ndarray


class Positions(NamedTuple):
    """The positions of some records.

    Attributes:
        offsets_R1: each record's first position, int64.
        realised_P: the symbol that the document has there, uint8.
        is_start_P: whether a token of the teacher begins there, or its text ends.
        token_P: ascending number of the token, or of the part of it that lies in one segment.
    """

    offsets_R1: np.ndarray
    realised_P: np.ndarray
    is_start_P: np.ndarray
    token_P: np.ndarray


def positions_of(texts: Texts, lists: Lists) -> Positions:
    """Return the positions of records whose segments lie in their documents, and whose tokens span them."""
    starts_S, lengths_S, has_end_S = (lists[name][1] for name in _OF_SEGMENTS)
    segments_R1, tokens_T = lists["segment_starts"][0], lists["teacher_token_lengths"][1]
    counts_S = lengths_S.astype(np.int64) + has_end_S
    ends_S = np.cumsum(counts_S)
    in_bytes_S = np.repeat(texts.offsets_R1[:-1], np.diff(segments_R1)) + starts_S
    at_P = np.arange(ends_S[-1] if len(ends_S) else 0) + np.repeat(in_bytes_S - (ends_S - counts_S), counts_S)
    num_bytes = len(texts.bytes_B)
    realised_P = texts.bytes_B[np.minimum(at_P, num_bytes - 1)] if num_bytes else np.zeros(len(at_P), np.uint8)
    realised_P[(ends_S - 1)[has_end_S]] = END
    starts_token_B1 = np.zeros(num_bytes + 1, dtype=bool)
    starts_token_B1[texts.offsets_R1] = True
    starts_token_B1[np.cumsum(tokens_T, dtype=np.int64)] = True
    is_start_P = starts_token_B1[at_P]
    begins_P = is_start_P.copy()
    begins_P[(ends_S - counts_S)[counts_S > 0]] = True
    offsets_R1 = np.concatenate([[0], ends_S])[segments_R1]
    return Positions(offsets_R1, realised_P, is_start_P, np.cumsum(begins_P))


def largest_dropped(positions: Positions, dropped_P: np.ndarray) -> np.ndarray:
    """Return the largest `dropped` since each position's token began, 0 at its start: P, float32, none negative."""
    bits_P = np.where(positions.is_start_P, np.uint32(0), dropped_P.view(np.uint32))  # ascend as the numbers do
    keys_P = positions.token_P.astype(np.uint64) << np.uint64(32) | bits_P
    return np.maximum.accumulate(keys_P).astype(np.uint32).view(np.float32)


def joined_entries(
    realised_P: np.ndarray, logprobs_P: np.ndarray, counts_P: np.ndarray, symbols_O: np.ndarray, logprobs_O: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the symbols and log-probabilities of all entries: at each position the document's, then the others.

    Args:
        realised_P: the symbol of each position's document, whose log-probability is `logprobs_P`.
        counts_P: how many of the others each position has.
    """
    realised_E = np.arange(len(counts_P)) + np.cumsum(counts_P, dtype=np.int64) - counts_P  # where they are
    is_other_E = np.ones(len(counts_P) + len(symbols_O), dtype=bool)
    is_other_E[realised_E] = False
    others_E = np.flatnonzero(is_other_E)  # 2.8 times as fast as setting by the mask itself, twice
    symbols_E, logprobs_E = np.empty(len(is_other_E), np.uint8), np.empty(len(is_other_E), np.float32)
    symbols_E[realised_E], symbols_E[others_E] = realised_P, symbols_O
    logprobs_E[realised_E], logprobs_E[others_E] = logprobs_P, logprobs_O
    return symbols_E, logprobs_E


def disordered(realised_P: np.ndarray, counts_P: np.ndarray, symbols_O: np.ndarray) -> np.ndarray:
    """Return the positions whose other symbols do not ascend, or have the document's among them."""
    ends_P = np.cumsum(counts_P, dtype=np.int64)
    begins_O1 = np.zeros(len(symbols_O) + 1, dtype=bool)
    begins_O1[ends_P] = True
    is_wrong_O = symbols_O == np.repeat(realised_P, counts_P)
    is_wrong_O[1:] |= (symbols_O[1:] <= symbols_O[:-1]) & ~begins_O1[1:-1]
    return np.unique(np.searchsorted(ends_P, np.flatnonzero(is_wrong_O), side="right"))


def fit_together(texts: Texts, lists: Lists) -> bool:
    """Tell whether the columns of some records have the lengths that they must, so that `made_fields` can make fields.

    Segments lie in their documents, and tokens span them.
    """
    sizes_R = {name: np.diff(offsets_R1) for name, (offsets_R1, _) in lists.items()}
    if any((sizes_R[name] != sizes_R["segment_starts"]).any() for name in _OF_SEGMENTS):
        return False
    starts_S, lengths_S, has_end_S = (lists[name][1] for name in _OF_SEGMENTS)
    segments_R1, (tokens_R1, tokens_T) = lists["segment_starts"][0], lists["teacher_token_lengths"]
    num_bytes_R = np.diff(texts.offsets_R1)
    ends_S = starts_S.astype(np.int64) + lengths_S
    num_positions_R = _sums(segments_R1, lengths_S.astype(np.int64) + has_end_S)
    num_others_R = _sums(*lists["other_counts"])
    num_ends_R = sizes_R["token_end"]
    return bool(
        ((starts_S >= 0) & (lengths_S >= 0) & (ends_S <= np.repeat(num_bytes_R, sizes_R["segment_starts"]))).all()
        and (tokens_T >= 0).all()
        and (_sums(tokens_R1, tokens_T) == num_bytes_R).all()
        and (sizes_R["teacher_token_logprobs"] == sizes_R["teacher_token_lengths"]).all()
        and all((sizes_R[name] == num_positions_R).all() for name in _OF_POSITIONS)
        and ((num_ends_R == num_positions_R) | (num_ends_R == 0)).all()
        and all((sizes_R[name] == num_others_R).all() for name in ("other_symbols", "other_logprobs"))
    )


def are_log_probs(lists: Lists) -> bool:
    """Tell whether all log-probabilities are at most 0 and finite."""
    return all(
        not len(values) or bool(values.max() <= 0 and values.min() > -np.inf)  # False for nan
        for values in (lists["realised_logprobs"][1], lists["other_logprobs"][1])
    )


def _sums(offsets_R1: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum each record's values: R, int64."""
    return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets_R1])


class Made(NamedTuple):
    """The fields `MADE` of some records, and the records with other symbols that the format does not allow."""

    fields: Lists
    disordered: frozenset[int]


def made_fields(texts: Texts, lists: Lists) -> Made:
    """Make the fields of some records from the columns of a file, which fit together."""
    positions = positions_of(texts, lists)
    counts_P, symbols_O = lists["other_counts"][1], lists["other_symbols"][1]
    symbols_E, logprobs_E = joined_entries(
        positions.realised_P, lists["realised_logprobs"][1], counts_P, symbols_O, lists["other_logprobs"][1]
    )
    entries_R1 = positions.offsets_R1 + lists["other_symbols"][0]
    fields = {
        "entry_counts": (positions.offsets_R1, counts_P + np.uint16(1)),
        "symbols": (entries_R1, symbols_E),
        "logprobs": (entries_R1, logprobs_E),
        "token_end": (positions.offsets_R1, _token_end(positions, lists)),
    }
    at = disordered(positions.realised_P, counts_P, symbols_O)
    return Made(fields, frozenset((np.searchsorted(positions.offsets_R1, at, side="right") - 1).tolist()))


def _token_end(positions: Positions, lists: Lists) -> np.ndarray:
    """Return the stored values, and where a record has none those that follow from `dropped`: P, float32."""
    offsets_R1, stored = lists["token_end"]
    token_end_P = largest_dropped(positions, lists["dropped"][1])
    if len(stored):
        is_stored_P = np.repeat(np.diff(offsets_R1) > 0, np.diff(positions.offsets_R1))
        token_end_P[is_stored_P] = stored
    return token_end_P


def unfit_fields(lists: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the fields `MADE` of a record whose columns do not fit together, so that its layout has faults.

    Those of its entries are as far as possible what they would be, so that only what is wrong counts as a fault.
    """
    counts_P, realised_P = lists["other_counts"].astype(np.int64), lists["realised_logprobs"]
    num_positions, num_others = len(realised_P), int(counts_P.sum())
    sizes = {len(lists["other_symbols"]), len(lists["other_logprobs"])}
    token_end_P = lists["token_end"]
    made = {
        "entry_counts": counts_P + 1,
        "symbols": np.concatenate([np.zeros(num_positions, np.uint8), lists["other_symbols"]]),
        "logprobs": np.concatenate([realised_P, lists["other_logprobs"]]),
        "token_end": token_end_P if len(token_end_P) else np.zeros(len(lists["dropped"]), np.float32),
    }
    if len(counts_P) != num_positions or sizes != {num_others}:
        made["symbols"], made["logprobs"] = np.empty(0, np.uint8), np.zeros(1, np.float32)
    return made


def stored_columns(record: Record) -> dict[str, np.ndarray]:
    """Return the columns `STORED` and `token_end` of a record.

    Raises ValueError for a record whose fields contradict each other: a file of this version cannot keep it.
    """
    texts, lists = _text_and_lists(record)
    faults = layout_faults(record)
    if not faults:
        realised_P, position_E = record.realised(), record.entry_positions()
        is_other_E = record.symbols != realised_P[position_E]
        keys_E = position_E << 9 | is_other_E.astype(np.int64) << 8 | record.symbols
        order_E = np.argsort(keys_E)
        if (np.diff(keys_E[order_E]) <= 0).any() or len(is_other_E) - is_other_E.sum() != len(realised_P):
            faults = ["a position has a symbol twice, or lacks the document's"]
    if faults:
        raise ValueError(f"record {record.doc_id!r} (byte {record.window_start}) cannot be stored: {'; '.join(faults)}")
    others_O = order_E[is_other_E[order_E]]
    largest_P = largest_dropped(positions_of(texts, lists), record.dropped)
    follows = record.token_end.tobytes() == largest_P.tobytes()  # to the bit: 0 is not -0
    return {
        "realised_logprobs": record.logprobs[order_E[~is_other_E[order_E]]],
        "other_counts": record.entry_counts - np.uint16(1),
        "other_symbols": record.symbols[others_O],
        "other_logprobs": record.logprobs[others_O],
        "token_end": record.token_end[:0] if follows else record.token_end,
    }


def _text_and_lists(record: Record) -> tuple[Texts, Lists]:
    """Return a record's document, segments and tokens."""
    values = {
        "segment_starts": np.array([segment.start for segment in record.segments], np.int64),
        "segment_lengths": np.array([segment.length for segment in record.segments], np.int64),
        "segment_has_end": np.array([segment.has_end for segment in record.segments], np.bool_),
        "teacher_token_lengths": record.teacher_token_lengths,
    }
    document_B = np.frombuffer(record.document, dtype=np.uint8)
    lists = {name: (np.array([0, len(of_name)]), of_name) for name, of_name in values.items()}
    return Texts(np.array([0, len(document_B)]), document_B), lists
