"""The corpora that a run learns from: one, or a union of several, each with its own dump, or dumps that are mixed."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations
from typing import Literal, NamedTuple

import numpy as np

from pipeline.config import DumpRef
from pipeline.runtime.format import are, count_of
from stage2_student.data.contents.by_id import overlap_keys
from stage2_student.data.contents.join_table import Keep
from stage2_student.data.reader import DumpReader


class Member(NamedTuple):
    """A corpus that a run learns from.

    Attributes:
        name: the recipe's name of it; None if there is no other.
        weight: its share of the supervised bytes of each step, relative to the others' weights.
    """

    reader: DumpReader
    name: str | None = None
    weight: float = 1.0


def open_members(
    dumps: Mapping[str | None, Sequence[DumpRef]],
    how: Literal["arithmetic", "geometric"],
    seed: int,
    keep: Keep | None = None,
) -> tuple[Member, ...]:
    """Open a recipe's dumps, by corpus.

    Args:
        how: the kind of mean that several of one corpus are mixed by.
        keep: where the tables of their documents are kept; of several corpora, each in a folder below.

    Raises:
        ValueError: a dump is not complete, or those of one corpus have no document in common.
    """

    def kept(name: str | None) -> Keep | None:
        return keep if keep is None or name is None else keep._replace(folder=keep.folder / name)

    return tuple(
        Member(DumpReader.of(refs, how, seed, kept(name)), name, sum(ref.weight for ref in refs))
        for name, refs in dumps.items()
    )


def overlaps(members: Sequence[Member]) -> Iterator[str]:
    """Yield a sentence about each two corpora that have documents in common, by their whole text.

    Of each corpus' first dump is read what `overlap_keys` needs.

    Raises:
        ValueError: a corpus has no document that another lacks: its dumps are to be mixed with the other's.
    """
    if len(members) == 1:
        return
    found = overlap_keys([member.reader.dumps[0] for member in members])
    keys_of = {member.name: keys_N for member, keys_N in zip(members, found, strict=True)}
    for one, other in permutations(keys_of, 2):
        if np.isin(keys_of[one], keys_of[other]).all():
            raise ValueError(
                f"the corpus {other} has all {count_of(len(keys_of[one]), 'document')} of the corpus {one}: these are "
                "dumps of one corpus. Give them one name in student.dumps, so that their targets are mixed"
            )
    for one, other in combinations(keys_of, 2):
        if common := int(np.isin(keys_of[one], keys_of[other]).sum()):
            yield (
                f"{count_of(common, 'document', ',')} of {len(keys_of[one]):,} of the corpus {one} {are(common)} also "
                f"in {other}: read in both, with the targets of each"
            )
