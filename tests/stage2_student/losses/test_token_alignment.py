"""Chunks of both models' tokens against a search byte by byte."""

from dataclasses import replace

import numpy as np
import pytest

from stage2_student.losses.token_alignment import chunks, ends_of_segments, shared_offsets
from tests.support.token_records import slow_chunks, tiled


@pytest.mark.parametrize("num_context", [0, 5])
@pytest.mark.parametrize("seed", range(6))
def test_chunks_are_those_found_byte_by_byte(seed: int, num_context: int) -> None:
    encoded = replace(tiled(seed), num_context=num_context)
    found, wanted = chunks(encoded), slow_chunks(encoded)
    assert len(found) == len(wanted) > 0
    for i, (start, end, ours, theirs) in enumerate(wanted):
        assert found.spans_C2[i].tolist() == [start, end]
        assert list(range(*found.student_C2[i])) == ours
        assert list(range(*found.teacher_C2[i])) == theirs
        assert bool(found.is_one_to_one[i]) == (len(ours) == len(theirs) == 1)


def test_a_token_without_bytes_belongs_to_the_chunk_after_it_and_one_of_a_template_to_none() -> None:
    encoded = tiled(0)
    ends = np.append(0, encoded.ends)  # a dummy prefix that is a token of its own
    plain = replace(encoded, tokens=np.append(0, encoded.tokens), starts=np.append(0, encoded.starts), ends=ends)
    assert chunks(plain).student_C2[0].tolist() == [0, chunks(encoded).student_C2[0, 1] + 1]
    of_template = replace(plain, turn_ends={})
    assert (chunks(of_template).student_C2 == chunks(encoded).student_C2 + 1).all()


def test_ends_stand_after_the_tokens_of_both_that_end_there() -> None:
    for seed in range(8):
        encoded = tiled(seed)
        teacher_ends = np.cumsum(encoded.record.teacher_token_lengths)
        states, counts = ends_of_segments(encoded, 0)
        stops = {s.start + s.length for s in encoded.record.segments if s.has_end}
        shared = stops & set(encoded.ends.tolist()) & set(teacher_ends.tolist())
        assert {int(encoded.ends[state - 1]) for state in states} == shared
        assert {int(teacher_ends[count - 1]) for count in counts} == shared


def test_a_piece_has_the_offsets_that_it_supervises() -> None:
    encoded = tiled(1)
    whole = np.concatenate(shared_offsets(encoded))
    part = np.concatenate(shared_offsets(replace(encoded, num_context=4)))
    assert part.tolist() == [offset for offset in whole.tolist() if offset >= encoded.starts[4]]
