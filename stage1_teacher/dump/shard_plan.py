"""The plan of a dump's shards, a pure function of corpus and recipe, and the identity a dump is checked against."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from pipeline.config import CorpusConfig, Recipe, TeacherConfig
from pipeline.config.identity import added_values, identity_differences, identity_values
from pipeline.corpus.digest import document_digest
from pipeline.corpus.documents import Document, DocumentReader
from pipeline.corpus.rows import written_folder
from pipeline.runtime.format import count_of
from pipeline.sources.pypi import sha256_of
from pipeline.tokenization.special_ids import SpecialIds
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan, with_accepted_engine
from schemas.storage.locations import Location, names_below
from stage1_teacher.dump.places import Places
from stage1_teacher.targets.resolved import ResolvedTeacher

MAX_DOCUMENTS = 1 << 16  # per shard: each takes a kilobyte of memory beside its text while the shard is made


class _Open:
    """A shard that may still grow."""

    def __init__(self) -> None:
        self.num_documents, self.num_bytes, self.digest = 0, 0, hashlib.sha256()

    def add(self, document: Document) -> None:
        self.digest.update(document_digest(document))
        self.num_documents += 1
        self.num_bytes += len(document.text)


def plan_shards(documents: Iterable[Document], shard_bytes: int) -> Iterator[ShardPlan]:
    """Yield shards of whole documents, each closed before it exceeds `shard_bytes` or `MAX_DOCUMENTS`.

    A document longer than `shard_bytes` has a shard to itself.
    """
    first = 0
    for index, shard in enumerate(_closed_before_overflow(documents, shard_bytes)):
        yield ShardPlan(
            index=index,
            first_document=first,
            num_documents=shard.num_documents,
            num_bytes=shard.num_bytes,
            sha256=shard.digest.hexdigest(),
            folder=dump_files.part_folder(index),
        )
        first += shard.num_documents


def _closed_before_overflow(documents: Iterable[Document], shard_bytes: int) -> Iterator[_Open]:
    shard = _Open()
    for document in documents:
        full = shard.num_bytes + len(document.text) > shard_bytes or shard.num_documents == MAX_DOCUMENTS
        if shard.num_documents and full:
            yield shard
            shard = _Open()
        shard.add(document)
    if shard.num_documents:
        yield shard


class ModelHashes(NamedTuple):
    """SHA-256 of a model's files.

    Attributes:
        weights: None for a served teacher.
        code: None where no Python code of the model's own runs.
    """

    weights: str | None
    code: str | None


def make_identity(
    recipe: Recipe, resolved: ResolvedTeacher, ids: SpecialIds, hashes: ModelHashes, engine: str, corpus: str
) -> dict[str, Any]:
    """Return everything that decides a dump's content, and nothing else.

    Args:
        engine: its name, with its version.
        corpus: the SHA-256 of what is read of it.
    """
    teacher, dump = recipe.teacher, recipe.dump
    served, listed = teacher.engine_spec.served, not teacher.engine_spec.whole_softmax
    return {
        "teacher": {
            "model": teacher.model,
            "revision": teacher.revision,
            "weights_sha256": hashes.weights,
            **({} if hashes.code is None else {"code_sha256": hashes.code}),
            "dtype": None if served else teacher.dtype,  # a server has its own and does not tell
            "quantization": teacher.quantization,
            "engine": engine,
            "tokenizer_sha256": resolved.tokenizer.sha256,
            "start_id": ids.start,
            "end_ids": list(ids.ends),
            **({} if resolved.chat is None else {"template_sha256": resolved.chat.template.sha256}),
            "max_tokens": teacher.max_tokens,
            "overlap_tokens": teacher.overlap_tokens,
            **({"served_model": teacher.name_at_server} if served else {}),
            **(_listed_identity(teacher) if listed else {}),
            **added_values(teacher),
        },
        "corpus": {"sha256": corpus, **_read(recipe.corpus)},
        "covering": identity_values(recipe.dump.covering),
        "sparsity": {"top_k": dump.top_k, "min_prob": dump.min_prob},
        "coding": dump.coding,
        **({"arithmetic": dump.arithmetic_used} if dump.arithmetic_used > 1 else {}),
        "shard_bytes": int(dump.shard_bytes),
        **added_values(dump),
    }


def _read(corpus: CorpusConfig) -> dict[str, Any]:
    """Return what is read of a corpus's rows; for contents alone, as when there was no other choice."""
    # What was written is supervised, as its rows say, in place of what a recipe may select beside it.
    written = {} if written_folder(corpus.source) is None else {"supervise": "what was written"}
    if not corpus.has_chats:
        return {"field": corpus.field, **written, **added_values(corpus)}
    return {
        "field": "messages",
        **({} if corpus.turns == "contents" else corpus.model_dump(include={"turns", "reasoning"})),
        **written,
        **added_values(corpus),
    }


def _listed_identity(teacher: TeacherConfig) -> dict[str, Any]:
    """Return what a dump of listed tokens has in addition; a dump without `targets` comes from the whole softmax."""
    return {
        "targets": "top-k tokens of each row",
        "prompt_logprobs": teacher.prompt_logprobs,
    }


def code_sha256(model: str, revision: str | None) -> str | None:
    """Return a hash over the Python files that come with a model, by name; None if there are none."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.py"]))
    files = sorted(file for file in folder.rglob("*.py") if file.is_file())
    if not files:
        return None
    parts = [f"{file.relative_to(folder).as_posix()}:{sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def corpus_sha256(shards: list[ShardPlan]) -> str:
    return hashlib.sha256(json.dumps([shard.sha256 for shard in shards]).encode()).hexdigest()


def documents_sha256(documents: Iterable[Document]) -> str:
    """Return the hash of a shard's documents, as in a plan."""
    return hashlib.sha256(b"".join(document_digest(document) for document in documents)).hexdigest()


def shard_documents(shard: ShardPlan, reader: DocumentReader, places: Places) -> list[Document]:
    """Read a shard's documents and check them. Raises ValueError if the corpus has changed."""
    documents = reader.read(places.start(shard.index), shard.num_documents, places.filtered(shard.index))
    if documents_sha256(documents) != shard.sha256:
        raise ValueError(
            f"the corpus has changed since the dump was planned: shard {shard.index} holds other documents "
            f"({shard.first_document} to {shard.first_document + shard.num_documents}). Restore the corpus, or give a "
            "new dump.path."
        )
    return documents


def create_or_check_manifest(dump: Location, manifest: Manifest, accept_engine: str | None = None) -> Manifest:
    """Write the manifest of a new dump, or check it against an existing dump's; return the dump's manifest.

    Args:
        accept_engine: name and version of the engine here, to accept it although another one began the dump. It is
            recorded.
    Raises:
        ValueError: the folder holds another dump; names each field that differs.
    """
    engine = str(manifest.identity["teacher"]["engine"])
    if accept_engine not in (None, engine):
        raise ValueError(f"--accept-engine {accept_engine}: the engine here is {engine}")
    if not (dump / dump_files.MANIFEST).exists():
        _refuse_orphans(dump)
        manifest.save(dump)
        return manifest
    theirs = Manifest.load(dump)
    accepted = dict.fromkeys([*theirs.accepted_engines, *([accept_engine] if accept_engine else [])])
    require_identity(dump, theirs.identity, manifest.identity, accepted)
    accepted.pop(theirs.identity["teacher"]["engine"], None)
    if tuple(accepted) != theirs.accepted_engines:
        theirs = theirs.model_copy(update={"accepted_engines": tuple(accepted)})
        theirs.save(dump)
    return theirs


def require_identity(
    dump: Location, theirs: dict[str, Any], ours: dict[str, Any], accepted_engines: Collection[str]
) -> None:
    """Raise ValueError, naming each field that differs, unless the identities differ at most in an accepted engine."""
    differences = identity_differences(theirs, with_accepted_engine(ours, theirs, accepted_engines))
    if differences:
        engine = str(ours["teacher"]["engine"])
        raise ValueError(f"{dump} holds another dump: {'; '.join(differences)}. {_way_out(differences, engine)}")


def _way_out(differences: list[str], engine: str) -> str:
    new_dump = "Give a new dump.path, or delete that folder to start again."
    if [difference.split(":")[0] for difference in differences] != ["teacher.engine"]:
        return new_dump
    return f"Go back to that engine, or accept this one's different rounding with --accept-engine {engine}. {new_dump}"


def _refuse_orphans(dump: Location) -> None:
    """Raise ValueError for shards without a manifest: a new manifest would claim them."""
    orphans = sorted(name for name in names_below(dump / dump_files.SHARDS) if name.endswith(dump_files.SHARD_SUFFIX))
    if orphans:
        raise ValueError(
            f"{dump} holds {count_of(len(orphans), 'shard')} ({orphans[0]} ...) but no manifest.json to say what they "
            "are. Restore the manifest, give a new dump.path, or delete that folder to start again."
        )
