"""Dump section: what is stored of a teacher. All but path, compression and audit is part of the dump's identity."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ByteSize, Field

from pipeline.config.section import Section, added, stored_as
from schemas import ARITHMETIC, NUM_SYMBOLS, levels
from schemas.storage.locations import check_address

DumpPath = Annotated[str, AfterValidator(check_address)]


class CoveringConfig(Section):
    """Selection of the teacher rows that a target sums over. Part of the dump's identity."""

    renamed: ClassVar[Mapping[str, str]] = {
        "merge_after": "rejoin_after_tokens",
        "spread_dropped": "redistribute_dropped",
    }

    beam_width: int = Field(0, ge=0, description="Branch rows per byte offset; 0: canonical rows only.")
    branch_threshold: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Expand a branch if its share of the mass known where it ends exceeds this; 0: any.",
    )
    rejoin_after_tokens: int | None = Field(
        4,
        ge=0,
        json_schema_extra=stored_as("merge_after"),
        description="Canonical tokens that a branch must share, once back on the canonical boundaries, before it "
        "counts as canonical again; null: it never does.",
    )
    redistribute_dropped: bool = Field(
        False,
        json_schema_extra=stored_as("spread_dropped"),
        description="Redistribute dropped mass by what follows the document's other tokens, instead of leaving it out.",
    )


class TokensConfig(Section):
    """Alternatives of the teacher's tokens, stored beside its next-byte distributions. Part of the dump's identity."""

    top_k: int = Field(16, ge=1, le=256, description="Most probable tokens stored at each of the teacher's tokens.")
    min_prob: float = Field(
        0.001, ge=0, lt=1, description="Minimum probability stored; the text's own token is always stored."
    )


class DumpConfig(Section):
    """Contents of the dump. All but `path`, `zstd_level` and `audit_documents` is part of its identity."""

    path: DumpPath = Field(
        description="Folder of the dump, or its address in an object store (s3:// or gs://); a student also reads hf://."
    )
    covering: CoveringConfig = CoveringConfig()
    top_k: int = Field(16, ge=1, le=256, description="Maximum number of entries stored per position.")
    min_prob: float = Field(
        0.04, ge=0, lt=1, description="Minimum probability stored; the realised symbol is always stored."
    )
    tokens: TokensConfig | None = Field(
        None,
        json_schema_extra=added("0.2", None),
        description="Also store the teacher's most probable tokens at each of its tokens, and the log-probability of "
        "its end token, for objectives that compare tokens; null: bytes alone.",
    )
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
        description="Version of the arithmetic; default: the newest for a new dump, otherwise the one it was begun "
        "with. Give an older one for a dump to be merged with older ones.",
    )
    audit_documents: int = Field(
        16,
        ge=0,
        description="Maximum number of documents compared with a wide covering while dumping (audit.json); 0: none. "
        "They are chosen by a hash of their ids; fewer are compared if they would take over about 3 % of the dump's "
        "time.",
    )

    @property
    def arithmetic_used(self) -> int:
        """Return the version in use: the newest if the recipe names none.

        `stage1_teacher.dump.begun` sets the version of an existing dump.
        """
        return ARITHMETIC if self.arithmetic is None else self.arithmetic

    @property
    def coding(self) -> str:
        """Name the coding of numbers as in the identity: rounded to levels, unless the dump stores everything."""
        exact = self.top_k == NUM_SYMBOLS and not self.min_prob and self.arithmetic_used > 1
        return levels.EXACT if exact else levels.NAME
