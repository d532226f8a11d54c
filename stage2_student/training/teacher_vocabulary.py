"""The teacher's vocabulary, for objectives on tokens: from the dump, and its tokenizer only where one needs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.config import Recipe
from pipeline.runtime.model_source import ModelSource
from pipeline.sources.resolve import resolve_model, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from schemas.storage.locations import location
from schemas.token_vocabulary import read_vocabulary
from stage2_student.losses.vocabulary_map import TokenizerPair
from stage2_student.runs.dump_tokens import dump_paths, teacher_tokens


@dataclass(frozen=True)
class TeacherVocabulary:
    """The teacher's tokens as bytes; encodes text, for which it loads the tokenizer that the recipe names.

    Attributes:
        token_bytes: by id; None for a token that spells nothing.
        sha256: of the tokenizer that the dump was made with.
    """

    token_bytes: tuple[bytes | None, ...]
    sha256: str
    recipe: Recipe

    def encode_batch(
        self, documents: Sequence[bytes], prefixes: Sequence[bytes] | None = None
    ) -> list[list[int] | SpellingError]:
        """Encode as `ByteTokenizer.encode_batch` does.

        Raises:
            ValueError: the recipe names another tokenizer than the dump's.
        """
        return self._tokenizer.encode_batch(documents, prefixes)

    @cached_property
    def _tokenizer(self) -> ByteTokenizer:
        teacher = self.recipe.teacher
        source: ModelSource | str = (
            resolve_model(teacher.source)
            if teacher.tokenizer is None
            else ModelSource(resolve_tokenizer(teacher.tokenizer), None, teacher.trust_remote_code)
        )
        tokenizer = ByteTokenizer.load(source)
        if tokenizer.sha256 != self.sha256:
            name = teacher.tokenizer or teacher.model
            raise ValueError(
                f"train.objectives.xtoken_kl encodes with the teacher's tokenizer, but {name} is another "
                f"({tokenizer.sha256[:12]}) than the dump's ({self.sha256[:12]}): name the dump's own teacher as "
                "teacher.model or teacher.tokenizer"
            )
        return tokenizer


def tokenizer_pair(
    recipe: Recipe, manifests: Sequence[Manifest], tokenizer: ByteTokenizer, ids: SpecialIds, head_rows: int
) -> TokenizerPair:
    """Return the tokenizers of the dumps' teacher and the student; `runs.dump_tokens.check_tokens` has passed."""
    token_bytes = tuple(read_vocabulary(location(dump_paths(recipe)[0])))
    sha256, ends = teacher_tokens(manifests[0])
    vocabulary = TeacherVocabulary(token_bytes, sha256, recipe)
    return TokenizerPair(vocabulary, tokenizer, ends, ids.end, head_rows)
