"""Rows that a model was once asked for, kept in the cache: another student of the same move has them at once.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width, N rows that were made.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.runtime import log
from pipeline.sources.pypi import cache_folder
from schemas.storage.atomic import committed
from stage2_student.model.row_starts.base import IN_PIECES, Move

FOLDER = "rows"  # of the cache
_ROWS, _FACTS = "rows", "facts"

MadeRows = tuple[Tensor, dict[str, float]]  # (N, D) float32 of the tokens in pieces, in order; what is known of them


def kept_rows(move: Move, weight_OD: Tensor, code: str, make: Callable[[], MadeRows]) -> MadeRows:
    """Return what `make` made of this move before, or let it make them now and keep them.

    Nothing is kept of a model whose files are not known. A cache that cannot be read or written only costs time.

    Args:
        weight_OD: the old embedding or head that the rows are for.
        code: a file whose content decides the rows beside the move: rows of other code are others.
    """
    if move.old_model.weights_sha256 is None:
        return make()
    path = cache_folder() / FOLDER / f"{_identity(move, weight_OD, code)}.safetensors"
    found = _read(path)
    if found is not None:
        log.info(f"rows of {len(found[0]):,} tokens, as they were made for an earlier student: {path}")
        return found
    rows_ND, facts = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with committed(path) as partial:
            save_file({_ROWS: rows_ND.contiguous()}, partial, {_FACTS: json.dumps(facts)})
    return rows_ND, facts


def in_pieces(move: Move) -> list[int]:
    """Return the new tokens whose rows are made, not copied."""
    return [token for token, kind in enumerate(move.kinds) if kind in IN_PIECES]


def _identity(move: Move, weight_OD: Tensor, code: str) -> str:
    """Return a hash of all that decides the rows."""
    digest = hashlib.sha256(Path(code).read_bytes())
    sources = [list(move.sources[token]) for token in in_pieces(move)]
    parts = sorted((token, *halves) for token, halves in move.parts.items())
    weights = (move.old_model.weights_sha256, move.old_model.start_id, str(weight_OD.dtype), list(weight_OD.shape))
    digest.update(json.dumps([weights, sources, parts]).encode())
    digest.update(hashlib.sha256(weight_OD.detach().cpu().contiguous().view(torch.uint8).numpy().data).digest())
    return digest.hexdigest()


def _read(path: Path) -> MadeRows | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(_ROWS), json.loads(file.metadata()[_FACTS])
    except (OSError, SafetensorError):
        return None
