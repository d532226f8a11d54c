"""A run's identity: everything that decides its trained weights, from the recipe and the dumps."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config import DumpRef, Recipe, student_config
from pipeline.config.identity import identity_values
from pipeline.runtime import plugins
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from stage2_student.data import order
from stage2_student.data.mix import Mix
from stage2_student.distributed.deepspeed_config import decides_the_result
from stage2_student.model.start_identity import rows_code

_WATCHING = {
    "save_every",
    "keep_last",
    "checkpoints",
    "log_every",
    "eval_every",
    "eval_documents",
    "validation",
    "patience",
    "samples",
    "tasks",
    "wandb",
    "mlflow",
}
_DATA_PATH = {"micro_batch_tokens", "prefetch", "packing"}
_KERNELS = {"attention", "compile", "fused_ce", "marginal_kernel", "marginal_kept_gib"}  # which differ by rounding
_RANKS = {"num_processes", "hostfile", "gradient_checkpointing", "deepspeed"}
_PLACEMENT = {"change", *_RANKS, *_KERNELS, *_DATA_PATH, *_WATCHING}
# Paths, and keys whose effect the identity holds in another form: the dumps' identities, ids and hashes.
_NOT_OF_STUDENT = {"path", "dumps", "mix", "start", "end", "tokenizer", "chat_template", "trust_remote_code"}
_PIECES_VERSION = 2  # of how records are cut (`stage2_student.data.pieces`), and of what is stored about their lengths
_WHOLE_CHATS_PIECES = 1  # for orders in which a chat is used whole or not at all
_ADAPTERS_VERSION = 2  # of the choice of weights with adapters; runs of earlier releases have no such key


def dump_refs(recipe: Recipe) -> tuple[DumpRef, ...]:
    """Return the dumps to learn from, at least one."""
    return student_config(recipe).dumps or (DumpRef(path=recipe.dump.path, weight=1.0),)


def dumps_by_corpus(recipe: Recipe) -> dict[str | None, tuple[DumpRef, ...]]:
    """Return the dumps to learn from by the name of their corpus; the name is None if there is one corpus."""
    return student_config(recipe).dumps_by_corpus or {None: dump_refs(recipe)}


class RunVersions(NamedTuple):
    """Versions of behaviour that a run keeps from its beginning.

    Attributes:
        data_order: version of the order of its documents (`stage2_student.data.order`).
        adapters_by_peft: whether it has the adapters of earlier releases (`stage2_student.model.lora`).
    """

    data_order: int = order.VERSION
    adapters_by_peft: bool = False


NEWEST = RunVersions()


def run_identity(
    recipe: Recipe,
    manifest: Manifest,
    tokenizer_sha256: str,
    ids: SpecialIds,
    other_manifests: Sequence[Manifest] = (),
    versions: RunVersions = NEWEST,
) -> dict[str, Any]:
    """Return everything that decides the trained weights, up to rounding, and the ZeRO stage.

    The ZeRO stage is included because its checkpoints can be loaded under the same stage only.
    """
    dumps = _corpus_identity(recipe, dump_refs(recipe), [manifest, *other_manifests])
    return _with_recipe(dumps, recipe, tokenizer_sha256, ids, versions)


def union_identity(
    recipe: Recipe,
    manifests: Mapping[str | None, Sequence[Manifest]],
    tokenizer_sha256: str,
    ids: SpecialIds,
    versions: RunVersions = NEWEST,
) -> dict[str, Any]:
    """Return what `run_identity` does for a run on several corpora, from the manifests of their dumps."""
    refs = dumps_by_corpus(recipe)
    total = sum(ref.weight for own in refs.values() for ref in own)
    corpora = {
        str(name): {"share": sum(ref.weight for ref in own) / total, **_corpus_identity(recipe, own, manifests[name])}
        for name, own in refs.items()
    }
    return _with_recipe({"corpora": corpora}, recipe, tokenizer_sha256, ids, versions)


def _with_recipe(
    dumps: Mapping[str, Any], recipe: Recipe, tokenizer_sha256: str, ids: SpecialIds, versions: RunVersions
) -> dict[str, Any]:
    student, train = student_config(recipe), recipe.train
    identity = {
        **dumps,
        "student": {
            **identity_values(student, _NOT_OF_STUDENT),
            "tokenizer_sha256": tokenizer_sha256,
            "start_id": ids.document_start,
            "end_id": ids.end,
            **rows_code(student),
        },
        "train": identity_values(train, _PLACEMENT),
        **_own_code(student.interface, *train.objectives.files.values()),
        "data_order": versions.data_order,
        **({"adapters": _ADAPTERS_VERSION} if student.lora_rank and not versions.adapters_by_peft else {}),
        "deepspeed": {"zero_stage": train.deepspeed.zero_stage, **decides_the_result(train.deepspeed)},
    }
    return dict(json.loads(json.dumps(identity)))


def _dump_identity(manifest: Manifest) -> dict[str, Any]:
    plan = json.dumps([shard.content() for shard in manifest.shards], sort_keys=True)
    return {**manifest.identity, "documents_sha256": hashlib.sha256(plan.encode()).hexdigest()}


def _own_code(*names: str) -> dict[str, Any]:
    """Return the hashes of the operator's plug-in files; what these import is not covered."""
    files = {name: plugins.sha256(name) for name in names if plugins.is_own(name)}
    return {"own_code": files} if files else {}


def _corpus_identity(recipe: Recipe, refs: Sequence[DumpRef], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return the identities of the dumps of a corpus, in order, and how several are mixed."""
    first, *others = manifests
    if not others:
        return {"dump": _dump_identity(first)}
    weights = Mix.of([ref.weight for ref in refs], "arithmetic").weights
    return {
        "dump": _dump_identity(first),
        "other_dumps": {str(index): _dump_identity(other) for index, other in enumerate(others, 1)},
        "mix": {"how": student_config(recipe).mix, "weights": {str(i): weight for i, weight in enumerate(weights)}},
    }


def counts_key(identity: Mapping[str, Any], corpus: str | None = None) -> str:
    """Hash everything that decides the pieces of a run's records and their token counts.

    Args:
        corpus: the name of one of several corpora; None if there is only one.
    """
    dumps = identity if corpus is None else identity["corpora"][corpus]
    student = {name: identity["student"].get(name) for name in ("tokenizer_sha256", "template_sha256")}
    is_cut = identity["data_order"] > order.WHOLE_RECORDS
    version = _PIECES_VERSION if identity["data_order"] > order.WHOLE_CHATS else _WHOLE_CHATS_PIECES
    pieces = {"pieces": version, "max_tokens": identity["train"]["max_tokens"] if is_cut else None}
    decisive = {"dump": dumps["dump"], "other_dumps": dumps.get("other_dumps"), **student, **pieces}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
