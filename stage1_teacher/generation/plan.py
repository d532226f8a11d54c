"""The plan of a written corpus, a pure function of prompts and recipe, and the identity it is checked against."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pipeline.config import GenerateConfig, Recipe
from pipeline.config.identity import identity_differences, identity_values
from pipeline.corpus.digest import document_digest
from pipeline.corpus.documents import Corpus, Document
from pipeline.runtime.format import count_of
from pipeline.sources.file_hash import weights_sha256
from schemas import dump_files
from schemas.manifest import ShardPlan
from schemas.storage.locations import Location, names_below
from schemas.text_corpus import TextManifest
from stage1_teacher.dump.shard_plan import code_sha256
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.generation.writer import Writer

# Keys of the section that do not decide what is written, or are held otherwise.
_ELSEWHERE = ("path", "prompts", "writer", "engine", "served_model")


def shards_of(corpus: Corpus, shard_prompts: int) -> Iterator[list[Document]]:
    """Yield the prompts of each shard."""
    documents = corpus.documents()
    while group := list(islice(documents, shard_prompts)):
        yield group


def plan_text(recipe: Recipe, config: GenerateConfig, writer: Writer, corpus: Corpus) -> TextManifest:
    """Read the prompts once and plan their shards."""
    shards: list[ShardPlan] = []
    first = 0
    for index, documents in enumerate(shards_of(corpus, config.shard_prompts)):
        digest = hashlib.sha256(b"".join(map(document_digest, documents))).hexdigest()
        num_bytes, folder = sum(len(document.text) for document in documents), dump_files.part_folder(index)
        shards.append(ShardPlan(index, first, len(documents), num_bytes, digest, folder))
        first += len(documents)
    prompts = hashlib.sha256(json.dumps([shard.sha256 for shard in shards]).encode()).hexdigest()
    identity = text_identity(recipe, config, writer, prompts)
    return TextManifest(identity=identity, prompt_counts=dict(corpus.counts), shards=tuple(shards))


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
    new_path = "Give a new generate.path, or delete that folder to start again."
    if (folder / dump_files.MANIFEST).exists():
        raise ValueError(f"{folder} holds a dump. {new_path}")
    if not (folder / dump_files.TEXT_MANIFEST).exists():
        orphans = [name for name in names_below(folder / dump_files.SHARDS) if name.endswith(dump_files.SHARD_SUFFIX)]
        if orphans:
            raise ValueError(
                f"{folder} holds {count_of(len(orphans), 'shard')} but no {dump_files.TEXT_MANIFEST} to say what they "
                f"are. Restore it. {new_path}"
            )
        ours.save(folder)
        return ours
    theirs = TextManifest.load(folder)
    differences = identity_differences(theirs.identity, ours.identity)
    if differences:
        raise ValueError(f"{folder} holds other text: {'; '.join(differences)}. {new_path}")
    return theirs
