"""The manifest of a dump: its identity and its plan, written before the first shard."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from schemas import SCHEMA_VERSION, dump_files, plan_file
from schemas.json_text import json_text
from schemas.storage.atomic import committed
from schemas.storage.locations import AnyLocation, Location, names_below
from schemas.versions import reader as reader_of

_REMEDY = "Fetch the dump again, or restore the file; `bld teacher` can make a dump of your own again in a new folder"


_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))  # a dump may have a million
class ShardPlan:
    """Documents `first_document .. first_document + num_documents` of the corpus, whose content hashes to `sha256`.

    Attributes:
        folder: where the file lies within `shards`: directly in it if empty, as all files of earlier releases' dumps.
    """

    index: _Count  # becomes part of a file name, as `folder`, which must not point elsewhere
    first_document: _Count
    num_documents: _Count
    num_bytes: _Count
    sha256: str
    folder: Annotated[str, Field(pattern=r"^[0-9]*$")] = ""

    @property
    def file(self) -> str:
        """Return the path of the shard's file within `shards`."""
        name = dump_files.shard_name(self.index)
        return f"{self.folder}/{name}" if self.folder else name

    def path(self, dump: AnyLocation) -> AnyLocation:
        """Return the shard's file in a dump."""
        return dump / dump_files.SHARDS / self.file

    def content(self) -> dict[str, Any]:
        """Return everything but where the file lies."""
        return {name: getattr(self, name) for name in ("index", *plan_file.COLUMNS) if name != "folder"}


class Manifest(BaseModel):
    """The identity and the plan of a dump.

    Attributes:
        schema_version: of the shards, or the newest one of a merged dump's.
        identity: everything that decides the content.
        corpus_counts: what the corpus held and what was left out, by reason.
        accepted_engines: engines other than the identity's that an operator allowed to continue the dump, by name and
            version; each shard's metadata says which one made it (`bld.engine`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    identity: dict[str, Any]
    corpus_counts: dict[str, int]
    accepted_engines: tuple[str, ...] = ()
    shards: tuple[ShardPlan, ...]

    @property
    def has_chats(self) -> bool:
        """True if the dump's documents are chats."""
        return bool(self.identity.get("corpus", {}).get("field") == "messages")

    @property
    def has_tokens(self) -> bool:
        """True if the dump holds alternatives of the teacher's tokens."""
        return bool(self.identity.get("tokens"))

    def missing(self, dump: Location) -> list[ShardPlan]:
        """Return the planned shards whose file does not exist."""
        shards_present = names_below(dump / dump_files.SHARDS)
        return [shard for shard in self.shards if shard.file not in shards_present]

    def laid_out_as(self, other: "Manifest") -> "Manifest":
        """Return the manifest with all shards in one folder if the other's are, although they are too many for one."""
        if not any(shard.index >= dump_files.FOLDER_SHARDS and not shard.folder for shard in other.shards):
            return self
        return self.model_copy(update={"shards": tuple(replace(shard, folder="") for shard in self.shards)})

    def save(self, dump: Location) -> None:
        """Write the manifest into a dump; a plan of more than a thousand shards goes to a file of its own, first."""
        values = self.model_dump(mode="json", exclude={"shards"})
        sha256 = None
        if len(self.shards) <= dump_files.FOLDER_SHARDS:
            shards: Any = [{**shard.content(), **_folder(shard)} for shard in self.shards]
        else:
            columns = {name: [getattr(shard, name) for shard in self.shards] for name in plan_file.COLUMNS}
            shards = plan_file.write_plan(dump, columns)
            sha256 = shards["sha256"]
        write_json(dump / dump_files.MANIFEST, {**values, "shards": shards})
        plan_file.remove_others(dump, sha256)

    @classmethod
    def load(cls, dump: Location) -> "Manifest":
        """Read a dump's manifest. Raises ValueError if there is none, it is damaged, or of an unknown version."""
        try:
            return cls._load(dump)
        except FileNotFoundError:  # the manifest was replaced, and its plan deleted, between the reading of the two
            try:
                return cls._load(dump)
            except FileNotFoundError as error:
                raise ValueError(f"{dump} is damaged: {error}. {_REMEDY}") from None

    @classmethod
    def _load(cls, dump: Location) -> "Manifest":
        path = dump / dump_files.MANIFEST
        if not path.exists():
            if (dump / dump_files.TEXT_MANIFEST).exists():
                raise ValueError(
                    f"{dump} is not a dump: it holds text that `bld generate` wrote. Dump it with `bld teacher`, where "
                    "corpus.source is that folder"
                )
            raise ValueError(
                f"{dump} is not a dump: it holds no manifest.json. Run `bld teacher` first, or give another path."
            )
        values = read_json(path)
        reader = reader_of(path, values.get("schema_version"))
        if isinstance(values.get("shards"), dict):
            values["shards"] = _planned(dump, values["shards"])
        try:
            return cls.model_validate(reader.manifest(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path} is damaged: {where} is {first['input']!r}: {first['msg']}. {_REMEDY}") from None


def version_in(dump: Location) -> int:
    """Return the format version of shards written into a folder: its manifest's, or the newest for trial shards."""
    return Manifest.load(dump).schema_version if (dump / dump_files.MANIFEST).exists() else SCHEMA_VERSION


def _folder(shard: ShardPlan) -> dict[str, str]:
    return {"folder": shard.folder} if shard.folder else {}


# The last plan read from a file, by the hash that its manifest has: a process reads its dump's manifest several times.
_last_plan: dict[str, tuple[ShardPlan, ...]] = {}


def _planned(dump: Location, named: Mapping[str, Any]) -> tuple[ShardPlan, ...]:
    """Return the shards of the plan file that a manifest names. Raises FileNotFoundError if there is none."""
    sha256 = str(named.get("sha256"))
    if sha256 not in _last_plan:
        try:
            columns = plan_file.read_plan(dump, named)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"{error}. {_REMEDY}") from error
        rows = zip(*(columns[name] for name in plan_file.COLUMNS), strict=True)
        shards = tuple(ShardPlan(index, *row) for index, row in enumerate(rows))
        _last_plan.clear()
        _last_plan[sha256] = shards
    return _last_plan[sha256]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: keys become `a.b.c`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


# The meaning of a key's absence in an identity: of a key added later, or removed by a release.
_MEANING_IF_ABSENT: dict[str, Any] = {"arithmetic": 1}
_DUMP_PREFIX = re.compile(r"^(corpora\.[\w-]+\.)?(dump|other_dumps\.\d+)\.")  # of the dumps' identities within a run's


def arithmetic_of(identity: Mapping[str, Any]) -> int:
    """Return the version of the arithmetic (`schemas.ARITHMETIC`) that a dump of this identity follows."""
    return int(identity.get("arithmetic", _MEANING_IF_ABSENT["arithmetic"]))


def identity_differences(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    absent: Mapping[str, Any] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> list[str]:
    """Return `field: theirs there, ours here` for each field in which two identities differ.

    Args:
        absent: the meaning of an absent key, by its dotted name in a dump's identity (or a run's); other absent keys
            mean null. `pipeline.config.identity` has these for recipe keys.
        renamed: the name to show of a key, by its dotted name in a dump's identity (or a run's), where they differ.
    """
    a, b = flatten(theirs), flatten(json.loads(json.dumps(ours)))
    meanings = _MEANING_IF_ABSENT | dict(absent or {})
    differences = []
    for key in sorted(a.keys() | b.keys()):
        prefix = match[0] if (match := _DUMP_PREFIX.match(key)) else ""
        name = key.removeprefix(prefix)
        if_absent = meanings.get(name)
        there, here = a.get(key, if_absent), b.get(key, if_absent)
        if there != here:
            differences.append(f"{prefix}{(renamed or {}).get(name, name)}: {there!r} there, {here!r} here")
    return differences


def with_accepted_engine(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], accepted_engines: Collection[str]
) -> dict[str, Any]:
    """Return our identity, with the engine that began the dump if ours is one of the accepted ones."""
    if ours.get("teacher", {}).get("engine") not in accepted_engines:
        return dict(ours)
    return {**ours, "teacher": ours["teacher"] | {"engine": theirs.get("teacher", {}).get("engine")}}


def shard_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity stored in a shard: the dump's without the hash of the corpus, which may grow later.

    A shard names its own documents by their hash.
    """
    corpus = {key: value for key, value in identity.get("corpus", {}).items() if key != "sha256"}
    return {**identity, **({"corpus": corpus} if "corpus" in identity else {})}


def read_json(path: Location, *needed: str, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read a JSON object that holds the `needed` keys. Raises ValueError, naming the file, for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from error
    return parse_json(text, str(path), *needed, remedy=remedy)


def parse_json(text: str, where: str, *needed: str, remedy: str = _REMEDY) -> dict[str, Any]:
    """Parse a JSON object, as `read_json` does, from the text of `where`: a file, or a line of one."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}. {remedy}") from error
    lacking = [key for key in needed if key not in values] if isinstance(values, dict) else ["object"]
    if lacking:
        raise ValueError(f"{where} is damaged: it holds no {', '.join(lacking)}. {remedy}")
    return dict(values)


def write_json(path: Location, values: Any) -> None:
    """Write a JSON file so that it is absent (or old) or complete; numbers that are NaN or infinite become null."""
    with committed(path) as partial:
        partial.write_text(json_text(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
