"""Maps between two vocabularies, by the exact bytes of their tokens.

Shape legend: V_T tokens of the teacher, V_S tokens of the student, J candidates of each student token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.tokenization.yielded_tokens import Tokenizing
from stage2_student.losses.edit_distance import nearest

NO_TOKEN = -1
Find = Callable[[bytes], int | None]
_DECAY = 0.1  # weight of a piece relative to the one before it (X-Token)
_MAX_PIECES = 4  # of a token in the other vocabulary that have a weight (X-Token)


@dataclass(frozen=True)
class TokenizerPair:
    """The tokenizers of a teacher and a student.

    Attributes:
        teacher_ends: ids of the teacher's tokens that mean END.
        student_end: the student's.
        student_rows: of the student's head; ids beyond its tokenizer are padding.
    """

    teacher: Tokenizing
    student: Tokenizing
    teacher_ends: tuple[int, ...]
    student_end: int
    student_rows: int

    @cached_property
    def same_tokenizer(self) -> bool:
        """True if every id spells the same bytes in both."""
        return self.teacher.token_bytes == self.student.token_bytes

    @cached_property
    def student_of_bytes(self) -> dict[bytes, int]:
        """Return the student's token of each byte string."""
        return token_of_bytes(self.student, (self.student_end,))

    @cached_property
    def teacher_of_bytes(self) -> dict[bytes, int]:
        """Return the teacher's token of each byte string, as `one_of_twins` names it."""
        twins = self.one_of_twins.tolist()
        spelled = enumerate(self.teacher.token_bytes)
        return {text: token for token, text in spelled if text and twins[token] == token not in self.teacher_ends}

    @cached_property
    def one_of_twins(self) -> np.ndarray:
        """Return V_T, int64: of tokens that spell the same bytes, the lowest id; of those that mean END, the first."""
        lowest: dict[bytes, int] = {}
        found_V = np.arange(len(self.teacher.token_bytes), dtype=np.int64)
        for token, spelled in enumerate(self.teacher.token_bytes):
            found_V[token] = lowest.setdefault(spelled, token) if spelled else token
        found_V[[end for end in self.teacher_ends if end < len(found_V)]] = self.teacher_ends[0]
        return found_V

    @cached_property
    def exact(self) -> np.ndarray:
        """Return V_T, int64: the student's token with the same bytes, NO_TOKEN if there is none.

        All of the teacher's END tokens map to the student's; no other control token maps to anything.
        """
        return self._student_tokens(self.student_of_bytes.get)

    @cached_property
    def longest_prefix(self) -> np.ndarray:
        """Return V_T, int64: the student's longest token that the teacher's token starts with, NO_TOKEN if none."""
        of_bytes = self.student_of_bytes
        longest = max(map(len, of_bytes), default=0)

        def prefix(spelled: bytes) -> int | None:
            sizes = range(min(len(spelled), longest), 0, -1)
            return next((of_bytes[spelled[:size]] for size in sizes if spelled[:size] in of_bytes), None)

        return self._student_tokens(prefix)

    def _student_tokens(self, find: Find) -> np.ndarray:
        found_V = np.full(len(self.teacher.token_bytes), NO_TOKEN, dtype=np.int64)
        for token, spelled in enumerate(self.teacher.token_bytes):
            student = find(spelled) if spelled else None
            found_V[token] = NO_TOKEN if student is None else student
        found_V[[end for end in self.teacher_ends if end < len(found_V)]] = self.student_end
        return found_V

    @cached_property
    def nearest_teacher(self) -> np.ndarray:
        """Return V_S, int64: the teacher's token of each of the student's, the same bytes or the nearest by edits.

        NO_TOKEN for control tokens, except END. Of several nearest tokens it is the one whose length is nearest, then
        the lowest id (MinED; Wan et al. 2024, FuseLLM, arXiv 2401.10491).
        """
        found_V = np.full(len(self.student.token_bytes), NO_TOKEN, dtype=np.int64)
        of_bytes = self.teacher_of_bytes
        asked = []
        for token, spelled in enumerate(self.student.token_bytes):
            if spelled in of_bytes:
                found_V[token] = of_bytes[spelled]
            elif spelled:
                asked.append(token)
        known = sorted(of_bytes.values())
        spelled_known = [self.teacher.token_bytes[token] or b"" for token in known]
        at = nearest([self.student.token_bytes[token] or b"" for token in asked], spelled_known)
        found_V[asked] = np.array(known, dtype=np.int64)[at]
        found_V[self.student_end] = self.teacher_ends[0]
        return found_V

    @cached_property
    def projection(self) -> tuple[np.ndarray, np.ndarray]:
        """Return X-Token's projection of the student's vocabulary to the teacher's: (ids, weights), each V_S x J.

        A token with a teacher's token of the same bytes goes there whole. Any other is spread over the teacher's tokens
        of its own encoding there, at most four, with weights that fall to a tenth each, and over the teacher's tokens
        in whose encoding it occurs, with its weight there; the four largest are kept, and sum to 1. Control tokens, and
        tokens that hold part of a character and have no twin, have no weights (ids 0).

        Source: X-Token (arXiv 2605.21699), as its authors' code builds W (NVIDIA NeMo-RL, tools/x_token), with bytes
        in place of decoded text, and without its extra last column.
        """
        weights: list[dict[int, float]] = [{} for _ in self.student.token_bytes]
        twins = self.one_of_twins.tolist()
        exact = {student: twins[teacher] for teacher, student in enumerate(self.exact.tolist()) if student != NO_TOKEN}
        for student, pieces in _encodings(self.student.token_bytes, self.teacher):
            for teacher, weight in _decaying(pieces):
                weights[student][twins[teacher]] = weights[student].get(twins[teacher], 0.0) + weight
        for teacher, pieces in _encodings(self.teacher.token_bytes, self.student):
            for student, weight in _decaying(pieces if twins[teacher] == teacher else []):
                weights[student][teacher] = weights[student].get(teacher, 0.0) + weight
        ids_VJ = np.zeros((len(weights), _MAX_PIECES), dtype=np.int64)
        weights_VJ = np.zeros((len(weights), _MAX_PIECES), dtype=np.float32)
        for student, of_token in enumerate(weights):
            if student in exact:
                of_token = {exact[student]: 1.0}
            largest = sorted(of_token.items(), key=lambda item: (-item[1], item[0]))[:_MAX_PIECES]
            total = sum(weight for _, weight in largest)
            for place, (teacher, weight) in enumerate(largest):
                ids_VJ[student, place], weights_VJ[student, place] = teacher, weight / total
        return ids_VJ, weights_VJ


def translated(ids: np.ndarray, map_V: np.ndarray) -> np.ndarray:
    """Return the ids that a map gives; NO_TOKEN for those beyond it, which are padding of the teacher's head."""
    found: np.ndarray = np.where(ids < len(map_V), map_V[np.minimum(ids, len(map_V) - 1)], NO_TOKEN)
    return found


def token_of_bytes(tokenizer: Tokenizing, ends: Sequence[int]) -> dict[bytes, int]:
    """Return the token of each byte string: the one that the tokenizer yields for it, else the lowest id."""
    of_bytes: dict[bytes, int] = {}
    several: dict[bytes, None] = {}
    for token, spelled in enumerate(tokenizer.token_bytes):
        if spelled and token not in ends:
            several |= {spelled: None} if spelled in of_bytes else {}
            of_bytes.setdefault(spelled, token)
    yielded = tokenizer.encode_batch(list(several), [b""] * len(several))
    return of_bytes | {
        spelled: ids[0]
        for spelled, ids in zip(several, yielded, strict=True)
        if not isinstance(ids, ValueError) and len(ids) == 1 and tokenizer.token_bytes[ids[0]] == spelled
    }


def _encodings(token_bytes: Sequence[bytes | None], tokenizer: Tokenizing) -> list[tuple[int, list[int]]]:
    """Return each token's encoding by the other tokenizer, as in the middle of a text; of those that it can spell."""
    spelling = [(token, spelled) for token, spelled in enumerate(token_bytes) if spelled]
    found = tokenizer.encode_batch([spelled for _, spelled in spelling], [b""] * len(spelling))
    return [
        (token, ids[:_MAX_PIECES])
        for (token, _), ids in zip(spelling, found, strict=True)
        if not isinstance(ids, ValueError)
    ]


def _decaying(pieces: Sequence[int]) -> list[tuple[int, float]]:
    """Return each piece with its weight; they fall to a tenth each, and sum to 1."""
    weights = [_DECAY**place for place in range(len(pieces))]
    return [(piece, weight / sum(weights)) for piece, weight in zip(pieces, weights, strict=True)]
