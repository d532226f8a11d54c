"""The audit: the accuracy of the targets, measured on a sample of documents during the dump.

The sample is the documents whose ids hash lowest, a function of corpus and recipe, so a resume or another worker audits
the same ones. A document's figures are stored with its shard, whose existence remains the only record of progress;
`audit.json` is gathered from the shards that exist.

The reference is a wide covering, which takes many branch rows per token, so only the first tokens of each document are
compared with it. It is a pass of its own, between the dump's batches, and the engine is opened as without it. The
documents' stored log-probabilities are also compared with the model's own, which use none of the dump's arithmetic.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import CoveringConfig
from pipeline.config.identity import identity_values
from pipeline.corpus.documents import Document
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering
from pipeline.runtime.devices import computes_on_gpu
from schemas.dump_files import Key
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.storage.locations import Location, open_parquet
from stage1_teacher.coordination.thread_map import thread_map
from stage1_teacher.engines.base import ListingEngine
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage1_teacher.reduction.types import RowsAlong
from stage1_teacher.targets import own_logprobs
from stage1_teacher.targets.branch_expansion import BranchPoint, expand
from stage1_teacher.targets.distances import distances, realised_bits, stored_sums
from stage1_teacher.targets.teacher import Teacher

REFERENCE_COVERING = CoveringConfig(beam_width=16, branch_threshold=1e-3, rejoin_after_tokens=4)
MAX_TOKENS = 64  # compared per document
LEAD_TOKENS = 8  # covered before the first that is supervised; a token may begin that early and reach into it
COST_SHARE = 0.03  # of the dump's time
# Cost of auditing a document, in tokens of the dump. The rounds dominate, each a pass of the engine and of the whole
# head over a few rows; the number of rows hardly matters. SmolLM2-135M on two busy cores: 1,100 with transformers, for
# 16 tokens as for 64, and 2,500 with vLLM when its prefix cache computed 24 tokens for each row, as it no longer does.
# On a GPU passes are short and dumps fast: 30 rounds of 20 ms at 50,000 tokens a second (estimated, not measured).
DOCUMENT_COST_CPU, DOCUMENT_COST_GPU = 2_500, 30_000
BYTES_PER_TOKEN = 4
NUM_WORST = 10


class Sample:
    """A sample of documents, chosen as they stream past."""

    def __init__(self, num_documents: int) -> None:
        self._num_documents = num_documents
        self._lowest: list[tuple[int, str]] = []  # a heap: minus the hash, id
        self._num_bytes = 0

    def passing(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self._num_bytes += len(document.text)
            if self._num_documents:
                self._consider(document.doc_id)
            yield document

    def _consider(self, doc_id: str) -> None:
        entry = (-int.from_bytes(hashlib.sha256(doc_id.encode()).digest()), doc_id)
        if len(self._lowest) < self._num_documents:
            heapq.heappush(self._lowest, entry)
        else:
            heapq.heappushpop(self._lowest, entry)

    def chosen_ids(self) -> frozenset[str]:
        """Return the ids of as many documents as the dump can afford to audit."""
        number = affordable(self._num_bytes)
        return frozenset(doc_id for _, doc_id in sorted(self._lowest, reverse=True)[:number])


def affordable(num_bytes: int) -> int:
    """Return how many documents of a corpus of that many bytes may be audited; at least 1."""
    cost = DOCUMENT_COST_GPU if computes_on_gpu() else DOCUMENT_COST_CPU
    return max(1, int(num_bytes / BYTES_PER_TOKEN * COST_SHARE / cost))


class ReferenceTargets(NamedTuple):
    """Targets of the wide covering at a window's first positions, or the reason why there are none."""

    probs_PV: np.ndarray | None
    num_tokens: int  # computed for them
    fault: str | None
    own: own_logprobs.OwnTokens | None = None  # the model's own log-probabilities of the window's first tokens


def compute_reference(teacher: Teacher, window: EncodedWindow, num_tokens: int = MAX_TOKENS) -> ReferenceTargets:
    """Compute the wide covering of a window's first tokens (of a chat's first turn), not what follows them.

    Where a window begins with context, of the first tokens that are supervised.
    """
    if isinstance(teacher.engine, ListingEngine):
        return ReferenceTargets(None, 0, "a served teacher holds no branches")
    own = own_logprobs.compute_own(teacher, window, num_tokens)
    if teacher.engine.cannot_branch is not None:
        return ReferenceTargets(None, 0, teacher.engine.cannot_branch, own)
    span = window.spans[0]
    edges = np.cumsum([0, *(len(teacher.tokenizer.token_bytes[token] or b"") for token in span.tokens)])
    first_kept = span.kept[0][0]
    skipped = max(0, int(np.searchsorted(edges, first_kept, side="right")) - 1 - LEAD_TOKENS)
    tokens = span.tokens[skipped : skipped + num_tokens]
    prompt = teacher.prompt(window)
    before = len(prompt) - len(window.tokens) + span.first + skipped
    spelled = b"".join(teacher.tokenizer.token_bytes[token] or b"" for token in tokens)
    covering = Covering(teacher.vocabulary, tokens, spelled)
    try:
        # At least one token comes before: the start token.
        requests = [RowsAlong.canonical(covering, before - 1)]
        branches = teacher.engine.branches([prompt[: before + len(tokens)]], [requests])
    except ValueError as error:
        return ReferenceTargets(None, 0, str(error), own)
    branching = Branching(covering, tokens, REFERENCE_COVERING)
    [[canonical]] = branches.rows
    branching.add_canonical(canonical)
    expand([branching], [BranchPoint(0, before)], branches)
    kept_P = np.concatenate([np.arange(first, last) for first, last in span.kept]) - edges[skipped]
    probs_PV = branching.targets().probs_PV[kept_P[kept_P < len(spelled)]]
    return ReferenceTargets(probs_PV, branches.num_tokens, None, own)


def measure(record: Record, reference: ReferenceTargets) -> dict[str, Any]:
    """Return the figures of an audited document's first window: sums over positions, nats, bits, counts."""
    bits, num_bytes = realised_bits(record)
    figures: dict[str, Any] = {
        "doc_id": record.doc_id,
        "positions": record.num_positions,
        "bytes": num_bytes,
        "realised_bits": bits,
        "kept": float(np.minimum(stored_sums(record), 1.0).sum()),
        "dropped": float(record.dropped.sum(dtype=np.float64)),
        "doubt": float(record.doubt.sum(dtype=np.float64)),
    }
    if reference.own is not None:
        nats_N = own_logprobs.half_squares(record, reference.own)
        figures |= {"own_tokens": len(nats_N), "own_nats": float(nats_N.sum())}
    if reference.probs_PV is None:
        return figures | {"not_compared": reference.fault}
    kl_P, total_variation_P = distances(record, reference.probs_PV)
    return figures | {
        "compared": len(kl_P),
        "kl_nats": float(kl_P.sum()),
        "total_variation": float(total_variation_P.sum()),
        "off_by_0.05": int((total_variation_P > 0.05).sum()),
        "computed_tokens": reference.num_tokens,
    }


def gather(dump: Location, manifest: Manifest) -> dict[str, Any]:
    """Return the content of `audit.json`, from the shards that exist: means per position, and the worst documents."""
    missing = {shard.index for shard in manifest.missing(dump)}
    existing = [shard.path(dump) for shard in manifest.shards if shard.index not in missing]
    metadata = thread_map(_metadata, existing)
    audited = [figures for values in metadata for figures in json.loads(values[Key.AUDIT.encode()])]
    num_shards, num_tokens = len(existing), sum(int(values[Key.COMPUTED_TOKENS.encode()]) for values in metadata)
    compared = [figures for figures in audited if "kl_nats" in figures]
    return {
        "shards": num_shards,
        "shards_planned": len(manifest.shards),
        "documents": len(audited),
        "positions": _sum(audited, "positions"),
        "kept_mass": _mean(audited, "kept", "positions"),
        "dropped_mass": _mean(audited, "dropped", "positions"),
        "doubt": _mean(audited, "doubt", "positions"),
        "realised_bits_per_byte": _mean(audited, "realised_bits", "bytes"),
        "models_own_tokens": {
            "tokens": sum(figures.get("own_tokens", 0) for figures in audited),
            "half_mean_square_nats": _mean(
                [figures for figures in audited if "own_tokens" in figures], "own_nats", "own_tokens"
            ),
            "limit_nats": own_logprobs.LIMIT_NATS,
        },
        "wide_covering": {
            **identity_values(REFERENCE_COVERING, exclude={"redistribute_dropped"}),
            "documents": len(compared),
            "positions": _sum(compared, "compared"),
            "kl_nats": _mean(compared, "kl_nats", "compared"),
            "total_variation": _mean(compared, "total_variation", "compared"),
            "share_off_by_0.05": _mean(compared, "off_by_0.05", "compared"),
            "computed_tokens": _sum(compared, "computed_tokens"),
            "share_of_dumps_tokens": _sum(compared, "computed_tokens") / max(num_tokens, 1),
            "not_compared": sorted({figures["not_compared"] for figures in audited if "not_compared" in figures}),
        },
        "worst_documents": [
            {
                "doc_id": figures["doc_id"],
                **{key: figures[key] / max(figures["compared"], 1) for key in ("kl_nats", "total_variation")},
            }
            for figures in sorted(compared, key=lambda f: -f["kl_nats"] / max(f["compared"], 1))[:NUM_WORST]
        ],
    }


def _metadata(shard: Location) -> dict[bytes, bytes]:
    with open_parquet(shard) as file:
        return dict(file.metadata.metadata)


def _sum(audited: Sequence[dict[str, Any]], key: str) -> int:
    return sum(figures[key] for figures in audited)


def _mean(audited: Sequence[dict[str, Any]], key: str, per: str) -> float | None:
    number = sum(figures[per] for figures in audited)
    return sum(figures[key] for figures in audited) / number if number else None
