"""Right answers by brute force, from a model's own logits and a tokenizer's own bytes and ids.

The model is asked for one path at a time.

Slow and obvious, in float64 where the model can; nothing of the product's arithmetic is used.

Shape legend: L tokens of a path, V ids of the head, R rows (tokens + 1), P positions (bytes + 1).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from schemas import END, NUM_SYMBOLS
from tests.zoo.spellings import Spelling


@torch.no_grad()
def next_logprobs(model: Any, path: Sequence[int]) -> np.ndarray:
    """Return [V] float64 nats: the model's own distribution after a path.

    A forward of its own, so that nothing can look ahead.
    """
    logits_V = model(input_ids=torch.tensor([list(path)]), use_cache=False).logits[0, -1]
    return logits_V.double().log_softmax(-1).numpy()


def in_float64(model: Any) -> Any:
    """Return the model in float64, or as it is if its code cannot compute so."""
    model = model.eval()
    dtype = next(model.parameters()).dtype
    try:
        next_logprobs(model.double(), [1, 2, 3])
    except RuntimeError:  # what some families make in float32 does not multiply with float64
        return model.to(dtype)
    return model


def row_logprobs(model: Any, start: int, ids: Sequence[int]) -> np.ndarray:
    """Return [R, V]: after the start token, and after each id."""
    return np.stack([next_logprobs(model, [start, *ids[:length]]) for length in range(len(ids) + 1)])


def token_logprobs(logprobs_RV: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Return [len(ids)] nats of each id, given those before."""
    return logprobs_RV[np.arange(len(ids)), list(ids)]


class Targets:
    """Canonical targets straight from their definition: every row, every token, every position.

    Args:
        end_ids: tokens that mean END.
    """

    def __init__(self, spelling: Spelling, end_ids: Iterable[int]) -> None:
        self._spelling, self._ends = spelling, sorted(set(end_ids))
        self._after: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def _continuations(self, prefix: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all tokens that continue `prefix`, and the byte that each continues with."""
        if prefix not in self._after:
            found = [
                (token, spelled[len(prefix)])
                for token, spelled in enumerate(self._spelling.token_bytes)
                if spelled is not None and len(spelled) > len(prefix) and spelled.startswith(prefix)
                if token not in self._ends and END not in spelled
            ]
            ids, symbols = zip(*found, strict=True) if found else ((), ())
            self._after[prefix] = np.array(ids, dtype=np.int64), np.array(symbols, dtype=np.int64)
        return self._after[prefix]

    def of(self, logprobs_RV: np.ndarray, ids: Sequence[int], document: bytes) -> np.ndarray:
        """Return [P, 256] of the document's positions; the tokenizer's prefix is before it, and known."""
        text = self._spelling.prefix + document
        offsets = np.cumsum([0, *(len(self._spelling.token_bytes[i] or b"") for i in ids)])
        assert offsets[-1] == len(text), "the tokens do not spell the text"
        log_weights = np.cumsum([0.0, *token_logprobs(logprobs_RV, ids)])
        found = np.zeros((len(text) + 1, NUM_SYMBOLS))
        for position in range(len(text) + 1):
            rows = [row for row, offset in enumerate(offsets) if offset <= position]
            scale = max(log_weights[row] for row in rows)
            for row in rows:
                probs_V = np.exp(logprobs_RV[row] + log_weights[row] - scale)
                tokens, symbols = self._continuations(text[offsets[row] : position])
                np.add.at(found[position], symbols, probs_V[tokens])
                if offsets[row] == position:
                    found[position, END] += probs_V[self._ends].sum()
        found /= found.sum(axis=1, keepdims=True)
        return found[len(self._spelling.prefix) :]


def document_nats(model: Any, start: int, ids: Sequence[int]) -> float:
    """Return -ln p of the document's tokens, END left out."""
    return -float(token_logprobs(row_logprobs(model, start, ids), ids).sum())


def bits_per_byte(model: Any, spelling: Spelling, start: int, texts: Sequence[str]) -> float:
    """Return bits per byte of all texts together."""
    nats = sum(document_nats(model, start, spelling.encode(text)) for text in texts)
    return nats / (sum(len(text.encode()) for text in texts) * math.log(2))


def mass_never_yielded(model: Any, spelling: Spelling, start: int, texts: Sequence[str]) -> float:
    """Return the mean share of a row's mass on tokens that the tokenizer never yields."""
    columns = sorted(spelling.never_yielded)
    rows = np.concatenate([row_logprobs(model, start, spelling.encode(text)) for text in texts])
    return float(np.exp(rows[:, columns]).sum(axis=1).mean())
