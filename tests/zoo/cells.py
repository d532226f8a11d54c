"""The cells of the matrix: one thing the product does with one family and one tokenizer, and its outcome.

`right`: equal to brute force. `refused`: an error that names the family or the tokenizer and a way out. Anything else
is `wrong`.
"""

from collections.abc import Iterator
from itertools import permutations
from typing import Literal, NamedTuple

from tests.zoo.families import FAMILIES, OF_VLLM_ALONE

# Trained here, and of real models by their names in `tests.support.families`; see `tests.zoo.spellings`.
SMALL_KINDS = ("byte-bpe", "ranks", "tekken-like", "sp-bpe", "sp-bpe-no-prefix", "sp-unigram", "bytes")
REAL_KINDS = ("gpt2", "qwen", "llama3", "deepseek", "mistral-v1", "mistral-v3", "tekken")

Status = Literal["right", "refused", "wrong"]


class Outcome(NamedTuple):
    """The outcome of a cell; `detail` is what was measured, or the error."""

    status: Status
    detail: str


class Cell(NamedTuple):
    """A cell; `check` is a key of `CHECKS`, `engine` stage 1's, `target` the tokenizer a student moves to."""

    check: str
    family: str
    tokenizer: str
    engine: str = ""
    target: str = ""

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.check, self.family, self.engine, self.tokenizer, self.target and f"-> {self.target}"))
        )


HEADS = (
    "llama",
    "phi",
    "gpt2",
)  # a tied head or one of its own, one with a bias, learned positions: what moving rows can meet
TRAINED_MOVED = ("llama", "qwen3_moe", "gemma2", "gpt_neox")


def _all_cells(with_real: bool = True, with_vllm: bool = True) -> Iterator[Cell]:
    """Yield what is run: families by two tokenizers, tokenizers by a few families.

    Whether logits are a model's own does not depend on which bytes its tokens spell, nor the covering on where the
    logits come from: so each side is run through all of its own kinds, with the two kinds of the other that differ
    most.
    """
    for family in FAMILIES:
        yield Cell("targets", family, "byte-bpe", "transformers")
        yield Cell("targets", family, "sp-bpe", "transformers")
        yield Cell("eval", family, "sp-bpe")
        yield Cell("moved", family, "byte-bpe", target="sp-bpe")
        yield Cell("moved", family, "sp-bpe", target="byte-bpe")
        yield Cell("trained", family, "byte-bpe")
    for family in TRAINED_MOVED:
        yield Cell("trained", family, "byte-bpe", target="sp-bpe")
        yield Cell("trained", family, "sp-bpe", target="byte-bpe")
    for kinds in (SMALL_KINDS, REAL_KINDS) if with_real else (SMALL_KINDS,):
        for name in kinds:
            yield from (Cell("targets", family, name, "transformers") for family in HEADS[:1])
            yield Cell("eval", "llama", name)
        for old, new in permutations(kinds, 2):
            yield from (
                Cell("moved", family, old, target=new) for family in (HEADS if kinds is SMALL_KINDS else HEADS[:1])
            )
    for family in (*FAMILIES, *OF_VLLM_ALONE) if with_vllm else ():
        yield Cell("targets", family, "byte-bpe", "vllm")
    for name in SMALL_KINDS if with_vllm else ():
        yield Cell("targets", "llama", name, "vllm")


def all_cells(with_real: bool = True, with_vllm: bool = True) -> list[Cell]:
    """Return each cell once, see `_all_cells`."""
    return list(dict.fromkeys(_all_cells(with_real, with_vllm)))
