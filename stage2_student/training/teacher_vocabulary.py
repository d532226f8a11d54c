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
from stage2_student.runs.identity import dumps_by_corpus


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


def check_tokens(recipe: Recipe, manifests: Sequence[Manifest]) -> None:
    """Check that the dumps hold what the objectives compare.

    Args:
        manifests: of each corpus' dump.
    Raises:
        ValueError: one holds no alternatives of the teacher's tokens, or two have teachers with other tokens.
    """
    train = recipe.train
    names = [f"train.objectives.{name}" for name in train.objectives.on_tokens]
    names += ["train.alm_end"] if train.alm_end and train.objectives.alm else []
    if not names:
        return
    by_path = dict(zip(_paths(recipe), manifests, strict=True))
    for path, manifest in by_path.items():
        if not manifest.has_tokens:
            raise ValueError(
                f"{names[0]} compares the student's tokens with the teacher's, but {path} holds bytes alone; make a "
                "dump with dump.tokens={top_k: 16}, or use objectives on bytes (kl, byte_ce, alm)"
            )
    teachers = {path: _teacher_tokens(manifest) for path, manifest in by_path.items()}
    first, *others = teachers
    if other := [path for path in others if teachers[path] != teachers[first]]:
        raise ValueError(
            f"{names[0]} compares the student's tokens with those of one tokenizer, but the teachers of {first} and "
            f"{other[0]} have different ones; name dumps of one teacher, or use objectives on bytes (kl, byte_ce, alm)"
        )


def _paths(recipe: Recipe) -> list[str]:
    return [refs[0].path for refs in dumps_by_corpus(recipe).values()]


def _teacher_tokens(manifest: Manifest) -> tuple[str, tuple[int, ...]]:
    """Return the hash of the teacher's tokenizer, and its tokens that mean END."""
    teacher = manifest.identity["teacher"]
    return teacher["tokenizer_sha256"], tuple(teacher["end_ids"])


def tokenizer_pair(
    recipe: Recipe, manifests: Sequence[Manifest], tokenizer: ByteTokenizer, ids: SpecialIds, head_rows: int
) -> TokenizerPair:
    """Return the tokenizers of the dumps' teacher and the student; `check_tokens` has passed."""
    token_bytes = tuple(read_vocabulary(location(_paths(recipe)[0])))
    sha256, ends = _teacher_tokens(manifests[0])
    vocabulary = TeacherVocabulary(token_bytes, sha256, recipe)
    return TokenizerPair(vocabulary, tokenizer, ends, ids.end, head_rows)
