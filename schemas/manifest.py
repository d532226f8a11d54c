"""The manifest of a dump: its identity and its plan, written before the first shard."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas import SCHEMA_VERSION, dump_files
from schemas.json_text import json_text
from schemas.storage.atomic import committed
from schemas.storage.locations import AnyLocation, Location, names
from schemas.versions import reader as reader_of

_MEND = (
    "Fetch the dump again, or restore the file; a dump of your own can be made again by `bld teacher` in a new folder"
)


class ShardPlan(BaseModel):
    """Documents `first_document .. first_document + num_documents` of the corpus, whose content hashes to `sha256`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int = Field(ge=0)  # a name comes of it, which must not lead anywhere else
    first_document: int = Field(ge=0)
    num_documents: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    sha256: str

    def path(self, dump: AnyLocation) -> AnyLocation:
        return dump / dump_files.SHARDS / dump_files.shard_name(self.index)


class Manifest(BaseModel):
    """`identity` is everything that decides the content; `corpus_counts` says what the corpus held and what was left
    out, by reason.

    `accepted_engines`: engines other than the identity's that an operator let go on with the dump, by name and version;
    each shard's metadata says which one made it (`bld.engine`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    identity: dict[str, Any]
    corpus_counts: dict[str, int]
    accepted_engines: tuple[str, ...] = ()
    shards: tuple[ShardPlan, ...]

    @property
    def has_chats(self) -> bool:
        """Whether its documents are chats."""
        return bool(self.identity.get("corpus", {}).get("field") == "messages")

    def missing(self, dump: Location) -> list[ShardPlan]:
        """Planned shards whose file is not there."""
        there = names(dump / dump_files.SHARDS)
        return [shard for shard in self.shards if shard.path(dump).name not in there]

    def save(self, dump: Location) -> None:
        write_json(dump / dump_files.MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def load(cls, dump: Location) -> "Manifest":
        path = dump / dump_files.MANIFEST
        if not path.exists():
            raise ValueError(
                f"{dump} is not a dump: it holds no manifest.json. Run `bld teacher` first, or give another path."
            )
        values = read_json(path)
        reader = reader_of(path, values.get("schema_version"))
        try:
            return cls.model_validate(reader.manifest(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path} is damaged: {where} is {first['input']!r}: {first['msg']}. {_MEND}") from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as `a.b.c`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


# What an identity means that lacks a key: one that came later, or one that a release took away.
_UNSAID: dict[str, Any] = {"arithmetic": 1}
_OF_A_DUMP = re.compile(r"^(dump|other_dumps\.\d+)\.")  # as a run's identity holds those of its dumps


def arithmetic_of(identity: Mapping[str, Any]) -> int:
    """The version of the arithmetic (`schemas.ARITHMETIC`) that a dump of this identity follows."""
    return int(identity.get("arithmetic", _UNSAID["arithmetic"]))


def identity_differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], absent: Mapping[str, Any] | None = None
) -> list[str]:
    """Return `field: theirs there, ours here` for each field in which two identities differ.

    Args:
        absent: what a key means, by its dotted name in a dump's identity (or a run's), where an identity lacks it;
            others mean null. `pipeline.config.identity` has this for the keys of recipes.
    """
    a, b = flatten(theirs), flatten(json.loads(json.dumps(ours)))
    unsaid = _UNSAID | dict(absent or {})
    found = []
    for key in sorted(a.keys() | b.keys()):
        meant = unsaid.get(_OF_A_DUMP.sub("", key, count=1))
        there, here = a.get(key, meant), b.get(key, meant)
        if there != here:
            found.append(f"{key}: {there!r} there, {here!r} here")
    return found


def with_accepted_engine(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], accepted_engines: Collection[str]
) -> dict[str, Any]:
    """Return our identity, with the engine that began the dump where ours is one of those that are accepted beside
    it.
    """
    if ours.get("teacher", {}).get("engine") not in accepted_engines:
        return dict(ours)
    return {**ours, "teacher": ours["teacher"] | {"engine": theirs.get("teacher", {}).get("engine")}}


def shard_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a shard says of its origin: all but the whole corpus, which may grow after it; its own documents it names by
    their hash.
    """
    corpus = {key: value for key, value in identity.get("corpus", {}).items() if key != "sha256"}
    return {**identity, **({"corpus": corpus} if "corpus" in identity else {})}


def read_json(path: Location, *needed: str, remedy: str = _MEND) -> dict[str, Any]:
    """Read a JSON object that holds the `needed` keys. Raises ValueError, naming the file, for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from error
    return parse_json(text, str(path), *needed, remedy=remedy)


def parse_json(text: str, where: str, *needed: str, remedy: str = _MEND) -> dict[str, Any]:
    """Parse a JSON object, as `read_json` does, of a text that stands in `where`: a file, or a line of one."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}. {remedy}") from error
    lacking = [key for key in needed if key not in values] if isinstance(values, dict) else ["object"]
    if lacking:
        raise ValueError(f"{where} is damaged: it holds no {', '.join(lacking)}. {remedy}")
    return dict(values)


def write_json(path: Location, values: Any) -> None:
    """Write a JSON file so that it is absent (or old) or complete; a number that is NaN or infinite is null there."""
    with committed(path) as partial:
        partial.write_text(json_text(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
