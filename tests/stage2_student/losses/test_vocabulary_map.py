"""Maps between vocabularies against slow searches over all tokens."""

import numpy as np
import pytest

from pipeline.tokenization.yielded_tokens import Tokenizing
from stage2_student.losses.edit_distance import edit_distance
from stage2_student.losses.vocabulary_map import NO_TOKEN, TokenizerPair, token_of_bytes, translated
from tests.support.token_records import pair_of


@pytest.fixture(scope="module")
def pair() -> TokenizerPair:
    return pair_of()


def test_a_token_maps_to_the_one_with_the_same_bytes(pair: TokenizerPair) -> None:
    ours, theirs = pair.student.token_bytes, pair.teacher.token_bytes
    for token, found in enumerate(pair.exact.tolist()):
        wanted = [i for i, spelled in enumerate(ours) if spelled is not None and spelled == theirs[token]]
        assert [found] == ([pair.student_end] if token in pair.teacher_ends else wanted or [NO_TOKEN])
    assert (pair.exact == NO_TOKEN).any() and not pair.same_tokenizer


def test_the_longest_prefix_is_that_of_all_tokens_in_turn(pair: TokenizerPair) -> None:
    ours, theirs = pair.student.token_bytes, pair.teacher.token_bytes
    for token, found in enumerate(pair.longest_prefix.tolist()):
        if token in pair.teacher_ends:
            assert found == pair.student_end
            continue
        spelled = theirs[token] or b""
        prefixes = [one for one in ours if one and spelled.startswith(one)]
        assert ours[found] == max(prefixes, key=len)


def test_the_nearest_of_the_teachers_tokens_has_the_fewest_edits(pair: TokenizerPair) -> None:
    theirs = [spelled for spelled in pair.teacher.token_bytes if spelled]
    for token, found in enumerate(pair.nearest_teacher.tolist()):
        spelled = pair.student.token_bytes[token]
        if spelled:
            least = min(edit_distance(spelled, one) for one in theirs)
            assert edit_distance(spelled, pair.teacher.token_bytes[found] or b"") == least
        else:
            assert found == (pair.teacher_ends[0] if token == pair.student_end else NO_TOKEN)


def shares_of(tokenizer: Tokenizing, spelled: bytes | None) -> dict[int, float]:
    """Return the first four pieces of a token, with shares that fall to a tenth each; nothing if it is not text."""
    ids = tokenizer.encode_batch([spelled], [b""])[0] if spelled else []
    pieces = [] if isinstance(ids, ValueError) else ids[:4]
    found: dict[int, float] = {}
    for place, piece in enumerate(pieces):
        found[piece] = found.get(piece, 0.0) + 0.1**place / sum(0.1**i for i in range(len(pieces)))
    return found


def test_a_projection_goes_to_the_twin_or_to_the_pieces_of_both_directions(pair: TokenizerPair) -> None:
    ids_VJ, weights_VJ = pair.projection
    ours, theirs = pair.student.token_bytes, pair.teacher.token_bytes
    back = [shares_of(pair.student, spelled) for spelled in theirs]
    several = 0
    for student, spelled in enumerate(ours):
        if spelled in theirs and spelled:
            weights = {theirs.index(spelled): 1.0}
        elif student == pair.student_end:
            weights = {pair.teacher_ends[0]: 1.0}
        else:
            weights = shares_of(pair.teacher, spelled)
            for teacher, shares in enumerate(back):
                if student in shares:
                    weights[teacher] = weights.get(teacher, 0.0) + shares[student]
        largest = dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:4])
        total = sum(largest.values())
        several += len(largest) > 1
        found = {int(t): float(w) for t, w in zip(ids_VJ[student], weights_VJ[student], strict=True) if w}
        assert found == {teacher: pytest.approx(weight / total, rel=1e-6) for teacher, weight in largest.items()}
    assert several > 3


class Doubled:
    """Two tokens for `a`, of which the second is yielded; and two for `b`, neither of them for b alone."""

    token_bytes = (b"a", b"a", b"b", b"b", None)

    def encode_batch(self, documents: list[bytes], prefixes: list[bytes] | None = None) -> list[list[int]]:
        return [[1] if document == b"a" else [2, 4] for document in documents]


def test_of_several_tokens_with_the_same_bytes_the_one_that_is_yielded_counts() -> None:
    assert token_of_bytes(Doubled(), ()) == {b"a": 1, b"b": 2}  # type: ignore[arg-type]


class Greedy:
    """A tokenizer of the longest of its tokens in turn."""

    def __init__(self, *token_bytes: bytes | None) -> None:
        self.token_bytes = token_bytes

    def encode_batch(self, documents: list[bytes], prefixes: list[bytes] | None = None) -> list[list[int] | ValueError]:
        return [self._encoded(document) for document in documents]

    def _encoded(self, document: bytes) -> list[int] | ValueError:
        ids: list[int] = []
        while document:
            fits = [i for i, one in enumerate(self.token_bytes) if one and document.startswith(one)]
            if not fits:
                return ValueError("it cannot be spelled")
            ids.append(max(fits, key=lambda i: (len(self.token_bytes[i] or b""), -i)))
            document = document.removeprefix(self.token_bytes[ids[-1]] or b"")
        return ids


def test_of_equal_weights_the_projection_keeps_the_lowest_ids_and_of_twins_one() -> None:
    teacher = Greedy(b"ab1", b"ab1", *(b"ab%d" % i for i in range(2, 7)), None)
    student = Greedy(b"ab", *(b"%d" % i for i in range(1, 7)), None)
    ids_VJ, weights_VJ = TokenizerPair(teacher, student, (7,), 7, 8).projection  # type: ignore[arg-type]
    assert ids_VJ[0].tolist() == [0, 2, 3, 4] and weights_VJ[0].tolist() == [0.25] * 4
    assert ids_VJ[1].tolist() == [0, 0, 0, 0] and weights_VJ[1].tolist() == [1, 0, 0, 0]


def test_padding_of_the_teachers_head_maps_to_nothing() -> None:
    assert translated(np.array([0, 2, 3, 99]), np.array([7, 8, 9])).tolist() == [7, 9, NO_TOKEN, NO_TOKEN]
