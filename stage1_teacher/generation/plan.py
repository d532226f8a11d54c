"""The plan of a written corpus, a pure function of prompts and recipe, and the identity it is checked against."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from pipeline.config import GenerateConfig, Recipe, generate_config
from pipeline.config.identity import identity_differences, identity_values
from pipeline.corpus.documents import Corpus, DocumentReader
from pipeline.runtime.format import count_of
from pipeline.sources.file_hash import weights_sha256
from schemas import dump_files
from schemas.manifest import ShardPlan
from schemas.storage.locations import Location, names_below
from schemas.text_corpus import TextManifest
from stage1_teacher.coordination.shard_work import ShardWork
from stage1_teacher.dump.places import PlaceNotes, Places
from stage1_teacher.dump.shard_plan import code_sha256, corpus_sha256, documents_sha256
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.generation.writer import Writer

_NEW_PATH = "Give a new generate.path, or delete that folder to start again."
# Keys of the section that do not decide what is written, or are held otherwise.
_ELSEWHERE = ("path", "prompts", "writer", "engine", "served_model")


def plan_text(recipe: Recipe, writer: Writer, corpus: Corpus, renew: Callable[[], None]) -> tuple[TextManifest, Places]:
    """Read the prompts once and plan their shards; returns the plan, and where each shard begins.

    Args:
        renew: called after each shard, to keep a claim alive.
    """
    config = generate_config(recipe)
    shards, places = plan_shards(corpus, config.shard_prompts, renew)
    identity = text_identity(recipe, config, writer, corpus_sha256(shards))
    return TextManifest(identity=identity, prompt_counts=dict(corpus.counts), shards=tuple(shards)), places


def plan_shards(
    corpus: Corpus, shard_prompts: int, renew: Callable[[], None] = lambda: None
) -> tuple[list[ShardPlan], Places]:
    """Read the prompts once; returns their shards, and where each begins."""
    shards: list[ShardPlan] = []
    first, notes = 0, PlaceNotes()
    prompts = notes.passing(corpus.placed())
    while documents := list(islice(prompts, shard_prompts)):
        index, num_bytes = len(shards), sum(len(document.text) for document in documents)
        folder = dump_files.part_folder(index)
        shards.append(ShardPlan(index, first, len(documents), num_bytes, documents_sha256(documents), folder))
        notes.close(shards[-1])
        first += len(documents)
        renew()
    return shards, notes.places()


def read_prompts(shards: Iterable[ShardPlan], reader: DocumentReader, places: Places) -> Iterator[ShardWork]:
    """Yield each shard with its prompts. Raises ValueError if they have changed."""
    for shard in shards:
        prompts = reader.read(places.start(shard.index), shard.num_documents, places.filtered(shard.index))
        if documents_sha256(prompts) != shard.sha256:
            raise ValueError(
                f"the prompts have changed since their shards were planned: shard {shard.index} holds others "
                f"({shard.first_document} to {shard.first_document + shard.num_documents}). Restore them, or give a "
                "new generate.path."
            )
        yield shard, prompts


def text_identity(recipe: Recipe, config: GenerateConfig, writer: Writer, prompts: str) -> dict[str, Any]:
    """Return everything that decides what is written, and nothing else.

    Args:
        prompts: the SHA-256 of what is read of them.
    """
    section, served = writer.section, writer.section.engine_spec.served
    code = section.trust_remote_code and not served
    chats = {} if writer.chat is None else {"template_sha256": writer.chat.template.sha256}
    return {
        "writer": {
            # A student's folder is where it lies, not what it is; its weights say that.
            "model": section.model if config.writer == "teacher" else config.writer,
            "revision": section.revision,
            "weights_sha256": None if served else weights_sha256(writer.model, section.revision),
            **({"code_sha256": code_sha256(writer.model, section.revision)} if code else {}),
            "dtype": None if served else section.dtype,
            "head_dtype": None if served else section.head_dtype,
            "quantization": section.quantization,
            "engine": engine_name(section, recipe.placement),
            "tokenizer_sha256": writer.tokenizer.sha256,
            "start_id": writer.ids.start,
            "end_ids": list(writer.ids.ends),
            **chats,
            **({"served_model": section.name_at_server} if served else {}),
        },
        **known_identity(config, prompts),
    }


def known_identity(config: GenerateConfig, prompts: str) -> dict[str, Any]:
    """Return the part of the identity that is known without a model."""
    return {
        "prompts": {
            "sha256": prompts,
            "field": "messages" if config.prompts.has_chats else config.prompts.field,
            "max_bytes": config.prompts.max_bytes,
        },
        "sampling": identity_values(config, exclude=_ELSEWHERE),
    }


def create_or_check(folder: Location, ours: TextManifest) -> TextManifest:
    """Write the manifest of a new corpus, or check it against an existing one's; return the corpus's manifest.

    Raises ValueError if the folder holds something else; names each field that differs.
    """
    if (folder / dump_files.MANIFEST).exists():
        raise ValueError(f"{folder} holds a dump. {_NEW_PATH}")
    if not (folder / dump_files.TEXT_MANIFEST).exists():
        orphans = [name for name in names_below(folder / dump_files.SHARDS) if name.endswith(dump_files.SHARD_SUFFIX)]
        if orphans:
            raise ValueError(
                f"{folder} holds {count_of(len(orphans), 'shard')} but no {dump_files.TEXT_MANIFEST} to say what they "
                f"are. Restore it. {_NEW_PATH}"
            )
        ours.save(folder)
        return ours
    theirs = TextManifest.load(folder)
    require_identity(folder, theirs.identity, ours.identity)
    return theirs


def require_identity(folder: Location, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError, naming each field that differs, unless the identities are equal."""
    if differences := identity_differences(theirs, ours):
        raise ValueError(f"{folder} holds other text: {'; '.join(differences)}. {_NEW_PATH}")
