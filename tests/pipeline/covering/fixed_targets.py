"""Targets of a fixed small input, as plain lists: the arithmetic that `schemas.ARITHMETIC` numbers.

They are computed by everything that decides a dump's numbers.

`python -m tests.pipeline.covering.fixed_targets` writes those of this release under its number; what is there already
stays, for it is history.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import CoveringConfig
from pipeline.covering.branches import Branching
from pipeline.covering.covering import Covering, exp_logits
from pipeline.covering.dropped_mass import redistribute
from pipeline.covering.targets import Targets
from pipeline.covering.truncated_rows import ListedRows, listed_targets
from pipeline.covering.vocabulary import Vocabulary
from schemas import ARITHMETIC, levels
from stage1_teacher.inputs.windows import cut_windows
from stage1_teacher.reduction.sparsify import sparsify
from stage1_teacher.targets.rounding import round_entries

GOLDEN = Path(__file__).with_name("golden") / "arithmetic.json"
TOKENS: tuple[bytes | None, ...] = (
    b"a", b"b", b" ", b"\xc3", b"\xa9", b"ab", b"abb", b"ba", b" a", b" ab",
    b"\xc3\xa9", b"b ", b"a ", b"ab", None, None, b"a\xff"
)  # fmt: skip
END_ID, WIDTH = 14, 18
PATH = (5, 7, 9, 11, 10, 8, 6, 2, 0, 7, 5)
DOUBTED = (
    0,
    9,
)  # the row after these tokens gives the next one 1e-20: what another path drops there is all that is known
DOCUMENT = b"".join(TOKENS[token] or b"" for token in PATH)


def logits(path: tuple[int, ...]) -> np.ndarray:
    """Return each token's logit from a hash: the same on every machine and with every library."""
    digests = (hashlib.sha256(b"%d:%d" % (hash_of(path), token)).digest() for token in range(WIDTH))
    found = np.array([int.from_bytes(digest[:4]) / 2**32 for digest in digests]) * 8
    for position in DOUBTED:
        if path == PATH[:position]:
            found[PATH[position]] -= 60.0
    return found


def hash_of(path: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.sha256(bytes(path)).digest()[:6])


def results(covering: Covering) -> dict[str, Any]:
    """Return targets by name: of the canonical covering, of what it stores, and of the other methods."""
    vocabulary = covering.vocabulary
    rows_RC = exp_logits(np.stack([logits(PATH[:row])[vocabulary.order] for row in range(len(PATH) + 1)]))
    rows = covering.reduce_rows(covering.offsets, rows_RC)
    canonical = covering.targets(rows)
    branching = Branching(covering, PATH, CoveringConfig(beam_width=2, branch_threshold=0.05, rejoin_after_tokens=2))
    branching.add_canonical(rows)
    while wanted := branching.branches_to_expand():
        paths = [branching.path(branch) for branch in wanted]
        logits_RC = np.stack([logits((*PATH[: path.num_canonical], *path.tokens))[vocabulary.order] for path in paths])
        branching.add(wanted, covering.reduce_rows([branch.end for branch in wanted], exp_logits(logits_RC)))
    lengths = [len(TOKENS[token] or b"") for token in PATH]
    windows = cut_windows(DOCUMENT * 3, lengths * 3, lambda part: -(-len(part) * 3 // 5), budget=12, overlap=3)
    return {
        "canonical": _columns(canonical),
        "branches": _columns(branching.targets()),
        "spread": _columns(redistribute(canonical, covering)),
        "listed": _columns(_listed(covering)),
        "stored": _stored(canonical, 16, 0.04),
        "stored at least": _stored(canonical, 2, 0.2),
        "windows": [list(window) for window in windows],
    }


def fixed_covering(arithmetic: int) -> Covering:
    return Covering(Vocabulary(TOKENS, [END_ID], WIDTH), PATH, DOCUMENT, arithmetic)


def _listed(covering: Covering) -> Targets:
    probs = [exp_logits(logits(PATH[:row])[None])[0, :-1] for row in range(len(PATH) + 1)]
    ids = [np.union1d(np.argsort(-p)[:4], [(*PATH, END_ID)[row]]) for row, p in enumerate(probs)]
    logprobs = [np.log(p[listed] / p.sum()) for p, listed in zip(probs, ids, strict=True)]
    return listed_targets(
        covering, ListedRows(np.array([*map(len, ids)]), np.concatenate(ids), np.concatenate(logprobs), 4)
    )


def _columns(targets: Targets) -> dict[str, Any]:
    used = sorted({*DOCUMENT, 0xFF})
    return {
        "probs": _plain(targets.probs_PV[:, used]),
        "log_prefix_mass": _plain(targets.log_prefix_mass_P),
        "dropped": _plain(targets.dropped_P),
        "token_end": _plain(targets.token_end_P),
        "doubt": _plain(targets.doubt_P),
        "token_logprobs": _plain(targets.token_logprobs),
    }


def _stored(targets: Targets, top_k: int, min_prob: float) -> dict[str, Any]:
    realised = np.frombuffer(DOCUMENT + b"\xff", dtype=np.uint8)
    entries = sparsify(targets.probs_PV, realised, top_k, min_prob)
    rounded = round_entries(entries)
    shares = [levels.round_shares(share) for share in (targets.dropped_P, targets.token_end_P, targets.doubt_P)]
    return {
        "counts": entries.counts_P.tolist(),
        "symbols": rounded.symbols_E.tolist(),
        "logprobs": _plain(rounded.logprobs_E),
        "shares": _plain(np.stack(shares)),
        "token_logprobs": _plain(levels.round_token_logprobs(targets.token_logprobs)),
    }


def _plain(values: np.ndarray) -> Any:
    return np.array([float(f"{value:.9g}") for value in values.ravel().tolist()]).reshape(values.shape).tolist()


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))
    known.setdefault(str(ARITHMETIC), results(fixed_covering(ARITHMETIC)))
    GOLDEN.write_text(json.dumps(known, separators=(",", ":")) + "\n", encoding="utf-8")
