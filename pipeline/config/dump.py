"""The dump: what is stored of a teacher. All but its path, compression and audit is part of its identity."""

from typing import Annotated

from pydantic import AfterValidator, ByteSize, Field

from pipeline.config.section import Section
from schemas import ARITHMETIC, NUM_SYMBOLS, levels
from schemas.storage.locations import check_address

DumpPath = Annotated[str, AfterValidator(check_address)]


class CoveringConfig(Section):
    """Which teacher rows a target sums over. Part of the dump's identity."""

    beam_width: int = Field(0, ge=0, description="Branch rows per byte offset; 0: canonical rows only.")
    branch_threshold: float = Field(
        0.1, ge=0, lt=1, description="Expand a branch above this share of the mass known where it ends; 0: any."
    )
    merge_after: int | None = Field(
        4,
        ge=0,
        description="Canonical tokens that a branch shares, back on the canonical boundaries, before it counts as "
        "canonical; "
        "null: it never does.",
    )
    spread_dropped: bool = Field(
        False,
        description="Share dropped mass out by what follows the document's other tokens, instead of leaving it out.",
    )


class DumpConfig(Section):
    """What is stored. All but `path`, `zstd_level` and `audit_documents` is part of the dump's identity."""

    path: DumpPath = Field(
        description="Folder of the dump, or its address in an object store: s3:// or gs://; a student reads hf:// as "
        "well."
    )
    covering: CoveringConfig = CoveringConfig()
    top_k: int = Field(16, ge=1, le=256, description="Most entries stored per position.")
    min_prob: float = Field(0.04, ge=0, lt=1, description="Least probability stored; the realised symbol always is.")
    shard_bytes: ByteSize = Field(
        ByteSize(16 << 20),
        ge=1,
        description="Text per shard, in bytes; a shard of very short documents closes at 65,536 of them.",
        validate_default=True,
    )
    zstd_level: int = Field(15, ge=1, le=22, description="Compression level of the shards.")
    arithmetic: int | None = Field(
        None,
        ge=1,
        le=ARITHMETIC,
        description="Version of the arithmetic; default: the one that the dump was begun with, of a new one the "
        "newest. Give an older "
        "one for a dump that is to be merged with older ones.",
    )
    audit_documents: int = Field(
        16,
        ge=0,
        description="Documents compared with a wide covering while dumping, at most (audit.json); 0: none. "
        "They are chosen by a hash of their ids, and are fewer where they would take over about 3 % of the dump's "
        "time.",
    )

    @property
    def arithmetic_used(self) -> int:
        """Return the version in use: the newest where the recipe names none.

        `stage1_teacher.dump.begun` names that of a dump that is there.
        """
        return ARITHMETIC if self.arithmetic is None else self.arithmetic

    @property
    def coding(self) -> str:
        """Name the coding of numbers as the identity does: rounded to levels, unless the dump stores everything."""
        exact = self.top_k == NUM_SYMBOLS and not self.min_prob and self.arithmetic_used > 1
        return levels.EXACT if exact else levels.NAME
